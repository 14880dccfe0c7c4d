"""Training sets: what one index gives, for every combination of modalities."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from edge_glass.data.batch import SkippedRow
from edge_glass.data.decode import Undecodable, decode_audio, decode_image
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
        image: `[3, side, side]` uint8.
        audio: `[samples]` float32 at 16 kHz.
        text: a caption.
        skipped: rows that could not be decoded and were replaced by this one.
    """

    sample_id: str
    concept_id: int
    generator: np.random.Generator
    image: Tensor | None = None
    audio: Tensor | None = None
    text: str | None = None
    skipped: list[SkippedRow] = field(default_factory=list)


@dataclass
class Decoding:
    """How media are decoded, as the towers need them, and the memory that keeps what was decoded.

    Attributes:
        image_size: side of a picture in pixels.
        seconds: the longest clip; what comes after is cut.
        keep_mb: decoded media kept in memory, MiB a process; 0 decodes again each time.
    """

    image_size: int = 224
    seconds: float = 30.0
    keep_mb: int = 512

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
    """The decoded image or audio of each row.

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

    def read(self, row: int) -> Tensor:
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


class Captions:
    """The captions of each row: its text, and with probability `keyword_share` one of its keywords instead."""

    def __init__(self, rows: Rows, keyword_share: float):
        if not 0 <= keyword_share <= 1:
            raise DataError(f"keyword_share is a probability in 0..1, not {keyword_share}")
        self.texts = rows.column("text")
        self.keyword_share = keyword_share
        self.keywords = rows.column("keywords") if "keywords" in rows.columns else [[]] * len(rows)

    def draw(self, row: int, generator: np.random.Generator) -> str:
        """A caption of the row."""
        keywords = self.keywords[row]
        if keywords and generator.random() < self.keyword_share:
            return keywords[generator.integers(len(keywords))]
        return self.texts[row]


class NegativeCaptions:
    """Captions of concepts that a batch does not show: for a frozen text tower, many negatives that cost little.

    Args:
        captions: of a table.
        by_concept: concept -> its rows in that table.
        count: how many captions to draw, each of another concept.
    """

    def __init__(self, captions: Captions, by_concept: dict[int, list[int]], count: int):
        self.captions = captions
        self.by_concept = by_concept
        self.concepts = np.array(sorted(by_concept))
        self.count = count

    def draw(self, shown: list[int], generator: np.random.Generator) -> tuple[list[str], Tensor]:
        """Captions and their concept ids `[count]`, of concepts that are not among `shown`."""
        others = self.concepts[~np.isin(self.concepts, shown)]
        chosen = generator.permutation(others)[: self.count].tolist()
        rows = [self.by_concept[concept] for concept in chosen]
        texts = [self.captions.draw(choices[generator.integers(len(choices))], generator) for choices in rows]
        return texts, torch.tensor(chosen, dtype=torch.int64)


class TriModalDataset(Dataset[Sample]):
    """Image, audio and text of one concept in each sample, from tables that share concept ids.

    The tables hold one row a drawing and one row a recording. A sample joins rows of the same concept: true triplets
    when they were made of one thing, or pairs joined through their text (`dataset.pair_by=text`) where an image-text
    set and an audio-text set have no triplets in common. An epoch visits every row of the largest table of each
    concept once; rows of the others are drawn at random.

    Args:
        rows: `image` and/or `audio` -> rows with text and unified concept ids.
        decoding: what the towers need.
        keyword_share: probability that the caption is a keyword of the concept instead of its text.
        seed: of all choices and of the samples' generators.

    Raises:
        DataError: no concept has a row in every table.
    """

    def __init__(self, rows: dict[str, Rows], decoding: Decoding, keyword_share: float = 0.0, seed: int = 0):
        self.seed = seed
        self.readers = {name: MediaReader(part, name, decoding) for name, part in rows.items()}
        self.captions = {name: Captions(part, keyword_share) for name, part in rows.items()}
        by_concept = {name: _rows_by_concept(part) for name, part in rows.items()}
        shared = sorted(set.intersection(*(set(places) for places in by_concept.values())))
        if not shared:
            raise DataError(
                f"no concept has a row in each of {sorted(rows)}: "
                + ", ".join(f"{name} has {len(places)} concepts" for name, places in by_concept.items())
                + "; check dataset.pair_by (concept_id, text or sample_id)"
            )
        self.places = [
            (concept, turn)
            for concept in shared
            for turn in range(max(len(places[concept]) for places in by_concept.values()))
        ]
        self.by_concept = by_concept

    def __len__(self) -> int:
        return len(self.places)

    def negative_captions(self, count: int, batch: int) -> NegativeCaptions | None:
        """Draws up to `count` captions beside a batch of `batch` samples; None where no concept is left over.

        The number is the same for every batch, so that ranks can gather what they embed.
        """
        name = next(iter(self.readers))
        by_concept = {concept: self.by_concept[name][concept] for concept in {concept for concept, _ in self.places}}
        count = min(count, len(by_concept) - batch)
        return NegativeCaptions(self.captions[name], by_concept, count) if count > 0 else None

    def __getitem__(self, index: Index) -> Sample:
        return _first_readable(index, self.seed, len(self), self._sample)

    def _sample(self, place: int, generator: np.random.Generator) -> Sample:
        concept, turn = self.places[place]
        rows = {name: self.by_concept[name][concept] for name in self.readers}
        most = max(len(choices) for choices in rows.values())
        chosen = {
            name: choices[turn] if len(choices) == most else choices[generator.integers(len(choices))]
            for name, choices in rows.items()
        }
        media = {name: _read(self.readers[name], row) for name, row in chosen.items()}
        first = next(iter(chosen))
        return Sample(
            sample_id="+".join(self.readers[name].sample_ids[row] for name, row in chosen.items()),
            concept_id=concept,
            generator=generator,
            image=media.get("image"),
            audio=media.get("audio"),
            text=self.captions[first].draw(chosen[first], generator),
        )


class ImageTextDataset(TriModalDataset):
    """Images with their captions; one sample a row and epoch.

    Args:
        rows: `image` -> rows with text.
        decoding: what the image tower needs.
        keyword_share: probability that the caption is a keyword instead of the text.
        seed: of all choices.
    """

    def __init__(self, rows: dict[str, Rows], decoding: Decoding, keyword_share: float = 0.0, seed: int = 0):
        super().__init__(_only(rows, "image"), decoding, keyword_share, seed)


class AudioTextDataset(TriModalDataset):
    """Recordings with their transcripts; one sample a row and epoch.

    Args:
        rows: `audio` -> rows with text.
        decoding: what the audio tower needs.
        keyword_share: probability that the caption is a keyword instead of the text.
        seed: of all choices.
    """

    def __init__(self, rows: dict[str, Rows], decoding: Decoding, keyword_share: float = 0.0, seed: int = 0):
        super().__init__(_only(rows, "audio"), decoding, keyword_share, seed)


@dataclass
class InstructionSample:
    """An instruction with its answer, and the media it speaks of.

    Attributes:
        sample_id: the row's name.
        instruction: what is asked.
        input: further text that belongs to the question, or "".
        output: the answer.
        image: `[3, side, side]` uint8.
        audio: `[samples]` float32 at 16 kHz.
        skipped: rows that could not be decoded and were replaced by this one.
    """

    sample_id: str
    instruction: str
    input: str
    output: str
    image: Tensor | None = None
    audio: Tensor | None = None
    skipped: list[SkippedRow] = field(default_factory=list)


class InstructionDataset(Dataset[InstructionSample]):
    """Instructions with answers, with an image or a clip where the row has one.

    Args:
        rows: columns `instruction`, `output`, and optionally `input`, `image`, `audio`.
        decoding: what the towers need.
        seed: of the choice of a replacement for a broken row.

    Raises:
        DataError: a column is missing.
    """

    def __init__(self, rows: Rows, decoding: Decoding, seed: int = 0):
        self.seed = seed
        self.sample_ids = rows.column("sample_id")
        self.instructions = rows.column("instruction")
        self.outputs = rows.column("output")
        self.inputs = rows.column("input") if "input" in rows.columns else [""] * len(rows)
        self.readers = {name: MediaReader(rows, name, decoding) for name in ("image", "audio") if name in rows.columns}
        self.has_media = {name: [bool(value) for value in rows.column(name)] for name in self.readers}

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: Index) -> InstructionSample:
        return _first_readable(index, self.seed, len(self), self._sample)

    def _sample(self, row: int, generator: np.random.Generator) -> InstructionSample:
        answer = self.outputs[row]
        if not answer or not answer.strip():
            raise _BrokenRow(self.sample_ids[row], "output: empty, so there is nothing to learn from")
        media = {name: _read(reader, row) for name, reader in self.readers.items() if self.has_media[name][row]}
        return InstructionSample(
            sample_id=self.sample_ids[row],
            instruction=self.instructions[row] or "",
            input=self.inputs[row] or "",
            output=answer,
            image=media.get("image"),
            audio=media.get("audio"),
        )


class _BrokenRow(Exception):
    def __init__(self, sample_id: str, reason: str):
        super().__init__(f"{sample_id}: {reason}")
        self.row = SkippedRow(sample_id, reason)


def _read(reader: MediaReader, row: int) -> Tensor:
    try:
        return reader.read(row)
    except Undecodable as error:
        raise _BrokenRow(reader.sample_ids[row], str(error)) from error


def _first_readable(index: Index, seed: int, count: int, sample: Callable[[int, np.random.Generator], Any]) -> Any:
    """The sample at `index`, or, if its row is broken, another drawn at random, so that batches keep their size.

    Ranks gather embeddings of equal batch sizes, so a broken row is replaced, and reported, not left out.
    """
    epoch, place = index
    generator = np.random.default_rng((seed, epoch, place))
    skipped: list[SkippedRow] = []
    for _ in range(20):
        try:
            found = sample(place, generator)
        except _BrokenRow as broken:
            skipped.append(broken.row)
            place = int(generator.integers(count))
        else:
            found.skipped = skipped
            return found
    listed = "\n".join(f"  {row.sample_id}: {row.reason}" for row in skipped)
    raise DataError(f"20 rows in a row cannot be decoded:\n{listed}")


def _rows_by_concept(rows: Rows) -> dict[int, list[int]]:
    places: dict[int, list[int]] = {}
    for row, concept in enumerate(rows.column("concept_id")):
        places.setdefault(concept, []).append(row)
    return places


def _only(rows: dict[str, Rows], modality: str) -> dict[str, Rows]:
    if modality not in rows:
        raise DataError(f"this set needs {modality} rows; the data set gives {sorted(rows)}")
    return {modality: rows[modality]}
