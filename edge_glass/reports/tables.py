"""A run's figures as tables, for the page and for the terminal."""

import io
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from edge_glass.evaluation.names import ANSWER_METRICS, DIRECTIONS, METRICS, PREFIX_LOSSES, AnswerName, MetricName

if TYPE_CHECKING:
    from rich.table import Table

DIRECTION = "query → answer"
LESSER = (
    "R@10",
    "mAP",
    "group R@1",
    "median rank",
    "R@5",
    "CIDEr",
    "chrF",
    "ROUGE-L",
    "CER",
)  # what a narrow terminal leaves out, in this order


@dataclass
class Results:
    """The retrieval figures of a summary by their parsed names.

    Attributes:
        metrics: of the model.
        baselines: of what it is compared with; `of` in the name says which.
        sizes: `{view}/{query}_to_{answer}/queries`, `.../gallery`, `.../unanswerable`; may be empty.
        width: of the whole embedding, if the summary tells.
    """

    metrics: dict[MetricName, float]
    baselines: dict[MetricName, float]
    sizes: dict[str, int]
    width: int | None = None

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> Self:
        """The figures in the content of `summary.json`."""
        return cls(
            metrics=_parsed(summary.get("metrics", {})),
            baselines=_parsed(summary.get("baselines", {})),
            sizes=summary.get("sizes", {}),
            width=summary.get("embedding_width"),
        )

    def views(self) -> list[str]:
        """`test` first, `val` last, the others as they were measured."""
        views = dict.fromkeys(name.view for name in self.metrics)
        return sorted(views, key=lambda view: (view != "test", view == "val"))

    def directions(self, view: str) -> list[tuple[str, str]]:
        """The directions measured on a view."""
        return [(q, a) for q, a in DIRECTIONS if MetricName(view, q, a, "R@1") in self.metrics]

    def widths(self, view: str) -> list[int]:
        """The nested widths measured on a view, narrowest first."""
        return sorted({name.width for name in self.metrics if name.view == view and name.width})

    def table(self, view: str) -> tuple[list[str], list[list[str]]]:
        """Header and rows of a view: a row a direction; then R@1 of half the embedding, chance, baselines."""
        metrics = [metric for metric in METRICS if any(n.view == view and n.metric == metric for n in self.metrics)]
        widest = self.widths(view)[-1:]
        compared = dict.fromkeys(
            name.of for name in self.baselines if name.view == view and name.metric == "R@1" and name.of
        )
        compared = {name: None for name in compared if "/" not in name}  # one voice of a baseline has one
        header = [DIRECTION, *(metric.replace("_", " ") for metric in metrics)]
        header += [f"R@1 at {width}" for width in widest] + [name.replace("_", " ") for name in compared]
        rows = []
        for query, answer in self.directions(view):
            row = [f"{query} → {answer}"]
            row += [_cell(self.metrics, MetricName(view, query, answer, metric)) for metric in metrics]
            row += [_cell(self.metrics, MetricName(view, query, answer, "R@1", width)) for width in widest]
            row += [_cell(self.baselines, MetricName(view, query, answer, "R@1", of=name)) for name in compared]
            rows.append(row)
        return header, rows

    def size_columns(self, view: str) -> tuple[list[str], list[list[str]]]:
        """Header and rows of how many queries were asked and how many items were ranked, if that is known."""
        known = [self._size(view, direction, "queries") for direction in self.directions(view)]
        names = ["queries", "gallery"] if any(known) else []
        return names, [[f"{self._size(view, d, n):,}" for n in names] for d in self.directions(view)]

    def width_table(self, view: str) -> tuple[list[str], list[list[str]]]:
        """R@1 of every direction at every width, and the share that the widest nested width keeps."""
        widths = self.widths(view)
        rows = []
        for query, answer in self.directions(view) if widths else []:
            full = self.metrics[MetricName(view, query, answer, "R@1")]
            widest = self.metrics.get(MetricName(view, query, answer, "R@1", widths[-1]))
            row = [_cell(self.metrics, MetricName(view, query, answer, "R@1", width)) for width in [*widths, None]]
            kept = f"{widest / full:.1%}" if widest is not None and full else ""
            rows.append([f"{query} → {answer}", *row, kept])
        return [
            "R@1 at width",
            *map(str, widths),
            str(self.width or "full"),
            f"kept at {max(widths, default=0)}",
        ], rows

    def voice_table(self, view: str) -> tuple[list[str], list[list[str]]]:
        """R@1 of each voice on its own, where there are several."""
        spoken = [(query, answer) for query, answer in self.directions(view) if "audio" in (query, answer)]
        voices = dict.fromkeys(n.of for n in self.metrics if n.view == view and n.of and (n.query, n.answer) in spoken)
        rows = [
            [
                f"{q} → {a}",
                *(_cell(self.metrics, MetricName(view, q, a, "R@1", of=voice)) for voice in voices),
            ]
            for q, a in spoken
        ]
        return ["R@1 by voice", *map(str, voices)], rows if len(voices) > 1 else []

    def unanswerable(self, view: str) -> str:
        """A sentence on the queries that were left out, if any."""
        lost = {d: self._size(view, d, "unanswerable") for d in self.directions(view)}
        counts = ", ".join(f"{query} → {answer} {count:,}" for (query, answer), count in lost.items() if count)
        return f"Left out, as no gallery item shares the query's concept: {counts}." if counts else ""

    def _size(self, view: str, direction: tuple[str, str], what: str) -> int:
        return self.sizes.get(f"{view}/{direction[0]}_to_{direction[1]}/{what}", 0)


@dataclass
class AnswerResults:
    """The figures of a decoder's answers in a summary, by their parsed names.

    Attributes:
        metrics: of the model.
    """

    metrics: dict[AnswerName, float]

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> Self:
        """The figures in the content of `summary.json`."""
        values = summary.get("metrics", {}).items()
        return cls({name: value for text, value in values if (name := AnswerName.parse(text))})

    def views(self) -> list[str]:
        """`test` first, `val` last, the others as they were measured."""
        views = dict.fromkeys(name.view for name in self.metrics)
        return sorted(views, key=lambda view: (view != "test", view == "val"))

    def table(self, view: str) -> tuple[list[str], list[list[str]]]:
        """Header and rows of a view: a row for each set of media."""
        metrics = [m for m in ANSWER_METRICS if m not in PREFIX_LOSSES.values() and self._has(view, m)]
        header = ["media", *(metric.replace("_", " ") for metric in metrics)]
        return header, [[_media(shown), *self._cells(view, shown, metrics)] for shown in self._shown(view)]

    def prefix_table(self, view: str) -> tuple[list[str], list[list[str]]]:
        """The loss with the sample's own prefix, with another's, and with none."""
        losses = list(PREFIX_LOSSES.values())
        rows = [[_media(shown), *self._cells(view, shown, losses)] for shown in self._shown(view)]
        return ["loss of the caption", "own prefix", "another's", "none"], rows

    def source_table(self, view: str) -> tuple[list[str], list[list[str]]]:
        """Exact match and word error rate of each voice or vendor, where there are several."""
        names = [name for name in self.metrics if name.view == view and name.of]
        rows = [
            [
                _media(shown),
                source,
                *(_cell(self.metrics, AnswerName(view, shown, m, of=source)) for m in ("exact_match", "WER")),
            ]
            for shown, source in dict.fromkeys((name.shown, str(name.of)) for name in names)
        ]
        return ["media", "voice", "exact match", "WER"], rows

    def _shown(self, view: str) -> list[str]:
        return list(dict.fromkeys(name.shown for name in self.metrics if name.view == view))

    def _has(self, view: str, metric: str) -> bool:
        return any(name.view == view and name.metric == metric for name in self.metrics)

    def _cells(self, view: str, shown: str, metrics: Sequence[str]) -> list[str]:
        return [_cell(self.metrics, AnswerName(view, shown, metric)) for metric in metrics]


def terminal_table(summary: Mapping[str, Any], width: int | None = None) -> str:
    """The run's figures as tables for the terminal: retrieval and answers, a block a view, and whatever else there is.

    Args:
        summary: the content of `summary.json`.
        width: columns of the terminal; None asks it. Where a table does not fit, the lesser figures go.
    """
    retrieval, answers = Results.of(summary), AnswerResults.of(summary)
    tables = [
        {view: retrieval.table(view) for view in retrieval.views()},
        {view: answers.table(view) for view in answers.views()},
    ]
    others = other_table(summary)
    written = [_terminal(blocks, width) for blocks in tables if blocks]
    if not written and others[1]:
        written.append(_terminal({"": others}, width))
    return "\n".join(written) or "no figures in this run\n"


def other_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the figures whose names are of neither kind, so that none is lost."""
    values = {**summary.get("metrics", {}), **summary.get("baselines", {})}
    others = {name: v for name, v in values.items() if not (MetricName.parse(name) or AnswerName.parse(name))}
    return ["figure", "value"], [[name, f"{value:.4f}"] for name, value in others.items()]


def _terminal(blocks: Mapping[str, tuple[list[str], list[list[str]]]], width: int | None) -> str:
    from rich.console import Console

    width = width or shutil.get_terminal_size((110, 24)).columns
    console = Console(file=io.StringIO(), width=10_000)
    lines: list[str] = []
    for hidden in range(len(LESSER) + 1):
        with console.capture() as capture:
            console.print(_rich_table(blocks, LESSER[:hidden]))
        lines = [line.rstrip() for line in capture.get().splitlines()]
        if max(map(len, lines)) <= width:
            break
    return "\n".join(lines) + "\n"


def _rich_table(blocks: Mapping[str, tuple[list[str], list[list[str]]]], hidden: Sequence[str]) -> "Table":
    from rich import box
    from rich.table import Table

    columns = dict.fromkeys(name for header, _ in blocks.values() for name in header[1:] if name not in hidden)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(next(iter(blocks.values()))[0][0])
    for name in columns:
        table.add_column("\n".join(name.rsplit(" ", 1)), justify="right", vertical="bottom")
    for view, (header, rows) in blocks.items():
        if view:
            table.add_row(view)
        for row in rows:
            cells = dict(zip(header, row, strict=True))
            table.add_row(f"  {row[0]}" if view else row[0], *(cells.get(name, "") for name in columns))
        table.add_section()
    return table


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A pipe table, nothing if it has no rows; columns of numbers stand to the right."""
    body = [list(row) for row in rows]
    if not body:
        return ""
    right = [all(not row[i] or row[i][0].isdigit() for row in body) for i in range(len(header))]
    lines = [list(header), ["---:" if number else "---" for number in right], *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _parsed(values: Mapping[str, float]) -> dict[MetricName, float]:
    return {name: value for text, value in values.items() if (name := MetricName.parse(text))}


def _cell(values: Mapping[Any, float], name: MetricName | AnswerName) -> str:
    return number(name.metric, values[name]) if name in values else ""


def number(metric: str, value: float) -> str:
    """Ranks with one decimal, shares with three (four below 0.01, where chance lies)."""
    if "median_rank" in metric:
        return f"{value:,.1f}"
    return f"{value:.4f}" if 0 < abs(value) < 0.01 else f"{value:.3f}"


def _media(shown: str) -> str:
    return " + ".join(shown.split("_"))
