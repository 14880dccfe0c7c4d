"""Two sides of a comparison, run in turn."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def seconds(work: Callable[[], Any]) -> float:
    """How long a piece of work takes, its GPU kernels included."""
    _finish()
    began = time.perf_counter()
    work()
    _finish()
    return time.perf_counter() - began


def compare(
    name: str,
    peer: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    floor: float,
    repeats: int = 5,
    equal: bool | str = "",
    warm_up: bool = True,
) -> dict[str, Any]:
    """A row of the table: the median of their time over ours, side by side in each repeat.

    Args:
        name: of the row.
        peer: of the other side.
        ours: our work.
        theirs: the same work of the peer.
        floor: the ratio that is promised.
        repeats: of both.
        equal: whether both results are the same, or in what the work is.
        warm_up: whether to run both once before.
    """
    if warm_up:
        ours()
        theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    return row(name, peer, pairs, floor, equal)


def row(name: str, peer: str, pairs: list[tuple[float, float]], floor: float, equal: bool | str = "") -> dict[str, Any]:
    """A row of the table from (our, their) seconds of each repeat."""
    ratios = [theirs / ours for ours, theirs in pairs]
    return {
        "name": name,
        "peer": peer,
        "ours_seconds": statistics.median(ours for ours, _ in pairs),
        "peer_seconds": statistics.median(theirs for _, theirs in pairs),
        "ratio": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "floor": floor,
        "equal": equal,
    }


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
