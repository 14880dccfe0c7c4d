"""Samples to batches: which rows, in which order, put together how."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Sampler

from edge_glass.data.augment import ImageAugment
from edge_glass.data.batch import MODALITIES, AudioClips, Batch, Features, SkippedRow
from edge_glass.data.datasets import NegativeCaptions
from edge_glass.data.decode import Undecodable
from edge_glass.data.dialogue import Chat
from edge_glass.data.features import FeatureStore
from edge_glass.data.rows import DataError, Rows
from edge_glass.data.samples import Decoding, Index, MediaReader, Sample


class EpochBatches(Sampler[list[Index]]):
    """Batches of one rank, epoch after epoch without end.

    The order depends on seed and epoch only: a global batch is the same set of rows on one rank or on eight. The rows
    that do not fill a last global batch sit out that epoch.

    Args:
        count: rows in the set.
        batch_size: rows a batch on this rank.
        seed: of the order.
        rank: this rank.
        world_size: number of ranks.
        first: global batches to leave out at the start, for a run that goes on where another stopped.

    Raises:
        DataError: the set is smaller than one global batch.
    """

    def __init__(self, count: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1, first: int = 0):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world_size, self.first = rank, world_size, first
        if self.batches_per_epoch == 0:
            raise DataError(
                f"{count} rows do not fill one global batch of {batch_size * world_size}; lower "
                "optimization.batch_size, optimization.accumulation or launch.nproc_per_node"
            )

    @property
    def batches_per_epoch(self) -> int:
        return self.count // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[Index]]:
        epoch, start = divmod(self.first, self.batches_per_epoch)
        while True:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
            for batch in range(start, self.batches_per_epoch):
                begin = (batch * self.world_size + self.rank) * self.batch_size
                yield [(epoch, int(place)) for place in order[begin : begin + self.batch_size]]
            epoch, start = epoch + 1, 0


class Collate:
    """Samples to a Batch: pixels augmented and normalised, clips padded.

    Args:
        mean: of the image tower's normalisation, per channel, in 0..1.
        std: likewise.
        image_augment: training-time variation of images, or None.
        negative_captions: draws captions of further concepts for each training batch, or None.
        chat: the decoder's tokens, where there is a decoder.
        features: modality -> store, of what samples hold a place in instead of media.
    """

    def __init__(
        self,
        mean: list[float],
        std: list[float],
        image_augment: ImageAugment | None = None,
        negative_captions: NegativeCaptions | None = None,
        chat: Chat | None = None,
        features: Mapping[str, FeatureStore] | None = None,
    ):
        self.features = {} if features is None else features
        self.negative_captions = negative_captions
        self.chat = chat
        self.mean = torch.tensor(mean).view(1, 3, 1, 1)
        self.std = torch.tensor(std).view(1, 3, 1, 1)
        self.image_augment = image_augment

    def __call__(self, samples: list[Sample]) -> Batch:
        generators = [sample.generator for sample in samples if sample.image is not None]
        images = [sample.image for sample in samples if sample.image is not None]
        clips = [sample.audio for sample in samples if sample.audio is not None]
        texts = [sample.text for sample in samples if sample.text is not None]
        concepts = [sample.concept_id for sample in samples]
        captions = self.negative_captions
        extra_text, extra_ids = ([], None) if captions is None else captions.draw(concepts, samples[0].generator)
        exchanges = [sample.exchange for sample in samples if sample.exchange is not None]
        return Batch(
            sample_ids=[sample.sample_id for sample in samples],
            concept_ids=torch.tensor(concepts),
            image=self.pixels(images, generators) if images else None,
            audio=self.waveforms(clips) if clips else None,
            text=texts or None,
            rows=_partial_rows(samples),
            extra_text=extra_text,
            extra_ids=extra_ids,
            dialogue=self.chat.dialogue(exchanges) if self.chat is not None and exchanges else None,
            shown={
                name: torch.tensor([name in sample.shown for sample in samples])
                for name in dict.fromkeys(part for sample in samples for part in sample.shown)
            },
            skipped=[row for sample in samples for row in sample.skipped],
        )

    def pixels(
        self, images: Sequence[Tensor | int], generators: list[np.random.Generator] | None = None
    ) -> Tensor | Features:
        """`[batch, 3, side, side]` float32, normalised, or features; augmented when generators are given."""
        if places := _places(images):
            if self.image_augment is not None and generators is not None:
                variants = self.features["image"].variants
                drawn = [int(rng.integers(1, variants)) for rng in generators]
                places = [place + variant for place, variant in zip(places, drawn, strict=True)]
            return self.features["image"].gather(places)
        pixels = torch.stack([image for image in images if isinstance(image, Tensor)]).float() / 255
        if self.image_augment is not None and generators is not None:
            pixels = self.image_augment(pixels, generators)
        return (pixels - self.mean) / self.std

    def waveforms(self, clips: Sequence[Tensor | int]) -> AudioClips | Features:
        """Clips padded with zeros to the longest, or features."""
        if places := _places(clips):
            return self.features["audio"].gather(places)
        waves = [clip for clip in clips if isinstance(clip, Tensor)]
        return AudioClips(pad_sequence(waves, batch_first=True), torch.tensor([len(wave) for wave in waves]))


def _places(media: Sequence[Tensor | int]) -> list[int]:
    """The places in a store of features, if the samples hold those."""
    return [place for place in media if isinstance(place, int)]


def _partial_rows(samples: list[Sample]) -> dict[str, Tensor]:
    """Of modalities that only some samples have: which those are."""
    rows = {
        name: [row for row, sample in enumerate(samples) if getattr(sample, name) is not None] for name in MODALITIES
    }
    return {name: torch.tensor(part) for name, part in rows.items() if 0 < len(part) < len(samples)}


def training_loader(
    dataset, collate: Callable[[list], Any], batches: EpochBatches, workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    """Training batches without end, in the order of `batches`."""
    if workers:  # the text tower's tokenizer has threads of its own, which do not survive a fork
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return DataLoader(
        dataset,
        batch_sampler=batches,
        generator=torch.Generator(),  # else the loader would draw from the one whose state a resumed run takes up
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_as_worker if workers else None,
        # A rank that was itself forked from a server would start another server for its workers: slow, and children of
        # that server do not notice when the rank dies.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        persistent_workers=workers > 0,
        prefetch_factor=2 if workers else None,
    )


def _as_worker(_: int) -> None:
    torch.set_num_threads(1)  # workers beside a training process: two threads each would fight over the cores
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a cluster may tell every process; the training one saves and ends them


class EvaluationBatches:
    """Every row of a table once, in order, as batches of one modality; rows that cannot be decoded are left out.

    Args:
        rows: the table.
        modality: `image`, `audio` or `text`.
        decoding: what the tower needs.
        collate: normalisation; its augmentations are not used.
        batch_size: rows a batch.
    """

    def __init__(self, rows: Rows, modality: str, decoding: Decoding, collate: Collate, batch_size: int = 256):
        self.modality, self.collate, self.batch_size = modality, collate, batch_size
        self.sample_ids = rows.column("sample_id")
        self.concept_ids = rows.column("concept_id")
        self.captions = rows.column("text")
        self.places = {sample: place for place, sample in enumerate(self.sample_ids)}
        self.reader = None if modality == "text" else MediaReader(rows, modality, decoding)
        self.skipped: list[SkippedRow] = []

    def __len__(self) -> int:
        """Number of rows (not of batches)."""
        return len(self.sample_ids)

    def __iter__(self) -> Iterator[Batch]:
        self.skipped = []
        for start in range(0, len(self), self.batch_size):
            yield from self._batch(range(start, min(start + self.batch_size, len(self))))

    def _batch(self, rows: range) -> Iterator[Batch]:
        kept, media = [], []
        for row in rows:
            if self.reader is not None:
                try:
                    media.append(self.reader.read(row))
                except Undecodable as error:
                    self.skipped.append(SkippedRow(self.sample_ids[row], str(error)))
                    continue
            kept.append(row)
        if not kept:
            return
        batch = Batch([self.sample_ids[row] for row in kept], torch.tensor([self.concept_ids[row] for row in kept]))
        if self.modality == "image":
            batch.image = self.collate.pixels(media)
        elif self.modality == "audio":
            batch.audio = self.collate.waveforms(media)
        else:
            batch.text = [self.captions[row] for row in kept]
        yield batch
