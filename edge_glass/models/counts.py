"""How many parameters the parts of a model have."""

import math
from collections.abc import Mapping
from typing import TypedDict

from torch import nn


class ParameterRow(TypedDict):
    """Parameters of one part: all of them, and those that are trained."""

    part: str
    total: int
    trainable: int


def parameter_table(parts: Mapping[str, nn.Module], whole: nn.Module) -> list[ParameterRow]:
    """Parameter counts of each part that has any, and of the whole, `total`."""
    rows = [_count(name, part) for name, part in [*parts.items(), ("total", whole)]]
    return [row for row in rows if row["total"]]


def format_parameter_table(rows: list[ParameterRow]) -> str:
    """The table as lines of text for the terminal."""
    lines = [("part", "parameters", "trainable")]
    lines += [(row["part"], f"{row['total']:,}", f"{row['trainable']:,}") for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        f"{part:<{widths[0]}}  {total:>{widths[1]}}  {trainable:>{widths[2]}}" for part, total, trainable in lines
    )


def _count(name: str, module: nn.Module) -> ParameterRow:
    sizes = [(_size(parameter), parameter.requires_grad) for parameter in module.parameters()]
    return {
        "part": name,
        "total": sum(size for size, _ in sizes),
        "trainable": sum(size for size, trainable in sizes if trainable),
    }


def _size(parameter: nn.Parameter) -> int:
    """Numbers in a parameter; of a 4-bit one, which is stored packed, those that it stands for."""
    quantised = getattr(parameter, "quant_state", None)
    return parameter.numel() if quantised is None else math.prod(quantised.shape)
