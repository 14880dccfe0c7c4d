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
