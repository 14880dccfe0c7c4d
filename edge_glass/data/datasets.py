"""Training sets: what one index gives, for every combination of modalities."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from edge_glass.data.rows import DataError, Rows
from edge_glass.data.samples import Decoding, Index, MediaReader, Sample, first_readable, read_media


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
        return first_readable(index, self.seed, len(self), lambda *where: self.sample(*where)[0])

    def sample(self, place: int, generator: np.random.Generator) -> tuple[Sample, int]:
        """The sample at a place of the set, and the row of the first table that its caption is of."""
        concept, turn = self.places[place]
        rows = {name: self.by_concept[name][concept] for name in self.readers}
        most = max(len(choices) for choices in rows.values())
        chosen = {
            name: choices[turn] if len(choices) == most else choices[generator.integers(len(choices))]
            for name, choices in rows.items()
        }
        media = {name: read_media(self.readers[name], row) for name, row in chosen.items()}
        first = next(iter(chosen))
        sample = Sample(
            sample_id="+".join(self.readers[name].sample_ids[row] for name, row in chosen.items()),
            concept_id=concept,
            generator=generator,
            image=media.get("image"),
            audio=media.get("audio"),
            text=self.captions[first].draw(chosen[first], generator),
        )
        return sample, chosen[first]


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


def _rows_by_concept(rows: Rows) -> dict[int, list[int]]:
    places: dict[int, list[int]] = {}
    for row, concept in enumerate(rows.column("concept_id")):
        places.setdefault(concept, []).append(row)
    return places


def _only(rows: dict[str, Rows], modality: str) -> dict[str, Rows]:
    if modality not in rows:
        raise DataError(f"this set needs {modality} rows; the data set gives {sorted(rows)}")
    return {modality: rows[modality]}
