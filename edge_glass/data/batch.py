"""One batch of samples: the tensors, texts and ids that every later stage reads."""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

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
class Features:
    """What a frozen tower makes of the inputs of a batch, computed earlier, in the place of those inputs.

    Attributes:
        values: `[batch, tokens, dim]` in the type they are stored in.
        mask: `[batch, tokens]` bool, True for real tokens.
    """

    values: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, rows: slice) -> "Features":
        return Features(self.values[rows], self.mask[rows])

    def to(self, device) -> "Features":
        """The same features on another device."""
        return Features(self.values.to(device, non_blocking=True), self.mask.to(device, non_blocking=True))


@dataclass
class Dialogue:
    """Prompts, with or without answers, as a decoder's token ids; a row a sample.

    Attributes:
        ids: `[batch, tokens]` int64.
        real: `[batch, tokens]` bool, False for padding.
        answer: `[batch, tokens]` bool, True for the tokens that carry loss: the answer and the end after it.
    """

    ids: Tensor
    real: Tensor
    answer: Tensor

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> "Dialogue":
        return Dialogue(self.ids[rows], self.real[rows], self.answer[rows])

    def to(self, device) -> "Dialogue":
        """The same tokens on another device."""
        return Dialogue(*(part.to(device, non_blocking=True) for part in (self.ids, self.real, self.answer)))


@dataclass
class SkippedRow:
    """A row that could not be decoded, and why."""

    sample_id: str
    reason: str


@dataclass
class Batch:
    """Samples of any subset of the modalities.

    Row i of each modality belongs to sample i, unless `rows` says otherwise: a modality that some samples lack holds
    those of the others only.

    Attributes:
        sample_ids: names of the rows, for messages and reports.
        concept_ids: `[batch]` int64; rows with equal ids are positives of each other.
        image: `[images, 3, height, width]` float32, normalised for the image tower, or its features.
        audio: the waveforms, or their features.
        text: captions.
        rows: modality -> `[inputs]` int64, rising: the samples that its inputs belong to; not there: all of them.
        extra_text: captions of other concepts, negatives for every sample; they belong to no row.
        extra_ids: `[len(extra_text)]` int64, their concepts; None without them.
        dialogue: what a decoder is asked about each sample, and the answers; None without a decoder.
        shown: modality -> `[batch]` bool, the samples whose modality the decoder sees; not there: none.
        skipped: rows that were met on the way to this batch and could not be decoded.
    """

    sample_ids: list[str]
    concept_ids: Tensor
    image: Tensor | Features | None = None
    audio: AudioClips | Features | None = None
    text: list[str] | None = None
    rows: dict[str, Tensor] = field(default_factory=dict)
    extra_text: list[str] = field(default_factory=list)
    extra_ids: Tensor | None = None
    dialogue: Dialogue | None = None
    shown: dict[str, Tensor] = field(default_factory=dict)
    skipped: list[SkippedRow] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def modalities(self) -> list[str]:
        """The modalities that this batch holds, in the order image, audio, text."""
        return [name for name in MODALITIES if getattr(self, name) is not None]

    def inputs(self, modality: str) -> Tensor | AudioClips | Features | list[str]:
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
        ids = {
            name: self.concept_ids[self.rows[name]] if name in self.rows else self.concept_ids
            for name in self.modalities()
        }
        if "text" in ids and self.extra_ids is not None:
            ids["text"] = torch.cat([ids["text"], self.extra_ids])
        return ids

    def to(self, device) -> "Batch":
        """The same batch with its tensors on another device."""
        return replace(
            self,
            concept_ids=self.concept_ids.to(device, non_blocking=True),
            image=_on(self.image, device),
            audio=_on(self.audio, device),
            rows={name: rows.to(device, non_blocking=True) for name, rows in self.rows.items()},
            dialogue=None if self.dialogue is None else self.dialogue.to(device),
            shown={name: shown.to(device, non_blocking=True) for name, shown in self.shown.items()},
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
        return [self._part(rows, extra) for rows, extra in zip(slices, extras, strict=True)]

    def _part(self, samples: slice, extra: slice) -> "Batch":
        inputs = dict.fromkeys(MODALITIES, samples)
        for name, rows in self.rows.items():  # rising, so those of the part lie side by side
            begin, end = torch.searchsorted(rows, torch.tensor([samples.start, samples.stop], device=rows.device))
            inputs[name] = slice(int(begin), int(end))
        return Batch(
            sample_ids=self.sample_ids[samples],
            concept_ids=self.concept_ids[samples],
            image=None if self.image is None else self.image[inputs["image"]],
            audio=None if self.audio is None else self.audio[inputs["audio"]],
            text=None if self.text is None else self.text[inputs["text"]],
            rows={name: rows[inputs[name]] - samples.start for name, rows in self.rows.items()},
            extra_text=self.extra_text[extra],
            extra_ids=None if self.extra_ids is None else self.extra_ids[extra],
            dialogue=None if self.dialogue is None else self.dialogue[samples],
            shown={name: shown[samples] for name, shown in self.shown.items()},
            skipped=self.skipped if samples.start == 0 else [],
        )


def _on(part: Any, device) -> Any:
    """A part of a batch on another device; None stays None."""
    if isinstance(part, Tensor):
        return part.to(device, non_blocking=True)
    return None if part is None else part.to(device)
