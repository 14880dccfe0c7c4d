"""Training sets for decoders: questions about captioned media, and instructions."""

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from edge_glass.data.datasets import NegativeCaptions, TriModalDataset
from edge_glass.data.dialogue import Chat, Exchange, Prompts, TooLong
from edge_glass.data.rows import DataError, Rows
from edge_glass.data.samples import BrokenRow, Decoding, Index, MediaReader, Sample, first_readable, read_media


class InstructionDataset(Dataset[Sample]):
    """Instructions with answers, with an image or a clip where the row has one.

    Args:
        rows: columns `instruction`, `output`, and optionally `input`, `system`, `image`, `audio`.
        decoding: what the towers need.
        chat: the decoder's tokens.
        media: the modalities that the decoder reads; others are left out.
        seed: of the choice of a replacement for a broken row.

    Raises:
        DataError: a column is missing.
    """

    def __init__(self, rows: Rows, decoding: Decoding, chat: Chat, media: Sequence[str] = (), seed: int = 0):
        self.seed = seed
        self.chat = chat
        self.sample_ids = rows.column("sample_id")
        self.instructions = rows.column("instruction")
        self.outputs = rows.column("output")
        self.inputs = rows.column("input") if "input" in rows.columns else [""] * len(rows)
        self.systems = rows.column("system") if "system" in rows.columns else [""] * len(rows)
        self.readers = {
            name: MediaReader(rows, name, decoding)
            for name in ("image", "audio")
            if name in rows.columns and name in media
        }
        self.has_media = {name: [bool(value) for value in rows.column(name)] for name in self.readers}

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: Index) -> Sample:
        return first_readable(index, self.seed, len(self), self.sample)

    def sample(self, row: int, generator: np.random.Generator) -> Sample:
        """The sample of a row; its concept is no other's, for an instruction is no caption."""
        answer = self.outputs[row]
        if not answer or not answer.strip():
            raise BrokenRow(self.sample_ids[row], "output: empty, so there is nothing to learn from")
        prompt = "\n\n".join(part for part in (self.instructions[row], self.inputs[row]) if part)
        exchange = _exchange(self.chat, self.sample_ids[row], prompt, answer, self.systems[row] or "")
        media = {name: read_media(reader, row) for name, reader in self.readers.items() if self.has_media[name][row]}
        return Sample(
            self.sample_ids[row],
            -1 - row,
            generator,
            image=media.get("image"),
            audio=media.get("audio"),
            exchange=exchange,
            shown=tuple(sorted(media)),
        )


class DialogueDataset(Dataset[Sample]):
    """Captioned media with a question about them, and, mixed in, instructions of another set.

    Args:
        captions: gives media with captions.
        prompts: what is asked.
        chat: the decoder's tokens.
        reads: the modalities that the decoder reads.
        dropout: probability that a modality of a sample is hidden from the decoder, one always being left.
        caption_share: probability that the decoder is shown nothing of a sample but its caption, whose embedding is
            near those of the media: words are learned faster from what has no noise.
        instructions: a further set, or None.
        share: of an epoch's samples that are instructions.
        seed: of all choices.

    Raises:
        DataError: a share outside 0..1, or one without instructions.
    """

    def __init__(
        self,
        captions: TriModalDataset,
        prompts: Prompts,
        chat: Chat,
        reads: Sequence[str],
        dropout: float = 0.0,
        caption_share: float = 0.0,
        instructions: InstructionDataset | None = None,
        share: float = 0.0,
        seed: int = 0,
    ):
        for key, value in (("fusion.modality_dropout", dropout), ("dataset.caption_share", caption_share)):
            if not 0 <= value <= 1:
                raise DataError(f"{key}={value}: give a probability in 0..1")
        if not 0 <= share < 1 or (share > 0) != (instructions is not None):
            raise DataError(
                f"dataset.instruction_share={share}: give a share of at least 0 and below 1, above 0 just where "
                "dataset.instructions names rows"
            )
        self.captions, self.prompts, self.chat, self.reads = captions, prompts, chat, reads
        self.dropout, self.caption_share, self.instructions, self.seed = dropout, caption_share, instructions, seed
        self.instructions_an_epoch = round(len(captions) * share / (1 - share))

    def __len__(self) -> int:
        return len(self.captions) + self.instructions_an_epoch

    def negative_captions(self, count: int, batch: int) -> NegativeCaptions | None:
        """See `TriModalDataset.negative_captions`."""
        return self.captions.negative_captions(count, batch)

    def __getitem__(self, index: Index) -> Sample:
        return first_readable(index, self.seed, len(self), self._sample)

    def _sample(self, place: int, generator: np.random.Generator) -> Sample:
        if place >= len(self.captions):
            assert self.instructions is not None
            return self.instructions.sample(int(generator.integers(len(self.instructions))), generator)
        sample, row = self.captions.sample(place, generator)
        present = [name for name in self.reads if getattr(sample, name) is not None]
        kept = [name for name in present if generator.random() >= self.dropout]
        sample.shown = tuple(kept or [present[generator.integers(len(present))]])
        if generator.random() < self.caption_share:
            sample.shown = ("text",)
        captions = next(iter(self.captions.captions.values()))
        ask, answer = self.prompts.draw(
            sample.shown,
            captions.texts[row],
            captions.keywords[row],
            self._other(sample.concept_id, generator),
            generator,
        )
        sample.exchange = _exchange(self.chat, sample.sample_id, ask, answer)
        return sample

    def _other(self, concept: int, generator: np.random.Generator) -> str | None:
        """A caption of another concept."""
        other, turn = self.captions.places[generator.integers(len(self.captions))]
        name, rows = next(iter(self.captions.by_concept.items()))
        return None if other == concept else self.captions.captions[name].texts[rows[other][turn % len(rows[other])]]


def _exchange(chat: Chat, sample_id: str, prompt: str, answer: str, system: str = "") -> Exchange:
    try:
        return chat.exchange(prompt, answer, system)
    except TooLong as error:
        raise BrokenRow(sample_id, f"text: {error}") from error
