"""What a frozen tower makes of each row of a table, on disk: computed once, read by memory map."""

import errno
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from edge_glass.data.batch import Features
from edge_glass.data.decode import Undecodable
from edge_glass.errors import UserError

BLOCK_ROWS = 512
# numpy has no bfloat16; its bits are stored.
STORED: dict[str, np.dtype] = {"fp32": np.dtype("float32"), "fp16": np.dtype("float16"), "bf16": np.dtype("uint16")}
TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class FeatureError(UserError):
    """Features that cannot be stored."""


class FeatureStore:
    """The features of every row of a table, in blocks of rows, each a file that is there whole or not at all.

    A row has one or more variants: the first is the row as it is, the others vary it as training does. A variant is a
    sequence of tokens; rows may differ in their number.

    Args:
        folder: of this store alone; its name says what was computed from what, so that nothing else is ever read there.
        sample_ids: of the rows, in order.
        variants: of each row.
        dtype: `fp32`, `fp16` or `bf16`.

    Attributes:
        blocks: how many there are.
    """

    def __init__(self, folder: Path, sample_ids: Sequence[str], variants: int = 1, dtype: str = "fp16"):
        self.folder, self.variants, self.dtype = folder, variants, dtype
        self.sample_ids = list(sample_ids)
        self.rows = {sample: row for row, sample in enumerate(self.sample_ids)}
        self.blocks = -(-len(self.sample_ids) // BLOCK_ROWS)
        self._opened: dict[
            int, tuple[np.ndarray, np.ndarray]
        ] = {}  # block -> tokens, begin of each variant and the end
        self._broken: dict[int, str] | None = None

    def rows_of(self, block: int) -> range:
        """The rows of a block."""
        return range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(self.sample_ids)))

    def missing(self) -> list[int]:
        """Blocks that are not there yet."""
        there = {path.name for path in self.folder.glob("*.npy")}
        return [block for block in range(self.blocks) if f"{block:06}.npy" not in there]

    @contextmanager
    def claim(self, block: int) -> Iterator[bool]:
        """Whether this process may write a block: no other one is at it, and it is missing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / f"{block:06}.lock")  # given up by the system when a process dies
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield not self._path(block).exists()
        finally:
            lock.release()

    def write(self, block: int, features: Sequence[Sequence[Tensor]], broken: dict[int, str]) -> None:
        """Store the features of a block, atomically.

        Args:
            block: which.
            features: of each row its variants `[tokens, dim]`; none for a broken row.
            broken: row -> why it cannot be decoded.

        Raises:
            FeatureError: values too large for the type they are stored in.
        """
        lengths = [size for row in features for size in (map(len, row) if row else [0] * self.variants)]
        real = [variant for row in features for variant in row]
        tokens = torch.cat(real) if real else torch.zeros(0, 1)
        cast = tokens.detach().cpu().to(TORCH[self.dtype])
        if not cast.isfinite().all():
            raise FeatureError(
                f"cache.dtype={self.dtype}: a feature of up to {tokens.abs().max():.3g} does not fit; give bf16 or fp32"
            )
        stored = cast.view(torch.uint16).numpy() if self.dtype == "bf16" else cast.numpy()
        beginnings = np.cumsum([0, *lengths])
        about = {"begins": beginnings.tolist(), "broken": {str(row): reason for row, reason in broken.items()}}
        _publish(self.folder / f"{block:06}.json", lambda file: file.write(json.dumps(about).encode()))
        _publish(self._path(block), lambda file: np.save(file, stored, allow_pickle=False))  # last: says it is there

    def place(self, sample_id: str) -> int:
        """Where the first variant of a row stands, for `gather`.

        Raises:
            Undecodable: with the reason, as it was found when the features were computed.
            KeyError: a row of another table.
        """
        row = self.rows[sample_id]
        if self._broken is None:
            self._broken = {
                int(broken): reason
                for block in range(self.blocks)
                for broken, reason in self._about(block)["broken"].items()
            }
        if row in self._broken:
            raise Undecodable(self._broken[row])
        return row * self.variants

    def gather(self, places: Sequence[int]) -> Features:
        """The features at some places, read block after block in rising order."""
        wanted = np.asarray(places, dtype=np.int64)
        blocks, inside = np.divmod(wanted, BLOCK_ROWS * self.variants)
        parts = [(blocks == block, *self._open(block)) for block in np.unique(blocks).tolist()]
        begins = np.zeros(len(wanted), dtype=np.int64)
        lengths = np.zeros(len(wanted), dtype=np.int64)
        for here, _, edges in parts:
            begins[here], lengths[here] = edges[inside[here]], np.diff(edges)[inside[here]]
        longest = int(lengths.max(initial=0))
        shape = (len(wanted), longest, parts[0][1].shape[1])
        values = (np.empty if (lengths == longest).all() else np.zeros)(shape, STORED[self.dtype])
        for here, tokens, _ in parts:
            rows = np.flatnonzero(here)[np.argsort(begins[here], kind="stable")]
            if longest == 1 and lengths[rows].all():  # many small rows: one call for all
                values[rows, 0] = np.take(tokens, begins[rows], axis=0)
                continue
            for row, begin, length in zip(rows.tolist(), begins[rows].tolist(), lengths[rows].tolist(), strict=True):
                values[row, :length] = tokens[begin : begin + length]
        tensor = torch.from_numpy(values)
        tensor = tensor.view(torch.bfloat16) if self.dtype == "bf16" else tensor
        mask = torch.arange(longest)[None, :] < torch.from_numpy(lengths)[:, None]
        return Features(tensor, mask)

    def _open(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        if block not in self._opened:
            tokens = np.load(self._path(block), mmap_mode="r", allow_pickle=False)
            self._opened[block] = tokens, np.array(self._about(block)["begins"])
        return self._opened[block]

    def _about(self, block: int) -> dict[str, Any]:
        return json.loads((self.folder / f"{block:06}.json").read_text(encoding="utf-8"))

    def _path(self, block: int) -> Path:
        return self.folder / f"{block:06}.npy"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # a worker process maps the files itself


def _publish(path: Path, write: Any) -> None:
    """Write a file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FeatureError(
                f"{path.parent}: no space left for features: free some, or give cache.dir, cache.dtype=fp16 or "
                "cache.enabled=false"
            ) from error
        raise
