"""Pictures of a run: training curves, recall by embedding width, and what was found for real queries.

All are PNG files in one style. Colours are those of Okabe and Ito (2008), which colour-blind readers can tell
apart; every line also has its own marker, and right answers have a tick beside their colour.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_glass.evaluation.names import DIRECTIONS, MetricName

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
INK, MUTED, FAINT = "#222222", "#6B6B6B", "#DDDDDD"
COLOURS = dict(zip(DIRECTIONS, (BLUE, SKY, VERMILION, ORANGE, GREEN, PURPLE), strict=True))
MARKERS = dict(zip(DIRECTIONS, "oosD^v", strict=True))
STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#EBEBEB",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
}
DPI = 150
ANSWER_COLUMNS = 8  # cards in a row of media and answers


@dataclass
class Card:
    """One thing to show: its name and, if it has one, its drawing or its recording.

    Attributes:
        name: what it is called.
        picture: `[3, height, width]` uint8.
        waveform: `[samples]` float at 16 kHz, drawn as a mel spectrogram.
    """

    name: str
    picture: np.ndarray | None = None
    waveform: np.ndarray | None = None


@dataclass
class Found:
    """A query, its nearest gallery items, and which of them are right."""

    query: Card
    answers: list[Card]
    right: list[bool]


@dataclass
class Said:
    """Media, what was said of them, what would have been right, and whether it was."""

    media: list[Card]
    answer: str
    reference: str
    right: bool


def training_curves(rows: Sequence[Mapping[str, Any]], path: str | Path) -> bool:
    """Draw the loss of each step and the validation recall beside it.

    Args:
        rows: of `metrics.jsonl`.
        path: the PNG to write.

    Returns:
        Whether there was anything to draw.
    """
    train = [row for row in rows if row.get("kind") == "train" and "loss" in row]
    view, curves = _validation_curves(rows)
    panels = [bool(train), bool(curves)]
    if not any(panels):
        return False
    with _styled():
        figure, axes = _figure((0.4 + 4.8 * sum(panels), 3.8), columns=sum(panels))
        if train:
            losses = np.array([row["loss"] for row in train], dtype=float)
            steps = [row["step"] for row in train]
            axes[0].plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.8)
            axes[0].plot(steps, _smooth(losses), color=BLUE, linewidth=2)
            axes[0].set(title="Training loss", xlabel="step", ylabel="loss")
        if curves:
            for direction, points in curves.items():
                axes[-1].plot(*zip(*points, strict=True), **_line(*direction))
            axes[-1].set(title=f"Recall@1 during training ({view})", xlabel="step", ylabel="R@1", ylim=(0, 1))
            axes[-1].legend(fontsize=8.5, ncols=2, loc="best")
        _save(figure, path)
    return True


def recall_by_width(
    metrics: Mapping[str, float], path: str | Path, view: str = "test", full_width: int | None = None
) -> bool:
    """Draw Recall@1 of every direction against the embedding's width.

    Args:
        metrics: of `summary.json`.
        path: the PNG to write.
        view: which queries and galleries.
        full_width: of the embedding. Metric names tell the narrower widths only; when it is not known, the
            full width is placed at twice the widest of them and called "full".

    Returns:
        Whether there was anything to draw: a view with more than one width.
    """
    found = [(name, value) for text, value in metrics.items() if (name := MetricName.parse(text))]
    found = [(n, value) for n, value in found if n.view == view and n.metric == "R@1" and n.of is None]
    full = full_width or 2 * max((n.width for n, _ in found if n.width), default=0)
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for name, value in found:
        curves.setdefault((name.query, name.answer), []).append((name.width or full, value))
    curves = {direction: sorted(curves[direction]) for direction in DIRECTIONS if len(curves.get(direction, [])) > 1}
    if not curves:
        return False
    with _styled():
        figure, (axes,) = _figure((6.4, 4.2))
        axes.set_xscale("log", base=2)
        for direction, points in curves.items():
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, **_line(*direction))
        widths = sorted({width for points in curves.values() for width, _ in points})
        axes.set_xticks(widths, [str(width) if width < full or full_width else "full" for width in widths])
        axes.minorticks_off()
        axes.set(title=f"Recall@1 by embedding width ({view})", xlabel="leading dimensions used", ylabel="R@1")
        axes.set_ylim(0, 1)
        axes.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
        _save(figure, path)
    return True


def retrieval_gallery(sections: Mapping[str, Sequence[Found]], path: str | Path, title: str = "") -> bool:
    """Draw queries on the left and the nearest items to their right, right ones framed in green with a tick.

    Args:
        sections: heading (say "drawing → name") -> queries with their answers.
        path: the PNG to write.
        title: above everything.

    Returns:
        Whether there was anything to draw.
    """
    rows = {
        heading: [[_Cell(f.query), *_cells(f.answers, f.right)] for f in found] for heading, found in sections.items()
    }
    return _draw_rows(rows, path, title)


def answer_gallery(sections: Mapping[str, Sequence[Said]], path: str | Path, title: str = "") -> bool:
    """Draw media with what was said of them beside; right answers are framed in green with a tick.

    Args:
        sections: heading (say "drawing") -> media with their answers.
        path: the PNG to write.
        title: above everything.

    Returns:
        Whether there was anything to draw.
    """
    rows: dict[str, list[list[_Cell]]] = {}
    for heading, found in sections.items():
        one = [[*(_Cell(card) for card in said.media), *_cells([Card(said.answer)], [said.right])] for said in found]
        beside = max(1, ANSWER_COLUMNS // max(map(len, one), default=1))
        rows[heading] = [
            [cell for cells in one[start : start + beside] for cell in cells] for start in range(0, len(one), beside)
        ]
    return _draw_rows(rows, path, title)


def accuracy_by_step(curve: Mapping[int, float], trained: int, path: str | Path) -> bool:
    """Draw the share of right answers after each supervision step.

    Args:
        curve: step -> share.
        trained: steps in training; those after it are marked.
        path: the PNG to write.

    Returns:
        Whether there was anything to draw.
    """
    if not curve:
        return False
    with _styled():
        from matplotlib.ticker import MaxNLocator

        figure, (axes,) = _figure((6.4, 3.6))
        axes.plot(list(curve), list(curve.values()), color=BLUE, marker="o", markersize=4.5, linewidth=1.8)
        if trained < max(curve):
            axes.axvspan(trained + 0.5, max(curve) + 0.5, color=FAINT, alpha=0.5, linewidth=0)
            axes.text(trained + 0.6, 0.03, "more steps than in training", fontsize=8.5, color=MUTED)
        axes.set(title="Puzzles solved by supervision step", xlabel="supervision steps", ylabel="exact match")
        axes.set(ylim=(0, 1), xlim=(0.5, max(curve) + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _save(figure, path)
    return True


def grouped_points(groups: Mapping[str, Sequence[float]], path: str | Path, title: str, label: str) -> bool:
    """Draw a few measurements (seeds, say) of each of several things as points with their mean.

    Args:
        groups: name -> values in 0..1.
        path: the PNG to write.
        title: above everything.
        label: what was measured.

    Returns:
        Whether there was anything to draw.
    """
    if not groups:
        return False
    with _styled():
        figure, (axes,) = _figure((6.4, 0.9 + 0.5 * len(groups)))
        for place, values in enumerate(groups.values()):
            axes.plot(values, [place] * len(values), "o", color=BLUE, markersize=5, alpha=0.6)
            mean = sum(values) / len(values)
            axes.plot([mean, mean], [place - 0.25, place + 0.25], color=INK, linewidth=2)
            axes.text(mean, place - 0.3, f"{mean:.2f}", ha="center", va="bottom", fontsize=8.5)
        axes.set_yticks(range(len(groups)), list(groups))
        axes.set(title=title, xlabel=label, xlim=(-0.02, 1.02), ylim=(len(groups) - 0.5, -0.6))
        _save(figure, path)
    return True


def puzzle_gallery(puzzles: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], side: int, path: str | Path) -> bool:
    """Draw puzzles with the answers given: clues in black, right cells in green, wrong ones in red.

    Args:
        puzzles: question, answer and solution of each, `[cells]`; 0 is an empty cell.
        side: of the grid.
        path: the PNG to write.

    Returns:
        Whether there was anything to draw.
    """
    if not puzzles:
        return False
    columns = min(3, len(puzzles))
    rows = -(-len(puzzles) // columns)
    with _styled():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(2.6 * columns, 2.8 * rows), dpi=DPI, facecolor="white", layout="constrained")
        for axes, (question, answer, solution) in zip(
            figure.subplots(rows, columns, squeeze=False).flat, puzzles, strict=False
        ):
            axes.set(xlim=(0, side), ylim=(side, 0), aspect="equal", xticks=range(side + 1), yticks=range(side + 1))
            axes.tick_params(length=0, labelbottom=False, labelleft=False)
            wrong = int((answer != solution).sum())
            axes.set_title("solved" if not wrong else f"{wrong} cells wrong", fontsize=9)
            for cell in range(side**2):
                given, right = question[cell] == solution[cell], answer[cell] == solution[cell]
                colour = INK if given and right else GREEN if right else VERMILION
                row, column = divmod(cell, side)
                weight = "bold" if given else "normal"
                axes.text(
                    column + 0.5, row + 0.5, str(answer[cell]), ha="center", va="center", color=colour, weight=weight
                )
        figure.savefig(_prepared(path))
    return True


@dataclass
class _Cell:
    """A card, whether it is right (None: nobody asks), and whether it stands a little apart from the one before."""

    card: Card
    right: bool | None = None
    apart: bool = True


def _cells(cards: Sequence[Card], right: Sequence[bool]) -> list[_Cell]:
    return [_Cell(card, mark, apart=i == 0) for i, (card, mark) in enumerate(zip(cards, right, strict=True))]


def _draw_rows(sections: Mapping[str, Sequence[Sequence[_Cell]]], path: str | Path, title: str) -> bool:
    sections = {heading: rows for heading, rows in sections.items() if rows}
    if not sections:
        return False
    size, label, gap, head, margin = 1.15, 0.42, 0.14, 0.5, 0.25  # inches
    places = {
        heading: [
            list(accumulate((size + gap + 2 * gap * cell.apart for cell in row[1:]), initial=margin)) for row in rows
        ]
        for heading, rows in sections.items()
    }
    top = 0.5 if title else 0.1
    width = max(xs[-1] for rows in places.values() for xs in rows) + size + gap + margin
    height = margin + top + len(sections) * head + sum(map(len, sections.values())) * (size + label)
    with _styled():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
        if title:
            figure.text(margin / width, 1 - 0.3 / height, title, fontsize=13, weight="bold", va="center")
        y = height - top
        for heading, rows in sections.items():
            figure.text(margin / width, (y - 0.27) / height, heading, fontsize=11, weight="bold", va="center")
            y -= head
            for row, xs in zip(rows, places[heading], strict=True):
                for cell, x in zip(row, xs, strict=True):
                    box = (x / width, (y - size) / height, size / width, size / height)
                    _draw_card(figure.add_axes(box), cell.card, cell.right)
                y -= size + label
        figure.savefig(_prepared(path))
    return True


def _draw_card(axes: "Axes", card: Card, right: bool | None) -> None:
    """One square: picture, spectrogram or word; `right` is None for a query."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    edge = GREEN if right else FAINT if right is False else INK
    for spine in axes.spines.values():
        spine.set(visible=True, color=edge, linewidth=3 if right else 1.2)
    only_word = card.picture is None and card.waveform is None
    if card.picture is not None:
        picture = np.moveaxis(card.picture, 0, -1)[::-1]
        axes.imshow(picture, origin="lower", extent=(0.07, 0.93, 0.07, 0.93), interpolation="lanczos")
    elif card.waveform is not None:
        extent = (0.04, 0.96, 0.04, 0.96)
        axes.imshow(_mel_picture(card.waveform), origin="lower", extent=extent, cmap="magma", aspect="auto")
    else:
        axes.set_facecolor("#F6F6F4")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    name = "".join(c if c.isprintable() and c != "\ufffd" else "·" for c in card.name)  # a decoder may say anything
    lines = textwrap.wrap(name, 13 if only_word else 17, max_lines=5 if only_word else 2, placeholder=" …")
    text = "\n".join(lines) if card.waveform is None else "“" + "\n".join(lines) + "”"
    if only_word:
        axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=9.5)
    else:
        axes.text(0.5, -0.06, text, ha="center", va="top", fontsize=7.5, color=MUTED if right is False else INK)
    if right:
        badge = {"boxstyle": "circle,pad=0.2", "color": GREEN}
        axes.text(0.98, 0.98, "✓", ha="center", va="center", fontsize=9, weight="bold", color="white", bbox=badge)


def _mel_picture(waveform: np.ndarray) -> np.ndarray:
    """Log-mel spectrogram `[bands, frames]` with 60 dB of range."""
    import torch

    from edge_glass.data.batch import AudioClips
    from edge_glass.encoders.audio import HOP_SAMPLES, LogMel

    clip = torch.as_tensor(np.asarray(waveform), dtype=torch.float32)[None]
    mel = LogMel(64, -(-clip.shape[1] // HOP_SAMPLES))(AudioClips(clip, torch.tensor([clip.shape[1]])))[0].numpy()
    return mel.clip(min=mel.max() - 1.5)  # 40 dB a unit


def _validation_curves(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[str, dict[tuple[str, str], list[tuple[int, float]]]]:
    """The view `val`, or the first one met, and direction -> (step, R@1) of its evaluations."""
    found: dict[str, dict[tuple[str, str], list[tuple[int, float]]]] = {}
    for row in rows:
        for text, value in row.items() if row.get("kind") == "eval" else ():
            name = MetricName.parse(text)
            if name and name.metric == "R@1" and name.width is None and name.of is None:
                curves = found.setdefault(name.view, {})
                curves.setdefault((name.query, name.answer), []).append((row["step"], value))
    view = "val" if "val" in found else next(iter(found), "")
    return view, {direction: found[view][direction] for direction in DIRECTIONS if direction in found.get(view, {})}


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a twentieth of the run, shorter at the ends."""
    reach = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - reach, 0)
    high = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _line(query: str, answer: str) -> dict[str, Any]:
    """How a direction's curve looks in every figure."""
    direction = (query, answer)
    look = {"color": COLOURS[direction], "marker": MARKERS[direction], "markersize": 4.5, "linewidth": 1.8}
    return {"label": f"{query} → {answer}", **look}


def _styled():
    import matplotlib

    return matplotlib.rc_context(STYLE)  # type: ignore[arg-type]


def _figure(size: tuple[float, float], columns: int = 1) -> tuple["Figure", Sequence["Axes"]]:
    """A figure that is no part of pyplot's global state, so that nothing needs closing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure: "Figure", path: str | Path) -> None:
    figure.savefig(_prepared(path), bbox_inches="tight", pad_inches=0.15)


def _prepared(path: str | Path) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path)
