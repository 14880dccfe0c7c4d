"""One batch of samples: the tensors, texts and ids that every later stage reads."""

from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

MODALITIES = ("image", "audio", "text")


@dataclass
class AudioClips:
    """The waveforms of a batch.

    Attributes:
        waveform: `[batch, samples]` float32 at 16 kHz, zeros after a clip's end.
        lengths: `[batch]` int64, the number of real samples of each clip.
    """

    waveform: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return self.waveform.shape[0]

    def __getitem__(self, rows: slice) -> "AudioClips":
        return AudioClips(self.waveform[rows], self.lengths[rows])

    def to(self, device) -> "AudioClips":
        """The same clips on another device."""
        return AudioClips(self.waveform.to(device, non_blocking=True), self.lengths.to(device, non_blocking=True))


@dataclass
class SkippedRow:
    """A row that could not be decoded, and why."""

    sample_id: str
    reason: str


@dataclass
class Batch:
    """Samples of any subset of the modalities; row i of each part belongs to sample i.

    Attributes:
        sample_ids: names of the rows, for messages and reports.
        concept_ids: `[batch]` int64; rows with equal ids are positives of each other.
        image: `[batch, 3, height, width]` float32, normalised for the image tower.
        audio: the waveforms.
        text: one caption a sample.
        extra_text: captions of other concepts, negatives for every sample; they belong to no row.
        extra_ids: `[len(extra_text)]` int64, their concepts; None without them.
        skipped: rows that were met on the way to this batch and could not be decoded.
    """

    sample_ids: list[str]
    concept_ids: Tensor
    image: Tensor | None = None
    audio: AudioClips | None = None
    text: list[str] | None = None
    extra_text: list[str] = field(default_factory=list)
    extra_ids: Tensor | None = None
    skipped: list[SkippedRow] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def modalities(self) -> list[str]:
        """The modalities that this batch holds, in the order image, audio, text."""
        return [name for name in MODALITIES if getattr(self, name) is not None]

    def inputs(self, modality: str) -> Tensor | AudioClips | list[str]:
        """What the tower of `modality` reads.

        Raises:
            KeyError: the batch does not hold that modality.
        """
        if modality not in self.modalities():
            raise KeyError(f"this batch has no {modality!r}; it holds {self.modalities()}")
        if self.text is not None and modality == "text":
            return self.text + self.extra_text
        return getattr(self, modality)

    def ids(self) -> dict[str, Tensor]:
        """Modality -> the concept of each of its inputs, `[inputs]`; equal ids are positives of each other."""
        ids = dict.fromkeys(self.modalities(), self.concept_ids)
        if "text" in ids and self.extra_ids is not None:
            ids["text"] = torch.cat([self.concept_ids, self.extra_ids])
        return ids

    def to(self, device) -> "Batch":
        """The same batch with its tensors on another device."""
        return replace(
            self,
            concept_ids=self.concept_ids.to(device, non_blocking=True),
            image=None if self.image is None else self.image.to(device, non_blocking=True),
            audio=None if self.audio is None else self.audio.to(device),
            extra_ids=None if self.extra_ids is None else self.extra_ids.to(device, non_blocking=True),
        )

    def split(self, parts: int) -> list["Batch"]:
        """Equal, contiguous micro-batches; extra captions are shared out among them.

        Raises:
            ValueError: the batch does not divide into `parts`.
        """
        if parts < 1 or len(self) % parts:
            raise ValueError(f"a batch of {len(self)} samples does not divide into {parts} micro-batches")
        size = len(self) // parts
        slices = [slice(start, start + size) for start in range(0, len(self), size)]
        cuts = [len(self.extra_text) * part // parts for part in range(parts + 1)]
        extras = [slice(start, stop) for start, stop in pairwise(cuts)]
        return [
            Batch(
                sample_ids=self.sample_ids[rows],
                concept_ids=self.concept_ids[rows],
                image=None if self.image is None else self.image[rows],
                audio=None if self.audio is None else self.audio[rows],
                text=None if self.text is None else self.text[rows],
                extra_text=self.extra_text[extra],
                extra_ids=None if self.extra_ids is None else self.extra_ids[extra],
                skipped=self.skipped if rows.start == 0 else [],
            )
            for rows, extra in zip(slices, extras, strict=True)
        ]
