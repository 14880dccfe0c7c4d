"""Turn a run folder into a page and a table: everything is read from the folder alone."""

import io
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from edge_glass.errors import UserError
from edge_glass.evaluation.names import DIRECTIONS, METRICS, MetricName
from edge_glass.reports import figures
from edge_glass.runs import CONFIG, SUMMARY, WANDB, read_json, read_metrics
from edge_glass.runs import METRICS as METRICS_FILE

if TYPE_CHECKING:
    from rich.table import Table

REPORT = "report.md"
FIGURES = "figures"
# In the order of the page.
CAPTIONS = {
    "retrieval_gallery.png": "Queries drawn at random and what is nearest to them; right answers are ticked.",
    "recall_by_width.png": "Recall@1 when only the leading dimensions of the embedding are kept.",
    "training_curves.png": "Loss of each step (thick: running mean) and Recall@1 during training.",
}
DEFINITIONS = """\
R@k: share of queries with a right answer among the k nearest; every gallery item of the query's concept is
right. A gallery holds one voice (one vendor) at a time, and figures are means over voices. Group R@1: the
nearest item is in the query's group of near-duplicates. Chance: a random ranking of the same gallery. Nearest
pixels, nearest log mel: the concept of the nearest training drawing or clip, untrained."""
DIRECTION = "query → answer"
LESSER = (
    "R@10",
    "mAP",
    "group R@1",
    "median rank",
    "R@5",
)  # what a narrow terminal leaves out, in this order
SKIPPED_SHOWN = 20


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


def write_report(run_dir: str | Path) -> Path:
    """Write `report.md` for a run, and the figures that its numbers allow.

    Reads `summary.json`, and `metrics.jsonl`, `config.yaml` and `figures/*.png` where they are there; what is
    missing is named at the end of the page.

    Args:
        run_dir: the run folder.

    Returns:
        The page's path.

    Raises:
        UserError: no `summary.json` in the folder.
    """
    folder = Path(run_dir)
    if not (folder / SUMMARY).is_file():
        raise UserError(
            f"{folder} has no {SUMMARY}, so there is nothing to report; give the folder of a run that has "
            f"ended, or end it with `python train.py training.resume={folder}`"
        )
    summary = read_json(folder / SUMMARY)
    missing = draw_figures(folder, summary)
    path = folder / REPORT
    path.write_text(_page(folder, summary, missing), encoding="utf-8")
    return path


def draw_figures(run_dir: str | Path, summary: Mapping[str, Any]) -> list[str]:
    """Draw `training_curves.png` and `recall_by_width.png` from a run's numbers.

    Args:
        run_dir: the run folder; `metrics.jsonl` is read from it, `figures/` is written in it.
        summary: the content of `summary.json`.

    Returns:
        One clause for each figure that could not be drawn, saying why.
    """
    folder, results = Path(run_dir), Results.of(summary)
    missing = []
    if not figures.training_curves(list(read_metrics(folder)), folder / FIGURES / "training_curves.png"):
        missing.append(f"training curves: no training step in {METRICS_FILE}")
    view = next(iter(results.views()), "test")
    path = folder / FIGURES / "recall_by_width.png"
    if not figures.recall_by_width(summary.get("metrics", {}), path, view, results.width):
        missing.append("recall by width: no nested width was evaluated")
    return missing


def terminal_table(summary: Mapping[str, Any], width: int | None = None) -> str:
    """The run's retrieval figures as one table for the terminal, a block a view.

    Args:
        summary: the content of `summary.json`.
        width: columns of the terminal; None asks it. Where the table does not fit, the lesser figures go.
    """
    from rich.console import Console

    results = Results.of(summary)
    blocks = {view: results.table(view) for view in results.views()}
    if not blocks:
        return "no retrieval figures in this run\n"
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
    table.add_column(DIRECTION)
    for name in columns:
        table.add_column("\n".join(name.rsplit(" ", 1)), justify="right", vertical="bottom")
    for view, (header, rows) in blocks.items():
        table.add_row(view)
        for row in rows:
            cells = dict(zip(header, row, strict=True))
            table.add_row(f"  {row[0]}", *(cells.get(name, "") for name in columns))
        table.add_section()
    return table


def _page(folder: Path, summary: Mapping[str, Any], missing: list[str]) -> str:
    """The page; adds to `missing` what it found no material for."""
    results = Results.of(summary)
    parts = [f"# {summary.get('name', folder.name)}", _facts(summary)]
    parts += _retrieval_sections(results, _view_definitions(folder / CONFIG), missing)
    parts += _figure_section(folder, missing)
    parts += [_other_section(summary), _parameter_section(summary, missing)]
    parts += [_skipped_section(summary, missing), _version_section(summary), _wandb_section(folder)]
    if (folder / CONFIG).is_file():
        parts += ["## Settings", f"```yaml\n{(folder / CONFIG).read_text(encoding='utf-8').strip()}\n```"]
    else:
        missing.append(f"settings: {CONFIG} is not there")
    if missing:
        parts += ["## Not in this report", "\n".join(f"- {item}" for item in missing)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(summary: Mapping[str, Any]) -> str:
    """How the run went, in two sentences."""
    formats = {
        "steps": lambda value: f"{value:,} steps",
        "seconds": _duration,
        "samples_per_second": lambda value: f"{value:,.0f} samples/s",
        "peak_memory_mb": lambda value: f"peak memory {value:,.0f} MB",
        "stopped_by": lambda value: f"ended by {value}",
    }
    clauses = [form(summary[key]) for key, form in formats.items() if summary.get(key) is not None]
    text = ", ".join(clauses) + "." if clauses else ""
    best = summary.get("best")
    if best:
        text += f" Best `{best['metric']}`: {_number(best['metric'], best['value'])} at step {best['step']:,}."
    return text.strip()


def _retrieval_sections(results: Results, definitions: Mapping[str, Any], missing: list[str]) -> list[str]:
    """A section a view; the first also by width, and with what the columns mean."""
    parts = []
    for view in results.views():
        header, rows = results.table(view)
        more, cells = results.size_columns(view)
        parts += [f"## Retrieval: {view}", _describe_view(definitions.get(view))]
        parts.append(_markdown(header + more, [row + extra for row, extra in zip(rows, cells, strict=True)]))
        parts += [results.unanswerable(view), _markdown(*results.voice_table(view))]
        if view == results.views()[0]:
            parts += [_markdown(*results.width_table(view)), DEFINITIONS]
        absent = [f"{q} → {a}" for q, a in DIRECTIONS if (q, a) not in results.directions(view)]
        if absent:
            missing.append(f"{view}: no figures for {', '.join(absent)}")
    if not parts:
        missing.append(f"retrieval: {SUMMARY} holds no retrieval figure")
    return parts


def _figure_section(folder: Path, missing: list[str]) -> list[str]:
    found = sorted(path.name for path in (folder / FIGURES).glob("*.png"))
    ordered = [name for name in CAPTIONS if name in found] + [name for name in found if name not in CAPTIONS]
    if "retrieval_gallery.png" not in found:
        missing.append(f"retrieval gallery: {FIGURES}/retrieval_gallery.png is not there")
    parts = ["## Figures"] if ordered else []
    for name in ordered:
        parts += [f"![{Path(name).stem.replace('_', ' ')}]({FIGURES}/{name})", CAPTIONS.get(name, "")]
    return parts


def _other_section(summary: Mapping[str, Any]) -> str:
    """Figures whose names are no retrieval metric's, so that none is lost."""
    values = {**summary.get("metrics", {}), **summary.get("baselines", {})}
    rows = [[f"`{name}`", f"{value:.4f}"] for name, value in values.items() if not MetricName.parse(name)]
    return "## Other figures\n\n" + _markdown(["figure", "value"], rows) if rows else ""


def _parameter_section(summary: Mapping[str, Any], missing: list[str]) -> str:
    if not summary.get("parameters"):
        missing.append(f"parameters: not in {SUMMARY}")
        return ""
    cells = [[row["part"], f"{row['total']:,}", f"{row['trainable']:,}"] for row in summary["parameters"]]
    return "## Parameters\n\n" + _markdown(["part", "total", "trainable"], cells)


def _skipped_section(summary: Mapping[str, Any], missing: list[str]) -> str:
    skipped = summary.get("skipped_rows")
    if skipped is None:
        missing.append(f"skipped rows: not in {SUMMARY}")
        return ""
    if not skipped["count"]:
        return "## Skipped rows\n\nNone: every row could be decoded."
    rows = [[f"`{row['sample_id']}`", row["reason"]] for row in skipped.get("rows", [])]
    parts = [
        f"## Skipped rows\n\n{skipped['count']:,} of {skipped['of']:,} rows could not be decoded.",
        _markdown(["reason", "rows"], [[k, f"{n:,}"] for k, n in skipped.get("by_reason", {}).items()]),
        _markdown(["sample", "reason"], rows[:SKIPPED_SHOWN]),
    ]
    if len(rows) > SKIPPED_SHOWN:
        parts.append(f"The other {len(rows) - SKIPPED_SHOWN:,} are in {SUMMARY}.")
    return "\n\n".join(part for part in parts if part)


def _version_section(summary: Mapping[str, Any]) -> str:
    facts = {"commit": summary.get("commit"), "data": summary.get("data_hash"), **summary.get("versions", {})}
    rows = [[name, f"`{value}`"] for name, value in facts.items() if value]
    return "## Versions\n\n" + _markdown(["of", "version"], rows) if rows else ""


def _wandb_section(folder: Path) -> str:
    """How figures that wandb's server has not got are sent there."""
    unsynced = read_json(folder / WANDB)["unsynced"] if (folder / WANDB).is_file() else []
    paths = " ".join(shlex.quote(str(folder / name)) for name in unsynced)
    return f"## wandb\n\nNot on the server yet. To send it there: `wandb sync {paths}`" if paths else ""


def _view_definitions(config_path: Path) -> dict[str, Any]:
    """The `views` node of a run's config, wherever it stands."""
    if not config_path.is_file():
        return {}
    from omegaconf import OmegaConf

    waiting: list[Any] = [OmegaConf.to_container(OmegaConf.load(config_path))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            if isinstance(node.get("views"), dict):
                return node["views"]
            waiting.extend(node.values())
    return {}


def _describe_view(definition: Any) -> str:
    """A view in words: "Queries: image (split test). Gallery: image (split test or unseen), text (all)."."""
    sentences = []
    for role in ("queries", "gallery"):
        parts = definition.get(role) if isinstance(definition, dict) else None
        if isinstance(parts, dict):
            words = ", ".join(f"{modality} ({_condition(rows)})" for modality, rows in parts.items())
            sentences.append(f"{role.capitalize()}: {words}.")
    return " ".join(sentences)


def _condition(condition: Any) -> str:
    """Which rows a config's condition keeps: `{split: [test, unseen]}` is "split test or unseen"."""
    if isinstance(condition, dict):
        return ", ".join(f"{column} {_condition(values)}" for column, values in condition.items())
    return " or ".join(map(str, condition)) if isinstance(condition, list) else str(condition)


def _parsed(values: Mapping[str, float]) -> dict[MetricName, float]:
    return {name: value for text, value in values.items() if (name := MetricName.parse(text))}


def _cell(values: Mapping[MetricName, float], name: MetricName) -> str:
    return _number(name.metric, values[name]) if name in values else ""


def _number(metric: str, value: float) -> str:
    """Ranks with one decimal, shares with three (four below 0.01, where chance lies)."""
    if "median_rank" in metric:
        return f"{value:,.1f}"
    return f"{value:.4f}" if 0 < abs(value) < 0.01 else f"{value:.3f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A pipe table, nothing if it has no rows; columns of numbers stand to the right."""
    body = [list(row) for row in rows]
    if not body:
        return ""
    right = [all(not row[i] or row[i][0].isdigit() for row in body) for i in range(len(header))]
    lines = [list(header), ["---:" if number else "---" for number in right], *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
