"""One training sample: how its media are read and decoded, and what takes the place of one that is broken."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from edge_glass.data.batch import SkippedRow
from edge_glass.data.decode import Undecodable, decode_audio, decode_image
from edge_glass.data.dialogue import Exchange
from edge_glass.data.features import FeatureStore
from edge_glass.data.rows import DataError, Rows

# An index is (epoch, place): what a sample looks like follows from (seed, epoch, place) alone.
Index = tuple[int, int]


@dataclass
class Sample:
    """One training sample.

    Attributes:
        sample_id: names of the rows it was made from.
        concept_id: what it shows or says.
        generator: the sample's own random stream, for the augmentation that follows.
        image: `[3, side, side]` uint8, or where its features stand in the store of them.
        audio: `[samples]` float32 at 16 kHz, or where its features stand.
        text: a caption.
        exchange: what a decoder is asked about it, and the answer.
        shown: the media that the decoder sees of it.
        skipped: rows that could not be decoded and were replaced by this one.
    """

    sample_id: str
    concept_id: int
    generator: np.random.Generator
    image: Tensor | int | None = None
    audio: Tensor | int | None = None
    text: str | None = None
    exchange: Exchange | None = None
    shown: tuple[str, ...] = ()
    skipped: list[SkippedRow] = field(default_factory=list)


@dataclass
class Decoding:
    """How media are read, as the towers need them: decoded, or as features; and the memory that keeps the decoded ones.

    Attributes:
        image_size: side of a picture in pixels.
        seconds: the longest clip; what comes after is cut.
        keep_mb: decoded media kept in memory, MiB a process; 0 decodes again each time.
        features: modality -> store, of the towers that need no media any more.
    """

    image_size: int = 224
    seconds: float = 30.0
    keep_mb: int = 512
    features: dict[str, FeatureStore] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kept: dict[tuple[str, str], Tensor] = {}
        self.free_bytes = self.keep_mb * 2**20

    def decode(self, modality: str, data: bytes) -> Tensor:
        """A picture `[3, side, side]` uint8 or a clip `[samples]` float32.

        Raises:
            Undecodable: with the reason.
        """
        if modality == "image":
            return decode_image(data, self.image_size)
        return decode_audio(data, self.seconds)

    def keep(self, key: tuple[str, str], media: Tensor) -> None:
        """Keep what was decoded, until the memory is full."""
        if self.free_bytes >= media.nbytes:
            self.free_bytes -= media.nbytes
            self.kept[key] = media

    def __getstate__(self) -> dict[str, Any]:
        # A worker process starts with an empty memory.
        return {**self.__dict__, "kept": {}, "free_bytes": self.keep_mb * 2**20}


class MediaReader:
    """The image or audio of each row.

    Args:
        rows: of one data set; readers that share a `decoding` share its memory, by sample id.
        modality: `image` or `audio`.
        decoding: what the tower needs.
    """

    def __init__(self, rows: Rows, modality: str, decoding: Decoding):
        self.rows = rows
        self.modality = modality
        self.decoding = decoding
        self.sample_ids = rows.column("sample_id")

    def read(self, row: int) -> Tensor | int:
        """What a tower needs of the row: its decoded media, or where its features stand.

        Raises:
            Undecodable: with the reason.
        """
        store = self.decoding.features.get(self.modality)
        return self.decoded(row) if store is None else store.place(self.sample_ids[row])

    def decoded(self, row: int) -> Tensor:
        """The row's media.

        Raises:
            Undecodable: with the reason.
        """
        key = (self.modality, self.sample_ids[row])
        if key in self.decoding.kept:
            return self.decoding.kept[key]
        try:
            data = self.rows.media(self.modality, row)
        except OSError as error:
            raise Undecodable(f"{self.modality}: {error}") from error
        media = self.decoding.decode(self.modality, data)
        self.decoding.keep(key, media)
        return media


class BrokenRow(Exception):
    def __init__(self, sample_id: str, reason: str):
        super().__init__(f"{sample_id}: {reason}")
        self.row = SkippedRow(sample_id, reason)


def read_media(reader: MediaReader, row: int) -> Tensor | int:
    try:
        return reader.read(row)
    except Undecodable as error:
        raise BrokenRow(reader.sample_ids[row], str(error)) from error


def first_readable(index: Index, seed: int, count: int, sample: Callable[[int, np.random.Generator], Any]) -> Any:
    """The sample at `index`, or, if its row is broken, another drawn at random, so that batches keep their size.

    Ranks gather embeddings of equal batch sizes, so a broken row is replaced, and reported, not left out.
    """
    epoch, place = index
    generator = np.random.default_rng((seed, epoch, place))
    skipped: list[SkippedRow] = []
    for _ in range(20):
        try:
            found = sample(place, generator)
        except BrokenRow as broken:
            skipped.append(broken.row)
            place = int(generator.integers(count))
        else:
            found.skipped = skipped
            return found
    listed = "\n".join(f"  {row.sample_id}: {row.reason}" for row in skipped)
    raise DataError(f"20 rows in a row cannot be decoded:\n{listed}")
