"""The names of evaluation figures, written and read in one place."""

import re
from dataclasses import dataclass
from typing import Self

MODALITIES = ("image", "audio", "text")
DIRECTIONS = (
    ("image", "text"),
    ("text", "image"),
    ("audio", "text"),
    ("text", "audio"),
    ("image", "audio"),
    ("audio", "image"),
)
RECALL_AT = (1, 5, 10)
METRICS = (*(f"R@{k}" for k in RECALL_AT), "median_rank", "mAP", "group_R@1")

_NAME = re.compile(
    rf"(?P<view>[^/]+)/(?P<query>{'|'.join(MODALITIES)})_to_(?P<answer>{'|'.join(MODALITIES)})"
    rf"/(?P<metric>{'|'.join(METRICS)})(?:@(?P<width>\d+))?(?:/(?P<of>.+))?"
)


@dataclass(frozen=True)
class MetricName:
    """One figure's name, such as `test/image_to_text/R@1@128` or `test/audio_to_text/R@1/flite_awb`.

    Attributes:
        view: which queries and galleries, say `test`.
        query: modality of the queries.
        answer: modality of the gallery.
        metric: `R@1`, `R@5`, `R@10`, `median_rank`, `mAP` or `group_R@1`.
        width: leading embedding dimensions used; None is the full width.
        of: the voice (or vendor) the figure is of, or the name of a baseline; None is the mean over voices.
    """

    view: str
    query: str
    answer: str
    metric: str
    width: int | None = None
    of: str | None = None

    def __str__(self) -> str:
        width = "" if self.width is None else f"@{self.width}"
        of = "" if self.of is None else f"/{self.of}"
        return f"{self.view}/{self.query}_to_{self.answer}/{self.metric}{width}{of}"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """The parts of a name, or None for a figure that is no retrieval metric (`loss`, `lr`)."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        parts = match.groupdict()
        width = parts.pop("width")
        return cls(**parts, width=None if width is None else int(width))


TEXT_METRICS = ("exact_match", "BLEU-4", "ROUGE-L", "CIDEr", "chrF")
SPEECH_METRICS = ("WER", "CER")
# The prefix that a decoder's answer is judged with -> the name of the loss.
PREFIX_LOSSES = {"true": "loss", "shuffled": "loss_shuffled_prefix", "none": "loss_without_prefix"}
ANSWER_METRICS = (*TEXT_METRICS, *SPEECH_METRICS, "perplexity", *PREFIX_LOSSES.values())

_MEDIA = "|".join(MODALITIES)
_ANSWER = re.compile(
    rf"(?P<view>[^/]+)/(?P<shown>(?:{_MEDIA})(?:_(?:{_MEDIA}))*)_caption"
    rf"/(?P<metric>{'|'.join(map(re.escape, sorted(ANSWER_METRICS, key=len, reverse=True)))})(?:/(?P<of>.+))?"
)


@dataclass(frozen=True)
class AnswerName:
    """The name of one figure, such as `test/image_caption/exact_match` or `test/audio_caption/WER/flite_awb`.

    Attributes:
        view: whose rows were asked about.
        shown: the media that the decoder saw, say `image_audio`.
        metric: one of `ANSWER_METRICS`.
        of: the voice or vendor that the figure is of; None is all together.
    """

    view: str
    shown: str
    metric: str
    of: str | None = None

    def __str__(self) -> str:
        return f"{self.view}/{self.shown}_caption/{self.metric}" + ("" if self.of is None else f"/{self.of}")

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """The parts of a name, or None for a figure of another kind."""
        match = _ANSWER.fullmatch(name)
        return cls(**match.groupdict()) if match else None
