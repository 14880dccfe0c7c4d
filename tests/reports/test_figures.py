import numpy as np
import pytest
from PIL import Image

from edge_glass.evaluation.names import DIRECTIONS, MetricName
from edge_glass.reports.figures import GREEN, Card, Found, recall_by_width, retrieval_gallery, training_curves


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def share(path, colour):
    """Share of the picture that is within a little of a colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (abs(pixels(path) - wanted).max(2) < 12).mean()


def rows():
    train = [{"kind": "train", "step": step, "loss": 5 / (1 + step)} for step in range(1, 30)]
    names = [str(MetricName("val", query, answer, "R@1")) for query, answer in DIRECTIONS]
    evaluations = [
        {"kind": "eval", "step": step, **{name: step / 40 - 0.04 * i for i, name in enumerate(names)}}
        for step in (10, 20, 29)
    ]
    return train + evaluations


def metrics():
    return {
        str(MetricName("test", query, answer, "R@1", width)): 0.2 + 0.1 * i + (width or 64) / 500
        for i, (query, answer) in enumerate(DIRECTIONS)
        for width in (None, 16, 32)
    }


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32)).astype(np.uint8)


def test_training_curves_show_the_loss_and_the_validation_recall(tmp_path):
    both, loss_only = tmp_path / "figures" / "a.png", tmp_path / "b.png"
    assert training_curves(rows(), both)
    assert training_curves([row for row in rows() if row["kind"] == "train"], loss_only)
    assert pixels(both).shape[1] > 1.8 * pixels(loss_only).shape[1]
    for colour in ("#D55E00", "#CC79A7"):
        assert share(both, colour) > 0.0005 > share(loss_only, colour)
    assert share(loss_only, "#0072B2") > 0.001


def test_recall_by_width_draws_every_direction(tmp_path):
    path = tmp_path / "widths.png"
    assert recall_by_width(metrics(), path, full_width=64)
    for colour in ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7"):
        assert share(path, colour) > 0.0003, colour


def test_right_answers_are_marked_and_wrong_ones_are_not(tmp_path, picture):
    sound = np.sin(np.arange(8000) * 0.2).astype(np.float32)
    drawing, word, spoken = Card("fox", picture=picture), Card("fox"), Card("fox", waveform=sound)
    right, wrong, empty = tmp_path / "right.png", tmp_path / "wrong.png", tmp_path / "empty.png"
    sections = {"drawing → name": [Found(drawing, [word, Card("a very long name " * 6)], [True, False])]}
    assert retrieval_gallery(sections, right, title="Found")
    assert retrieval_gallery({"x": [Found(spoken, [drawing, spoken], [False, False])]}, wrong)
    assert share(right, GREEN) > 0.004
    assert share(wrong, GREEN) < 0.0005
    assert not retrieval_gallery({"nothing": []}, empty)
    assert not empty.exists()


def test_a_query_row_may_have_fewer_answers_than_another(tmp_path, picture):
    short = Found(Card("fox", picture=picture), [Card("fox")], [True])
    long = Found(Card("fox", picture=picture), [Card("cat")] * 5, [False] * 5)
    alone, together = tmp_path / "alone.png", tmp_path / "together.png"
    assert retrieval_gallery({"s": [short]}, alone)
    assert retrieval_gallery({"s": [short, long]}, together)
    assert pixels(together).shape[1] > pixels(alone).shape[1]


def test_with_nothing_to_draw_no_file_is_written(tmp_path):
    assert not training_curves([{"kind": "note", "step": 1}], tmp_path / "a.png")
    assert not recall_by_width({"test/image_to_text/R@1": 0.5, "loss": 1.0}, tmp_path / "b.png")
    assert not list(tmp_path.iterdir())


def test_figures_leave_matplotlib_as_it_was(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    recall_by_width(metrics(), tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before
