"""What a decoder answers about the rows of a view, and how far it needs its prefix for that."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from edge_glass.data.batch import Batch, Dialogue, SkippedRow
from edge_glass.data.decode import Undecodable
from edge_glass.data.dialogue import Chat, Exchange, Prompts, TooLong
from edge_glass.decoders.decoder import AnswerLoss, Sampling
from edge_glass.encoders.tokens import Tokens
from edge_glass.evaluation.names import PREFIX_LOSSES, AnswerName
from edge_glass.evaluation.text import caption_metrics, speech_metrics
from edge_glass.evaluation.views import Views
from edge_glass.models.fusion import Fused


class Answers(Protocol):
    """What an interview needs of a task."""

    training: bool

    def tokens(self, batch: Batch, all_of_them: bool) -> dict[str, Tokens]: ...
    def prefix(self, batch: Batch, tokens: dict[str, Tokens]) -> Fused: ...
    def decoder(self, prefix: Tokens, text: Dialogue) -> AnswerLoss: ...
    def train(self, mode: bool = True) -> object: ...


@dataclass
class Answer:
    """What was asked about a sample, what was said, and what would have been right.

    Attributes:
        places: modality -> the sample's row among the view's batches of that modality.
        source: its voice or vendor, `""` where there is none.
        prompt: the question.
        said: the answer.
        references: right answers; the first is the sample's own caption.
        nll: prefix (`true`, `shuffled`, `none`) -> negative log-likelihood of that caption, in nats.
        tokens: of that caption, with its end.
    """

    places: dict[str, int]
    source: str
    prompt: str
    said: str
    references: list[str]
    nll: dict[str, float]
    tokens: int


class Interview:
    """Asks a decoder about the rows that ask in each view: each modality that it reads by itself, and all together.

    Args:
        views: the rows.
        prompts: the first template of each set of media is asked.
        chat: the decoder's tokens.
        reads: the modalities that the decoder reads.
        sampling: how answers are drawn.
        most: rows of each view and set of media, evenly spread; None: all.
        batch_size: samples at a time.
    """

    def __init__(
        self,
        views: Views,
        prompts: Prompts,
        chat: Chat,
        reads: Sequence[str],
        sampling: Sampling,
        most: int | None = None,
        batch_size: int = 128,
    ):
        self.views, self.prompts, self.chat, self.sampling = views, prompts, chat, sampling
        self.most, self.batch_size = most, batch_size
        single = [(name,) for name in reads]
        self.sets = [*single, tuple(reads)] if len(reads) > 1 else single
        captions: dict[int, dict[str, None]] = {}
        texts = views.tables["text"]
        for concept, text in zip(texts.column("concept_id"), texts.column("text"), strict=True):
            captions.setdefault(concept, {})[text] = None
        self.captions = captions

    def answers(self, task: Any, device: torch.device | str) -> dict[tuple[str, str], list[Answer]]:
        """View and set of media -> answers; rows that cannot be decoded are added to `views.skipped`."""
        was_training = task.training
        task.train(False)
        try:
            with torch.no_grad():
                return {
                    (view, "_".join(shown)): found
                    for view in self.views.views
                    for shown in self.sets
                    if (found := self._about(task, view, shown, device))
                }
        finally:
            task.train(was_training)

    def figures(self, answers: Mapping[tuple[str, str], list[Answer]]) -> dict[str, float]:
        """Figure -> value of each view and set of media, and `{view}/mean/exact_match` over the sets."""
        figures: dict[str, float] = {}
        for (view, shown), found in answers.items():
            figures |= {
                str(AnswerName(view, shown, metric)): value for metric, value in _measured(shown, found).items()
            }
            by_source: dict[str, list[Answer]] = {}
            for answer in found:
                by_source.setdefault(answer.source, []).append(answer)
            for source, part in by_source.items() if len(by_source) > 1 else ():
                measured = _measured(shown, part)
                for metric in ("exact_match", "WER"):
                    if metric in measured:
                        figures[str(AnswerName(view, shown, metric, of=source))] = measured[metric]
        for view in dict.fromkeys(view for view, _ in answers):
            exact = [figures[str(AnswerName(view, shown, "exact_match"))] for v, shown in answers if v == view]
            figures[f"{view}/mean/exact_match"] = sum(exact) / len(exact)
        return figures

    def _about(self, task: Answers, view: str, shown: tuple[str, ...], device: torch.device | str) -> list[Answer]:
        ask = self.prompts.of(shown)[0]
        found: list[Answer] = []
        samples = self._samples(view, shown)
        for start in range(0, len(samples), self.batch_size):
            found += self._batch(task, samples[start : start + self.batch_size], shown, ask.ask, ask.answer, device)
        return found

    def _samples(self, view: str, shown: tuple[str, ...]) -> list[dict[str, int]]:
        """Modality -> row, of each sample that a view asks about; of several modalities those of one concept."""
        queries = self.views.views[view]["queries"]
        if any(name not in queries or name not in self.views.batches for name in shown):
            return []
        first, *others = (self._by_concept(name, queries[name]) for name in shown)
        samples = []
        for concept, rows in first.items():
            for turn, row in enumerate(rows):
                if all(concept in other for other in others):
                    rest = [other[concept][turn % len(other[concept])] for other in others]
                    samples.append(dict(zip(shown, [row, *rest], strict=True)))
        most = len(samples) if self.most is None else min(self.most, len(samples))
        return [samples[place * len(samples) // most] for place in range(most)]

    def _by_concept(self, modality: str, conditions: Mapping[str, Any]) -> dict[int, list[int]]:
        batches = self.views.batches[modality]
        wanted = self.views.tables[modality].where(dict(conditions)).column("sample_id")
        rows: dict[int, list[int]] = {}
        for sample in wanted:
            place = batches.places[sample]
            rows.setdefault(batches.concept_ids[place], []).append(place)
        return rows

    def _batch(
        self,
        task: Answers,
        samples: list[dict[str, int]],
        shown: tuple[str, ...],
        ask: str,
        answer: str,
        device: torch.device | str,
    ) -> list[Answer]:
        kept, exchanges, prompts = [], [], []
        media: dict[str, list[Tensor | int]] = {name: [] for name in shown}
        for sample, caption in ((sample, self._caption(sample, shown[0])) for sample in samples):
            text = {"text": caption, "keyword": caption, "other": ""}
            try:
                read = {name: self._read(name, sample[name]) for name in shown}
                exchanges.append(self.chat.exchange(ask.format(**text), answer.format(**text)))
            except (Undecodable, TooLong) as error:
                name = self.views.batches[shown[0]].sample_ids[sample[shown[0]]]
                self.views.skipped[name] = SkippedRow(name, str(error))
                continue
            prompts.append(ask.format(**text))
            kept.append(sample)
            for name, one in read.items():
                media[name].append(one)
        if not kept:
            return []
        batch = self._media_batch(kept, media, shown).to(device)
        prefix = task.prefix(batch, task.tokens(batch, False)).prefix
        said = task.decoder.generate(  # type: ignore[attr-defined]
            prefix, self.chat.dialogue([Exchange(e.prompt) for e in exchanges], left=True).to(device), self.sampling
        )
        dialogue = self.chat.dialogue(exchanges).to(device)
        nll = {name: task.decoder(part, dialogue).nll.tolist() for name, part in _prefixes(prefix)}
        return [
            Answer(
                places=sample,
                source=self._source(shown, sample),
                prompt=prompts[i],
                said=said[i],
                references=self._references(sample, shown[0]),
                nll={name: values[i] for name, values in nll.items()},
                tokens=len(exchanges[i].answer),
            )
            for i, sample in enumerate(kept)
        ]

    def _media_batch(
        self, samples: list[dict[str, int]], media: dict[str, list[Tensor | int]], shown: tuple[str, ...]
    ) -> Batch:
        batches, collate = self.views.batches[shown[0]], self.views.batches[shown[0]].collate
        rows = [sample[shown[0]] for sample in samples]
        return Batch(
            sample_ids=[batches.sample_ids[row] for row in rows],
            concept_ids=torch.tensor([batches.concept_ids[row] for row in rows]),
            image=collate.pixels(media["image"]) if "image" in shown else None,
            audio=collate.waveforms(media["audio"]) if "audio" in shown else None,
            shown={name: torch.ones(len(rows), dtype=torch.bool) for name in shown},
        )

    def _read(self, modality: str, row: int) -> Tensor | int:
        reader = self.views.batches[modality].reader
        assert reader is not None
        return reader.read(row)

    def _caption(self, sample: dict[str, int], modality: str) -> str:
        return self.views.batches[modality].captions[sample[modality]]

    def _references(self, sample: dict[str, int], modality: str) -> list[str]:
        own = self._caption(sample, modality)
        concept = self.views.batches[modality].concept_ids[sample[modality]]
        return [own, *(text for text in self.captions.get(concept, {}) if text != own)]

    def _source(self, shown: tuple[str, ...], sample: dict[str, int]) -> str:
        """The voice, if there is one, else the vendor."""
        name = shown[-1]
        return self.views.sources.get(self.views.batches[name].sample_ids[sample[name]], "")


def _prefixes(prefix: Tokens) -> Iterator[tuple[str, Tokens]]:
    """The prefix of each sample; that of another (half the batch away, for neighbours may be alike); none."""
    half = max(len(prefix.mask) // 2, 1)
    yield "true", prefix
    yield "shuffled", Tokens(prefix.tokens.roll(half, 0), prefix.mask.roll(half, 0))
    yield "none", Tokens(prefix.tokens, torch.zeros_like(prefix.mask))


def _measured(shown: str, answers: list[Answer]) -> dict[str, float]:
    said, references = [answer.said for answer in answers], [answer.references for answer in answers]
    figures = caption_metrics(said, references)
    if shown == "audio":
        figures |= speech_metrics(said, [texts[0] for texts in references])
    tokens = sum(answer.tokens for answer in answers)
    losses = {name: sum(answer.nll[prefix] for answer in answers) / tokens for prefix, name in PREFIX_LOSSES.items()}
    return figures | losses | {"perplexity": math.exp(min(losses["loss"], 700.0))}
