"""Turn a run folder into a page and a table: everything is read from the folder alone."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_glass.errors import UserError
from edge_glass.evaluation.names import DIRECTIONS
from edge_glass.reports import figures
from edge_glass.reports.tables import AnswerResults, Results, markdown, number, other_table
from edge_glass.runs import CONFIG, SUMMARY, WANDB, read_json, read_metrics
from edge_glass.runs import METRICS as METRICS_FILE

REPORT = "report.md"
FIGURES = "figures"
# In the order of the page.
CAPTIONS = {
    "retrieval_gallery.png": "Queries drawn at random and what is nearest to them; right answers are ticked.",
    "answers.png": "Media drawn at random with their captions, and what the decoder says; right answers are ticked.",
    "recall_by_width.png": "Recall@1 when only the leading dimensions of the embedding are kept.",
    "accuracy_by_step.png": "Share of the test puzzles that are solved after so many supervision steps.",
    "puzzles.png": "The first test puzzles: clues bold, right cells green, wrong ones red.",
    "training_curves.png": "Loss of each step (thick: running mean) and Recall@1 during training.",
}
DEFINITIONS = """\
R@k: share of queries with a right answer among the k nearest; every gallery item of the query's concept is
right. A gallery holds one voice (one vendor) at a time, and figures are means over voices. Group R@1: the
nearest item is in the query's group of near-duplicates. Chance: a random ranking of the same gallery. Nearest
pixels, nearest log mel: the concept of the nearest training drawing or clip, untrained."""
ANSWER_DEFINITIONS = """\
The decoder sees a drawing, a clip, or both, and is asked for the caption. Exact match: the answer is a caption of
that concept. BLEU-4 and chrF: 0 to 100; CIDEr: 0 to 10; WER and CER: wrong words and characters over those spoken.
Loss: nats a token of the caption, with the sample's own prefix, with that of another sample, and with none."""
SKIPPED_SHOWN = 20


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


def _page(folder: Path, summary: Mapping[str, Any], missing: list[str]) -> str:
    """The page; adds to `missing` what it found no material for."""
    results = Results.of(summary)
    parts = [f"# {summary.get('name', folder.name)}", _facts(summary)]
    answers = AnswerResults.of(summary)
    parts += _retrieval_sections(results, _view_definitions(folder / CONFIG), missing, wanted=not answers.metrics)
    parts += _answer_sections(answers)
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
        "stopped_by": lambda value: "cut off by max_seconds" if value == "max_seconds" else f"ended by {value}",
    }
    clauses = [form(summary[key]) for key, form in formats.items() if summary.get(key) is not None]
    text = ", ".join(clauses) + "." if clauses else ""
    best = summary.get("best")
    if best:
        text += f" Best `{best['metric']}`: {number(best['metric'], best['value'])} at step {best['step']:,}."
    return text.strip()


def _retrieval_sections(
    results: Results, definitions: Mapping[str, Any], missing: list[str], wanted: bool
) -> list[str]:
    """A section a view; the first also by width, and with what the columns mean."""
    parts = []
    for view in results.views():
        header, rows = results.table(view)
        more, cells = results.size_columns(view)
        parts += [f"## Retrieval: {view}", _describe_view(definitions.get(view))]
        parts.append(markdown(header + more, [row + extra for row, extra in zip(rows, cells, strict=True)]))
        parts += [results.unanswerable(view), markdown(*results.voice_table(view))]
        if view == results.views()[0]:
            parts += [markdown(*results.width_table(view)), DEFINITIONS]
        absent = [f"{q} → {a}" for q, a in DIRECTIONS if (q, a) not in results.directions(view)]
        if absent:
            missing.append(f"{view}: no figures for {', '.join(absent)}")
    if not parts and wanted:
        missing.append(f"retrieval: {SUMMARY} holds no retrieval figure")
    return parts


def _answer_sections(answers: AnswerResults) -> list[str]:
    """A section a view of what a decoder said; the first also says what the columns mean."""
    parts = []
    for view in answers.views():
        parts += [f"## Answers: {view}", markdown(*answers.table(view)), markdown(*answers.prefix_table(view))]
        parts += [markdown(*answers.source_table(view)), ANSWER_DEFINITIONS if view == answers.views()[0] else ""]
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
    header, rows = other_table(summary)
    cells = [[f"`{name}`", value] for name, value in rows]
    return "## Other figures\n\n" + markdown(header, cells) if cells else ""


def _parameter_section(summary: Mapping[str, Any], missing: list[str]) -> str:
    if not summary.get("parameters"):
        missing.append(f"parameters: not in {SUMMARY}")
        return ""
    cells = [[row["part"], f"{row['total']:,}", f"{row['trainable']:,}"] for row in summary["parameters"]]
    return "## Parameters\n\n" + markdown(["part", "total", "trainable"], cells)


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
        markdown(["reason", "rows"], [[k, f"{n:,}"] for k, n in skipped.get("by_reason", {}).items()]),
        markdown(["sample", "reason"], rows[:SKIPPED_SHOWN]),
    ]
    if len(rows) > SKIPPED_SHOWN:
        parts.append(f"The other {len(rows) - SKIPPED_SHOWN:,} are in {SUMMARY}.")
    return "\n\n".join(part for part in parts if part)


def _version_section(summary: Mapping[str, Any]) -> str:
    facts = {"commit": summary.get("commit"), "data": summary.get("data_hash"), **summary.get("versions", {})}
    rows = [[name, f"`{value}`"] for name, value in facts.items() if value]
    return "## Versions\n\n" + markdown(["of", "version"], rows) if rows else ""


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


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
