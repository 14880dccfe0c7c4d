import json
import subprocess
import sys

import pytest

from edge_glass.errors import UserError
from edge_glass.evaluation.names import DIRECTIONS, METRICS, MetricName
from edge_glass.reports.report import write_report
from edge_glass.reports.tables import terminal_table

VOICES = ("awb", "f2")


def metrics_of(view, directions, start):
    """Different numbers for every name."""
    found = {}
    for i, (query, answer) in enumerate(directions):
        for j, metric in enumerate(METRICS):
            for k, width in enumerate((None, 128, 64)):
                value = 1.5 + i if metric == "median_rank" else start + 0.031 * i + 0.007 * j - 0.011 * k
                found[str(MetricName(view, query, answer, metric, width))] = value
        if "audio" in (query, answer):
            for k, voice in enumerate(VOICES):
                found[str(MetricName(view, query, answer, "R@1", of=voice))] = start - 0.1 + 0.2 * k
    return found


@pytest.fixture
def summary():
    return {
        "name": "emoji",
        "steps": 1500,
        "seconds": 412.3,
        "samples_per_second": 3210.4,
        "peak_memory_mb": 2100.5,
        "metrics": metrics_of("val", DIRECTIONS, 0.6)
        | metrics_of("test", DIRECTIONS, 0.5)
        | metrics_of("test_unseen", DIRECTIONS, 0.2)
        | {"val/mean/R@1": 0.6543},
        "baselines": {f"test/{q}_to_{a}/R@1/chance": 0.00063 for q, a in DIRECTIONS}
        | {"test/image_to_text/R@1/nearest_pixels": 0.345, "test/image_to_text/R@1/nearest_pixels/x": 0.111},
        "sizes": {f"test/{q}_to_{a}/{n}": s for q, a in DIRECTIONS for n, s in (("queries", 1486), ("gallery", 1586))}
        | {"test/audio_to_text/unanswerable": 3},
        "embedding_width": 256,
        "best": {"step": 1400, "metric": "val/mean/R@1", "value": 0.6612},
        "parameters": [{"part": "image.encoder", "total": 1234567, "trainable": 1234567}],
        "skipped_rows": {
            "count": 1,
            "of": 14000,
            "by_reason": {"no PNG": 1},
            "rows": [{"sample_id": "noto/1f600", "reason": "no PNG"}],
        },
        "versions": {"torch": "2.14.1"},
        "commit": "abc1234",
        "data_hash": "d474",
        "stopped_by": "max_steps",
    }


@pytest.fixture
def run_dir(tmp_path, summary):
    rows = [{"kind": "train", "step": step, "loss": 3.0} for step in range(5)]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"kind": "tr')
    (tmp_path / "config.yaml").write_text(
        "seed: 7\nexam:\n  views:\n    test: {queries: {image: {split: [test]}}, gallery: {text: all}}\n"
    )
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "retrieval_gallery.png").write_bytes(b"picture")
    return tmp_path


def lines_of(page, heading):
    """The lines of a section."""
    return page.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0].splitlines()


def test_the_page_holds_the_numbers_of_the_summary(run_dir, summary):
    page = write_report(run_dir).read_text()
    for view in ("test", "test_unseen", "val"):
        lines = lines_of(page, f"Retrieval: {view}")
        for query, answer in DIRECTIONS:
            row = next(line for line in lines if line.startswith(f"| {query} → {answer} |"))
            for metric in METRICS:
                value = summary["metrics"][str(MetricName(view, query, answer, metric))]
                assert (f"| {value:.1f} |" if metric == "median_rank" else f"| {value:.3f} |") in row
            assert f"| {summary['metrics'][str(MetricName(view, query, answer, 'R@1', 128))]:.3f} |" in row
    for text in (
        "1,500 steps, 6 min 52 s, 3,210 samples/s, peak memory 2,100 MB, ended by max_steps.",
        "Best `val/mean/R@1`: 0.661 at step 1,400.",
        "| 0.500 | 0.507 | 0.514 | 1.5 | 0.528 | 0.535 | 0.489 | 0.0006 | 0.345 | 1,486 | 1,586 |",
        "Queries: image (split test). Gallery: text (all).",
        "no gallery item shares the query's concept: audio → text 3.",
        "| R@1 by voice | awb | f2 |",
        "| audio → text | 0.400 | 0.600 |",
        "| R@1 at width | 64 | 128 | 256 | kept at 128 |",
        "| image → text | 0.478 | 0.489 | 0.500 | 97.8% |",
        "| `val/mean/R@1` | 0.6543 |",
        "| image.encoder | 1,234,567 | 1,234,567 |",
        "1 of 14,000 rows could not be decoded.",
        "| `noto/1f600` | no PNG |",
        "| commit | `abc1234` |",
        "seed: 7",
    ):
        assert text in page, text
    assert "Not in this report" not in page


def test_the_page_shows_every_figure_of_the_folder(run_dir):
    page = write_report(run_dir).read_text()
    order = [
        page.index(f"](figures/{name}.png)") for name in ("retrieval_gallery", "recall_by_width", "training_curves")
    ]
    assert order == sorted(order)
    for name in ("recall_by_width", "training_curves"):
        assert (run_dir / "figures" / f"{name}.png").stat().st_size > 5000


def test_what_is_missing_is_named(tmp_path):
    metrics = metrics_of("val", [("image", "text"), ("text", "image")], 0.4)
    metrics = {name: value for name, value in metrics.items() if "@64" not in name and "@128" not in name}
    (tmp_path / "summary.json").write_text(json.dumps({"metrics": metrics}))
    page = write_report(tmp_path).read_text()
    assert page.startswith(f"# {tmp_path.name}\n")
    assert "| image → text | 0.400 |" in page
    missing = "\n".join(lines_of(page, "Not in this report"))
    for text in (
        "training curves",
        "by width",
        "val: no figures for audio → text",
        "gallery",
        "parameters",
        "config.yaml",
    ):
        assert text in missing, text


def test_a_run_without_retrieval_still_has_a_page(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"name": "n", "steps": 3, "metrics": {"loss": 2.5}}))
    page = write_report(tmp_path).read_text()
    assert "| `loss` | 2.5000 |" in page
    assert "summary.json holds no retrieval figure" in page
    assert terminal_table({"metrics": {"loss": 2.5}}).split()[-2:] == ["loss", "2.5000"]
    assert terminal_table({"metrics": {}}) == "no figures in this run\n"


def test_answers_have_tables_of_their_own(tmp_path):
    figures = {"exact_match": 0.5, "BLEU-4": 20.0, "WER": 0.25, "perplexity": 3.0}
    losses = {"loss": 1.1, "loss_shuffled_prefix": 5.25, "loss_without_prefix": 4.5}
    metrics = {f"test/audio_caption/{name}": value for name, value in (figures | losses).items()}
    metrics |= {"test/audio_caption/WER/flite": 0.375, "test/image_audio_caption/exact_match": 0.625}
    (tmp_path / "summary.json").write_text(json.dumps({"name": "n", "metrics": metrics}))
    page = write_report(tmp_path).read_text()
    assert "| media | exact match | BLEU-4 | WER | perplexity |" in page
    assert "| audio | 0.500 | 20.000 | 0.250 | 3.000 |" in page and "| image + audio | 0.625 |  |  |  |" in page
    assert "| loss of the caption | own prefix | another's | none |" in page
    assert "| audio | 1.100 | 5.250 | 4.500 |" in page and "| audio | flite |  | 0.375 |" in page
    assert "Other figures" not in page and "holds no retrieval figure" not in page
    assert "image + audio" in terminal_table({"metrics": metrics})


def test_a_folder_without_a_summary_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"has no summary.json.*training.resume="):
        write_report(tmp_path)


@pytest.mark.parametrize("width", [70, 90, 200])
def test_the_terminal_table_fits_and_keeps_what_matters(summary, width):
    table = terminal_table(summary, width=width)
    assert max(map(len, table.splitlines())) <= width
    words = table.split()
    assert words.index("test") < words.index("test_unseen") < words.index("val")
    row = next(line for line in table.splitlines() if "image → text" in line)
    assert {"0.500", "0.489", "0.0006", "0.345"} <= set(row.split())  # R@1, at half the width, chance, pixels
    assert ("0.514" in row) == (width == 200)  # R@10


def test_names_and_pages_need_no_torch():
    code = (
        "import sys; from edge_glass.reports.tables import terminal_table;"
        "terminal_table({'metrics': {'test/image_to_text/R@1': 0.5}});"
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
