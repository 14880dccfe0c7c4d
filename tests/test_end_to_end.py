"""Whole runs on drawn shapes and tones: what a run folder holds, and that it holds the truth."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edge_glass import launch
from edge_glass.config import load_config, to_experiment
from edge_glass.data.rows import data_hash, read_tables
from edge_glass.errors import UserError
from edge_glass.experiments.build import build_experiment, evaluate_folder
from edge_glass.training.checkpoints import CheckpointError, Checkpoints
from edge_glass.training.loop import Trainer
from tests import mini

SUMMARY = {
    "name",
    "steps",
    "stopped_by",
    "seconds",
    "samples",
    "samples_per_second",
    "peak_memory_mb",
    "metrics",
    "baselines",
    "best",
    "parameters",
    "skipped_rows",
    "versions",
    "commit",
    "data_hash",
}
PAIRS = {"image_text", "audio_text", "image_audio"}


def read(folder: Path, name: str = "summary.json"):
    return json.loads((folder / name).read_text())


def rows_of(folder: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def directions(metrics, view="test") -> set[str]:
    return {name.split("/")[1] for name in metrics if name.startswith(f"{view}/") and name.endswith("/R@1")} - {"mean"}


@pytest.fixture(scope="module")
def start(mini_data, text_tower):
    """Trains on the mini data with further overrides, in a folder."""

    def run(folder: Path, *more: str):
        return mini.run(mini.experiment(mini_data, text_tower, *more), folder)

    return run


@pytest.fixture
def pictures():
    """Asked for by tests that want figures drawn."""


@pytest.fixture(autouse=True)
def no_pictures_unless_asked_for(request):
    """Most tests are about numbers."""
    if "pictures" not in request.fixturenames:
        request.getfixturevalue("no_pictures")


@pytest.fixture(scope="module")
def trimodal(start, tmp_path_factory):
    """A finished run and what its training returned. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "trimodal"
    return folder, start(folder)


def test_a_run_folder_holds_everything(trimodal, mini_data, text_tower):
    folder, _ = trimodal
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "report.md", "figures", "checkpoints"} <= names
    figures = {path.name for path in (folder / "figures").iterdir()}
    assert {"training_curves.png", "recall_by_width.png", "retrieval_gallery.png"} <= figures
    assert load_config(folder / "config.yaml") == mini.experiment(mini_data, text_tower)
    assert "test" in (folder / "report.md").read_text()


def test_the_summary_says_what_was_documented(trimodal, mini_data):
    summary = read(trimodal[0])
    assert set(summary) >= SUMMARY
    assert (summary["steps"], summary["stopped_by"], summary["samples"]) == (6, "max_steps", 48)
    assert summary["skipped_rows"] == {"count": 0, "of": 120, "by_reason": {}, "rows": []}
    tables = read_tables(mini_data / "images.parquet", mini_data / "speech.parquet")
    assert summary["data_hash"] == data_hash(tables.values())
    assert summary["parameters"][-1]["part"] == "total"
    frozen = {row["part"]: row["trainable"] for row in summary["parameters"]}
    assert frozen["text.encoder"] == 0 < frozen["image.encoder"]
    assert summary["versions"]["torch"] == torch.__version__.split("+")[0]


def test_every_direction_and_width_is_measured_on_every_view(trimodal):
    metrics = read(trimodal[0])["metrics"]
    expected = {f"{a}_to_{b}" for a in ("image", "audio", "text") for b in ("image", "audio", "text") if a != b}
    for view in ("val", "test"):
        assert directions(metrics, view) == expected
        for direction in expected:
            for metric in ("R@1", "R@5", "R@10", "median_rank", "mAP", "group_R@1"):
                assert {f"{view}/{direction}/{metric}", f"{view}/{direction}/{metric}@8"} <= set(metrics)
    assert all(0 <= value <= 24 for value in metrics.values())
    baselines = read(trimodal[0])["baselines"]
    assert baselines["test/image_to_text/R@1/chance"] == pytest.approx(1 / 24)
    assert {"test/image_to_text/R@1/nearest_pixels", "test/audio_to_text/R@1/nearest_log_mel"} <= set(baselines)


def test_the_log_has_a_row_a_step_and_one_an_evaluation(trimodal):
    folder, monitored = trimodal
    assert [row["step"] for row in rows_of(folder, "train")] == [1, 2, 3, 4, 5, 6]
    assert {f"loss/{pair}" for pair in PAIRS} <= set(rows_of(folder, "train")[0])
    assert [row["step"] for row in rows_of(folder, "eval")] == [4, 6]
    last = rows_of(folder, "eval")[-1]
    assert monitored == last["val/mean/R@1"] == read(folder)["metrics"]["val/mean/R@1"]
    mean = sum(last[f"val/{direction}/R@1"] for direction in directions(last, "val")) / 6
    assert monitored == pytest.approx(mean)
    assert read(folder)["best"]["value"] == max(row["val/mean/R@1"] for row in rows_of(folder, "eval"))


def test_an_evaluation_gives_the_figures_of_the_run_again(trimodal, tmp_path, pictures):
    folder = shutil.copytree(trimodal[0], tmp_path / "copy")
    before = read(folder)
    for name in ("figures", "report.md"):
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    again = evaluate_folder(str(folder), device="cpu")
    assert again["metrics"] == before["metrics"] and again["baselines"] == before["baselines"]
    assert set(read(folder)) >= SUMMARY
    assert read(folder)["skipped_rows"] == before["skipped_rows"]
    assert (folder / "report.md").is_file() and (folder / "figures" / "retrieval_gallery.png").is_file()


def test_a_folder_without_checkpoint_cannot_be_evaluated(trimodal, tmp_path):
    folder = shutil.copytree(trimodal[0], tmp_path / "copy")
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        evaluate_folder(str(folder))


def test_the_best_weights_are_judged_when_asked_for(start, tmp_path):
    falling_apart = "optimization.optimizer.lr=1.0"  # so that the last weights are not the best
    often = ["training.eval_every=1", "training.keep_last=9"]
    monitored = start(tmp_path, "training.test_checkpoint=best", falling_apart, *often)
    summary = read(tmp_path)
    assert summary["checkpoint"] == "best" and summary["best"]["step"] < 6
    assert summary["metrics"]["val/mean/R@1"] == summary["best"]["value"] == monitored
    assert evaluate_folder(str(tmp_path), checkpoint="best", device="cpu")["metrics"] == summary["metrics"]


@pytest.mark.parametrize(
    ("overrides", "measured", "losses"),
    [
        (["encoder=vision_text"], {"image_to_text", "text_to_image"}, {"image_text"}),
        (["encoder=audio_text"], {"audio_to_text", "text_to_audio"}, {"audio_text"}),
        (["encoder.text=null"], {"image_to_audio", "audio_to_image"}, {"image_audio"}),
    ],
    ids=["vision_text", "audio_text", "image and audio"],
)
def test_any_two_modalities_make_a_run(start, tmp_path, overrides, measured, losses):
    start(tmp_path, *overrides, "training.max_steps=2", "objective=siglip")
    assert directions(read(tmp_path)["metrics"]) == measured
    logged = {name.removeprefix("loss/") for name in rows_of(tmp_path, "train")[0] if name.startswith("loss/")}
    assert logged == losses
    assert evaluate_folder(str(tmp_path), device="cpu")["metrics"] == read(tmp_path)["metrics"]


def test_resamplers_accumulation_and_workers_go_together(start, tmp_path):
    start(
        tmp_path,
        "resampler@encoder.audio.resampler=perceiver",
        "encoder.audio.resampler={latents: 4, heads: 2}",
        "optimization.accumulation=2",
        "optimization.batch_size=4",
        "training.workers=1",
        "training.max_steps=2",
    )
    assert read(tmp_path)["samples"] == 16
    assert "audio.resampler" in {row["part"] for row in read(tmp_path)["parameters"]}


def test_more_training_finds_more(start, tmp_path):
    start(
        tmp_path,
        "encoder=vision_text",
        "training.max_steps=80",
        "training.eval_every=1000",
        "dataset.image_augment=null",
        "optimization.optimizer.lr=0.02",
    )
    losses = [row["loss"] for row in rows_of(tmp_path, "train")]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert read(tmp_path)["metrics"]["test/image_to_text/R@1"] > 5 / 24  # five times chance


class Killed(Exception):
    """What ends a run from outside."""


@pytest.fixture
def killed_after(monkeypatch):
    """Ends the next run before a step, as a power cut would."""

    def arrange(step: int):
        take_step = Trainer._step

        def dying(trainer, batch):
            if trainer.progress.step == step:
                monkeypatch.setattr(Trainer, "_step", take_step)
                raise Killed
            return take_step(trainer, batch)

        monkeypatch.setattr(Trainer, "_step", dying)

    return arrange


def without_clock(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "samples_per_second")} for row in rows]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(Checkpoints(folder).find("last") / "model.safetensors")


RANDOM = (  # everything that draws random numbers in training
    "encoder.image.projection.dropout=0.2",
    "encoder.audio.projection.dropout=0.2",
    "+backbone.audio.apply_spec_augment=true",
    "+backbone.audio.mask_time_prob=0.2",
    "+backbone.audio.mask_time_length=2",
)


def test_a_run_that_was_stopped_and_resumed_is_the_run_that_was_not(start, tmp_path, killed_after):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    start(whole, *RANDOM)
    killed_after(5)
    with pytest.raises(Killed):
        start(stopped, *RANDOM)
    assert Checkpoints(stopped).steps() == [2, 4] and not (stopped / "summary.json").exists()
    torch.manual_seed(999)  # another process
    start(stopped, *RANDOM, f"training.resume={stopped}")
    torch.testing.assert_close(weights_of(stopped), weights_of(whole), rtol=0, atol=0)
    for kind in ("train", "eval"):
        assert without_clock(rows_of(stopped, kind)) == without_clock(rows_of(whole, kind))
    assert read(stopped)["metrics"] == read(whole)["metrics"]
    assert read(stopped)["samples"] == 48


def test_the_same_seed_is_the_same_run_and_another_is_not(start, tmp_path):
    folders = [tmp_path / name for name in ("first", "again", "other")]
    for folder, seed in zip(folders, (3, 3, 4), strict=True):
        start(folder, *RANDOM, f"seed={seed}", "training.max_steps=2")
    first, again, other = (weights_of(folder) for folder in folders)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_finished_run_that_is_resumed_reports_the_same_figures(trimodal, start, tmp_path):
    folder = shutil.copytree(trimodal[0], tmp_path / "copy")
    monitored = start(folder, f"training.resume={folder}")
    assert monitored == trimodal[1]
    assert read(folder)["metrics"] == read(trimodal[0])["metrics"]
    assert rows_of(folder, "train") == rows_of(trimodal[0], "train")


def test_a_run_that_died_before_its_first_checkpoint_begins_anew_in_its_folder(trimodal, start, tmp_path):
    folder = shutil.copytree(trimodal[0], tmp_path / "copy")
    shutil.rmtree(folder / "checkpoints")
    assert start(folder, f"training.resume={folder}") == trimodal[1]
    assert without_clock(rows_of(folder, "train")) == without_clock(rows_of(trimodal[0], "train"))


def test_a_run_that_is_out_of_time_says_so_and_ends_with_everything_in_place(start, tmp_path, caplog):
    start(tmp_path, "training.max_seconds=0.000001", "encoder=vision_text")
    assert "training.max_seconds=1e-06 cut the run off after 1 of 6 steps" in caplog.text
    summary = read(tmp_path)
    assert (summary["stopped_by"], summary["steps"]) == ("max_seconds", 1)
    assert directions(summary["metrics"]) == {"image_to_text", "text_to_image"}
    assert "cut off by max_seconds" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimization.batch_size=5000", "20 rows do not fill one global batch of 5000"),
        ("dataset.where={split: [nothing]}", r"no row of .* has .*nothing.*train"),
        ("dataset.train.keyword_share=2.0", "keyword_share"),
        ("training.device=tpu", "training.device='tpu': give auto, cpu or cuda"),
        ("training.monitor=val/recall", r"training\.monitor='val/recall'.*val/mean/R@1"),
        ("training.monitor=test/image_to_text/R@1", "training.monitor.*validation_view"),
        ("dataset.views.val.queries={image: {split: [vall]}}", "vall"),
        ("+objective.alignment.pair_weights={image_txt: 1.0}", "image_txt"),
    ],
    ids=lambda value: value.split("=")[0],
)
def test_a_run_that_cannot_begin_says_why_and_leaves_no_folder(start, tmp_path, override, words):
    with pytest.raises(UserError, match=words):
        start(tmp_path / "run", override, "logger.tensorboard=true")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def torn_data(tmp_path):
    """The mini data with three drawings, a clip of the validation voice and one of the test voice that are broken."""
    images, speech = mini.image_rows(), mini.speech_rows()
    torn = (images[1], images[7], images[30], speech[24], speech[60])
    for row in torn:
        (row.get("image") or row["audio"])["bytes"] = b"<html>404</html>"
    mini.write_parquet(tmp_path / "images.parquet", images)
    mini.write_parquet(tmp_path / "speech.parquet", speech)
    return tmp_path, {row["sample_id"] for row in torn}


def test_rows_that_cannot_be_decoded_are_counted_and_named(torn_data, text_tower, tmp_path):
    folder, torn = torn_data
    mini.run(mini.experiment(folder, text_tower, "training.max_steps=8", "dataset.max_bad_share=0.2"), tmp_path / "run")
    skipped = read(tmp_path / "run")["skipped_rows"]
    assert {row["sample_id"] for row in skipped["rows"]} == torn
    assert (skipped["count"], skipped["of"]) == (5, 120)
    assert skipped["by_reason"] == {"image": 3, "audio": 2}
    assert all(sample in (tmp_path / "run" / "report.md").read_text() for sample in torn)
    sizes = read(tmp_path / "run")["sizes"]
    assert sizes["test/image_to_text/queries"] == 23


def test_pictures_with_captions_in_a_folder_are_enough(text_tower, tmp_path):
    folder = tmp_path / "pictures"
    rows = [
        {"image_path": f"{size}-{concept}.png", "caption": mini.names()[concept]}
        for size in range(30, 36)
        for concept in range(mini.CONCEPTS)
    ]
    mini.write_jsonl(folder, rows)
    for row in rows:
        size, concept = row["image_path"].removesuffix(".png").split("-")
        (folder / row["image_path"]).write_bytes(mini.png(mini.drawing(int(concept), int(size))))
    small = [o for o in mini.overrides(folder, text_tower) if not o.startswith(("dataset", "~dataset"))]
    config = mini.composed(
        *small,
        "encoder=vision_text",
        "dataset=image_text",
        f"dataset.image={folder}",
        "dataset.shares={val: 0.2, test: 0.3}",
        "training.max_steps=2",
    )
    mini.run(to_experiment(config), tmp_path / "run")
    summary = read(tmp_path / "run")
    assert directions(summary["metrics"]) == {"image_to_text", "text_to_image"}
    splits = read_tables(folder, None, shares={"val": 0.2, "test": 0.3})["image"].column("split")
    assert summary["sizes"]["test/image_to_text/queries"] == splits.count("test")


def test_tensorboard_and_wandb_leave_their_files_in_the_run_folder(start, tmp_path):
    folder = tmp_path / "run"
    start(
        folder,
        "encoder=vision_text",
        "training.max_steps=2",
        "logger=wandb",
        "logger.wandb.mode=offline",
        "logger.tensorboard=true",
    )
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))


def test_a_logger_that_is_off_is_not_even_imported(start, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    start(tmp_path, "encoder=vision_text", "training.max_steps=1")
    assert "wandb" not in caplog.text


def test_a_logger_that_fails_does_not_stop_the_run(start, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    start(tmp_path, "encoder=vision_text", "training.max_steps=1", "logger=wandb")
    assert "wandb (logger.wandb.mode=online) did not start" in caplog.text
    assert (tmp_path / "summary.json").is_file()


def test_two_ranks_make_one_run(torn_data, text_tower, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SUBMITIT_EXECUTOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data, torn = torn_data
    small = ("launch.nproc_per_node=2", "optimization.batch_size=4", "training.max_steps=8")
    config = mini.experiment(data, text_tower, *small, "dataset.max_bad_share=0.2")
    monitored = launch.run("edge_glass.training.fit:fit", config, str(tmp_path / "run"))
    summary = read(tmp_path / "run")
    assert (summary["world_size"], summary["steps"], summary["samples"]) == (2, 8, 64)
    assert monitored == summary["metrics"]["val/mean/R@1"]
    assert [row["step"] for row in rows_of(tmp_path / "run", "train")] == list(range(1, 9))
    assert {row["sample_id"] for row in summary["skipped_rows"]["rows"]} == torn  # of both ranks
    assert evaluate_folder(str(tmp_path / "run"), device="cpu")["metrics"] == summary["metrics"]


def test_recall_embeds_pictures_and_sounds_as_mixtures_of_the_training_captions(start, mini_data, text_tower, tmp_path):
    start(tmp_path / "run", "dataset.recall=20", "training.max_steps=2")
    stored = load_file(Checkpoints(tmp_path / "run").find("last") / "model.safetensors")
    rows = read_tables(mini_data / "images.parquet", mini_data / "speech.parquet").values()
    captions = {text for part in rows for text in part.where({"split": ["train"]}).column("text")}
    assert stored["model.recall.memory"].shape == (len(captions), 16)
    before = read(tmp_path / "run")["metrics"]
    evaluate_folder(str(tmp_path / "run"))
    assert read(tmp_path / "run")["metrics"] == before


def test_recall_of_captions_that_training_would_change_is_refused(start, tmp_path):
    with pytest.raises(UserError, match=r"dataset\.recall=20\.0.*whitened"):
        start(tmp_path / "run", "dataset.recall=20", "projection@encoder.text.projection=matryoshka")
    assert not (tmp_path / "run").exists()


def test_a_whitened_projection_of_pictures_is_refused(start, tmp_path):
    places = ["projection@encoder.image.projection=whitened", "~encoder.image.projection.hidden_dim"]
    with pytest.raises(UserError, match=r"encoder\.image\.projection is whitened.*matryoshka"):
        start(tmp_path / "run", *places)


def test_a_value_that_the_optimizer_refuses_is_one_message_and_leaves_nothing(start, tmp_path):
    with pytest.raises(UserError, match=r"AdamW: Invalid learning rate: -1"):
        start(tmp_path / "run", "optimization.optimizer.lr=-1")
    assert not (tmp_path / "run").exists()


def test_training_batches_bring_captions_of_every_other_concept_along(mini_data, text_tower):
    def captions_of(count: int):
        built = build_experiment(mini.experiment(mini_data, text_tower, f"optimization.negative_captions={count}"))
        batch = next(built.training_batches(8)(0))
        return batch, batch.ids()["text"].tolist()

    batch, ids = captions_of(1000)
    assert len(batch.extra_text) > 0 and not set(ids[8:]) & set(ids[:8]) and len(ids) == 8 + len(batch.extra_text)
    assert captions_of(0)[1] == batch.concept_ids.tolist()


def test_a_run_is_judged_by_its_averaged_weights(start, tmp_path):
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    start(plain)
    start(averaged, "optimization.average=0.9")
    torch.testing.assert_close(weights_of(averaged), weights_of(plain), rtol=0, atol=0)  # training is the same
    assert read(averaged)["metrics"] != read(plain)["metrics"]
    assert evaluate_folder(str(averaged), device="cpu")["metrics"] == read(averaged)["metrics"]
    start(averaged, "optimization.average=0.9", f"training.resume={averaged}")
    assert read(averaged)["metrics"] != read(plain)["metrics"]


def test_a_loss_that_stays_no_number_leaves_the_ids_of_its_batch(start, tmp_path):
    with pytest.raises(UserError, match="3 steps in a row"):
        start(
            tmp_path,
            "encoder.audio=null",
            "optimization.optimizer.lr=1e30",
            "optimization.max_nonfinite=2",
            "optimization.clip_norm=null",
            "training.max_steps=50",
        )
    found = read(tmp_path, "nonfinite.json")
    assert found["step"] < 50 and len(found["sample_ids"]) == 8
    assert all(sample.startswith("pen/") for sample in found["sample_ids"])


def test_a_deterministic_run_logs_the_same_figures_twice(start, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        torch.manual_seed(len(folder.name))  # whatever was drawn before
        start(folder, *RANDOM, "training.deterministic=true", "training.max_steps=3")
    first, second = (without_clock(rows_of(folder, "train")) for folder in folders)
    assert first == second and len(first) == 3
    assert not torch.are_deterministic_algorithms_enabled() or torch.use_deterministic_algorithms(False) is None


def test_a_full_disk_at_the_end_says_what_is_missing(start, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edge_glass.training.checkpoints.save_file", full)
    with pytest.raises(UserError, match=r"weights of step 6 could not be saved: free some space.*training\.resume="):
        start(tmp_path)
    assert read(tmp_path)["failed_saves"] >= 3 and read(tmp_path)["metrics"]
    monkeypatch.undo()
    start(tmp_path, f"training.resume={tmp_path}")
    assert read(tmp_path)["failed_saves"] == 0
