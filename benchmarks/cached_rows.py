"""Stored features to a batch, in random order, beside Hugging Face datasets with its torch format."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Array2D, Dataset, Features

from benchmarks.sides import compare
from edge_glass.data.features import FeatureStore

ROWS, BATCH = 4096, 128
SHAPES = {"pooled vectors": (1, 768), "tokens": (50, 768)}


def rows() -> list[dict[str, Any]]:
    """Batches of 128 random rows, fp16; the tower casts them where it is."""
    return [_row(name, *shape) for name, shape in SHAPES.items()]


def _row(name: str, tokens: int, dim: int) -> dict[str, Any]:
    values = np.random.default_rng(0).standard_normal((ROWS, tokens, dim)).astype(np.float16)
    with tempfile.TemporaryDirectory() as temporary:
        store = FeatureStore(Path(temporary, "store"), [str(row) for row in range(ROWS)], dtype="fp16")
        for block in store.missing():
            with store.claim(block):
                store.write(block, [[torch.from_numpy(values[row])] for row in store.rows_of(block)], {})
        table = Dataset.from_dict({"values": values}, features=Features(values=Array2D((tokens, dim), "float16")))
        table.save_to_disk(str(Path(temporary, "datasets")))
        peer = Dataset.load_from_disk(str(Path(temporary, "datasets"))).with_format("torch")
        draws = [np.random.default_rng(1).permutation(ROWS)[:BATCH] for _ in range(8)]

        def ours() -> list[torch.Tensor]:
            return [store.gather([store.place(str(row)) for row in draw]).values for draw in draws]

        def theirs() -> list[torch.Tensor]:
            return [peer[draw]["values"] for draw in draws]

        same = all(torch.equal(a, b) for a, b in zip(ours(), theirs(), strict=True))
        return compare(f"cached rows to batch, {name}", "datasets, torch format", ours, theirs, 10.0, equal=same)


if __name__ == "__main__":
    print(rows())
