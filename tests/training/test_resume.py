"""A run that is killed and taken up again is the run that was left alone, bit for bit."""

import json
import os
import random
import shutil
import signal
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from edge_glass.config import ConfigError
from edge_glass.errors import RESUMABLE, UserError
from edge_glass.experiments.multimodal import MultimodalExperiment
from edge_glass.experiments.puzzles import PuzzleExperiment
from edge_glass.runs import differences, read_metrics
from edge_glass.training import checkpoints as checkpoint_files
from edge_glass.training.checkpoints import Checkpoints, load_state
from edge_glass.training.fit import fit, share_of_batch
from edge_glass.training.loop import Trainer
from edge_glass.training.resume import find_start
from tests import mini
from tests.ranks import end_ranks

STEPS = 12
# Everything that draws random numbers in training, or remembers earlier steps.
RICH = (
    "encoder.image.projection.dropout=0.2",
    "encoder.audio.projection.dropout=0.2",
    "+backbone.audio.apply_spec_augment=true",
    "+backbone.audio.mask_time_prob=0.2",
    "+backbone.audio.mask_time_length=2",
    "optimization.average=0.9",
    f"training.max_steps={STEPS}",
    "training.save_every=3",
    "training.eval_every=4",
    "training.log_every=2",  # so that some checkpoints lie between two rows of the log
)
CLOCK = ("seconds", "samples_per_second")


def train(rank: int, config: dict, folder: str, fate: dict) -> None:
    """One rank's life; `fate` says how it ends early: `rank`, and `step` or the number of a `write`."""
    for experiment in (MultimodalExperiment, PuzzleExperiment):  # the test views are no part of what is compared
        experiment.results = without_evaluation
    mine = fate.get("rank") in (rank, "all")
    if mine and "step" in fate:
        take_step = Trainer._step

        def doomed(trainer, batch):
            if trainer.progress.step == fate["step"]:
                os.kill(os.getpid(), fate["signal"])
            return take_step(trainer, batch)

        Trainer._step = doomed
    if mine and "write" in fate:
        die_at_call(fate["write"])
    try:
        fit(config, folder)
    except UserError as error:
        Path(folder, f"error-{rank}.txt").write_text(str(error))
        raise SystemExit(2) from error


def without_evaluation(*_):
    return SimpleNamespace(skipped={}, summary=lambda: {"metrics": {}}, show=lambda *_: None)


def die_at_call(number: int) -> None:
    """Kill the process at one of the many calls that bring a checkpoint to the disk, with its file half written."""
    calls = iter(range(10**9))

    def counted(function):
        def call(*arguments, **options):
            if next(calls) == number:
                path = next((a for a in arguments if isinstance(a, Path) and a.is_file()), None)
                if path is not None and function is not os.replace:
                    os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    checkpoint_files.save_file = counted(checkpoint_files.save_file)
    checkpoint_files._fingerprint = counted(checkpoint_files._fingerprint)
    checkpoint_files._to_disk = counted(checkpoint_files._to_disk)
    checkpoint_files.shutil.rmtree = counted(shutil.rmtree)
    checkpoint_files.torch.save = counted(torch.save)
    os.replace = counted(os.replace)


@pytest.fixture(scope="module")
def config_of(mini_data, text_tower):
    def config(*more: str) -> dict:
        return mini.plain(mini.experiment(mini_data, text_tower, *RICH, *more))

    return config


def everything(folder: Path) -> dict:
    """All that two equal runs have in common."""
    last = Checkpoints(folder).find("last")
    state = load_state(last)
    state["progress"].pop("seconds")
    return {
        "weights": load_file(last / "model.safetensors"),
        "average": load_file(last / "average.safetensors"),
        "state": state,
        "best": Checkpoints(folder).best(),
        "metrics": [{k: v for k, v in row.items() if k not in CLOCK} for row in read_metrics(folder)],
    }


def assert_equal(found: dict, expected: dict) -> None:
    for name in expected:
        assert listed(found[name]) == listed(expected[name]), name


def listed(value):
    """Numbers instead of tensors, so that == compares them."""
    if isinstance(value, dict):
        return {key: listed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [listed(item) for item in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def resumed(config: dict, folder: Path) -> dict:
    return {**config, "training": {**config["training"], "resume": str(folder)}}


@pytest.mark.parametrize(
    ("world_size", "more"),
    [
        (1, ["optimization.batch_size=2", "optimization.accumulation=4", "training.workers=1"]),
        (1, ["optimization.negative_captions=8", "training.precision=fp16"]),
        (2, ["optimization.batch_size=4"]),
        (2, ["optimization.batch_size=2", "optimization.accumulation=4"]),
        (1, [*mini.DECODER, "fusion=gated", "optimization.batch_size=2", "optimization.accumulation=4"]),
        (2, [*mini.DECODER, "optimization.batch_size=4", "decoder.model.exploration=0.5"]),
    ],
    ids=[
        "accumulation and workers",
        "one rank",
        "two ranks",
        "two ranks with accumulation",
        "decoder with accumulation",
        "decoder on two ranks",
    ],
)
def test_a_run_that_is_killed_again_and_again_is_the_run_that_was_not(config_of, tmp_path, world_size, more):
    config, draw = config_of(*more), random.Random(str(more))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert end_ranks(train, config, str(whole), {}, world_size=world_size) == [0] * world_size
    deaths = sorted(draw.sample(range(1, STEPS), 2))
    for attempt, step in enumerate(deaths):
        victim = draw.randrange(world_size)
        fate = {"rank": victim, "step": step, "signal": int(signal.SIGKILL)}
        given = resumed(config, killed) if attempt else config
        codes = end_ranks(train, given, str(killed), fate, world_size=world_size)
        assert codes[victim] == -signal.SIGKILL and all(codes), (deaths, codes)
    assert end_ranks(train, resumed(config, killed), str(killed), {}, world_size=world_size) == [0] * world_size
    assert_equal(everything(killed), everything(whole))
    trained = [row["step"] for row in read_metrics(killed) if row["kind"] == "train"]
    assert trained == list(range(2, STEPS + 1, 2))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_that_is_killed_goes_on_with_the_thoughts_it_had(tmp_path, world_size):
    config = mini.plain(mini.puzzle_experiment(f"training.max_steps={STEPS}"))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert end_ranks(train, config, str(whole), {}, world_size=world_size) == [0] * world_size
    codes = end_ranks(
        train, config, str(killed), {"rank": 0, "step": 7, "signal": int(signal.SIGKILL)}, world_size=world_size
    )
    assert all(codes)
    assert end_ranks(train, resumed(config, killed), str(killed), {}, world_size=world_size) == [0] * world_size
    assert_equal(everything(killed), everything(whole))


def test_death_while_a_checkpoint_is_written_costs_that_checkpoint_at_most(config_of, tmp_path):
    config = config_of("encoder.audio=null")
    whole = tmp_path / "whole"
    assert end_ranks(train, config, str(whole), {}) == [0]
    draw = random.Random(0)
    for number in sorted(draw.sample(range(4, 80), 6)):
        killed = tmp_path / f"killed-{number}"
        (code,) = end_ranks(train, config, str(killed), {"rank": "all", "write": number})
        assert code == -signal.SIGKILL
        saved = Checkpoints(killed).steps()
        reached = max((row["step"] for row in read_metrics(killed)), default=0)
        assert reached - (saved[-1] if saved else 0) <= 6  # the one that was being written, and the steps beside it
        assert end_ranks(train, resumed(config, killed), str(killed), {}) == [0]
        assert_equal(everything(killed), everything(whole))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_run_after_a_step_and_a_checkpoint(config_of, tmp_path, number):
    config = config_of("encoder.audio=null")
    fate = {"rank": "all", "step": 4, "signal": int(number)}
    assert end_ranks(train, config, str(tmp_path / "run"), fate) == [RESUMABLE]
    assert Checkpoints(tmp_path / "run").steps()[-1] == 5  # steps are finished: the one that was begun, no other


def test_one_rank_that_is_told_to_stop_stops_all_at_the_same_step(config_of, tmp_path):
    config = config_of("optimization.batch_size=4")
    whole, told = tmp_path / "whole", tmp_path / "told"
    end_ranks(train, config, str(whole), {}, world_size=2)
    fate = {"rank": 1, "step": 4, "signal": int(signal.SIGUSR2)}
    assert end_ranks(train, config, str(told), fate, world_size=2) == [RESUMABLE, RESUMABLE]
    assert Checkpoints(told).steps()[-1] == 5
    assert end_ranks(train, resumed(config, told), str(told), {}, world_size=2) == [0, 0]
    assert_equal(everything(told), everything(whole))


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_hangs_or_dies_ends_the_others_with_its_name(config_of, tmp_path, number):
    config = config_of("optimization.batch_size=4", "launch.timeout_minutes=0.05")
    fate = {"rank": 1, "step": 4, "signal": int(number)}
    assert end_ranks(train, config, str(tmp_path), fate, world_size=2) == [2, -signal.SIGKILL]
    assert (tmp_path / "error-0.txt").read_text().startswith("rank 1 of 2 died, hangs")
    assert Checkpoints(tmp_path).steps() == [3, 4]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_more_or_fewer_ranks_over_the_same_samples(config_of, tmp_path, before, after):
    config = config_of(f"optimization.batch_size={8 // before}", "dataset.image_augment=null", "training.log_every=1")
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    end_ranks(train, config, str(whole), {}, world_size=before)
    fate = {"rank": "all", "step": 6, "signal": int(signal.SIGTERM)}
    assert end_ranks(train, config, str(moved), fate, world_size=before) == [RESUMABLE] * before
    assert end_ranks(train, resumed(config, moved), str(moved), {}, world_size=after) == [0] * after
    found, expected = everything(moved), everything(whole)
    assert found["state"]["progress"]["samples"] == expected["state"]["progress"]["samples"] == 8 * STEPS
    first = [row["loss"] for row in found["metrics"] if row["kind"] == "train"][:7]
    assert first == [row["loss"] for row in expected["metrics"] if row["kind"] == "train"][:7]


def test_the_global_batch_stays_when_the_number_of_ranks_changes(config_of):
    config = mini.OmegaConf.create(config_of("optimization.batch_size=4", "optimization.accumulation=2"))
    assert vars(share_of_batch(config, None, 3)) == {"samples": 8, "accumulation": 2, "global_batch": 24}
    shares = {ranks: share_of_batch(config, 16, ranks) for ranks in (1, 2, 4, 8)}
    assert {ranks: share.samples * ranks for ranks, share in shares.items()} == dict.fromkeys((1, 2, 4, 8), 16)
    assert {ranks: share.accumulation for ranks, share in shares.items()} == {1: 4, 2: 2, 4: 1, 8: 1}
    with pytest.raises(ConfigError, match="16 samples a step, which 3 ranks cannot share equally"):
        share_of_batch(config, 16, 3)


@pytest.fixture
def stopped_run(config_of, tmp_path):
    """outputs/<date>/<name>-1, stopped after step 5."""
    config = config_of("encoder.audio=null")
    folder = tmp_path / "outputs" / "2026-01-01" / "edge-glass-1"
    end_ranks(train, config, str(folder), {"rank": "all", "step": 4, "signal": int(signal.SIGTERM)})
    return mini.OmegaConf.create(config), folder


def start_of(config, folder: Path, resume: str | None = "auto"):
    config.training.resume = resume
    with ExitStack() as stack:
        return find_start(mini.to_experiment(config), folder, stack)


def test_auto_takes_up_the_unfinished_run_of_the_same_config(stopped_run):
    config, folder = stopped_run
    new = folder.parents[1] / "2026-01-02" / "edge-glass-2"
    start = start_of(config, new)
    assert (start.run_dir, start.step, start.goes_on) == (folder, 5, True)
    assert not new.exists()
    config.optimization.optimizer.lr = 0.5
    assert start_of(config, new).run_dir == new  # another config is another run
    assert start_of(config, folder.parents[1] / "elsewhere").run_dir != folder


def test_auto_leaves_a_finished_run_alone(stopped_run):
    config, folder = stopped_run
    (folder / "summary.json").write_text('{"metrics": {"val/mean/R@1": 0.25}}')
    new = folder.with_name("edge-glass-2")
    assert start_of(config, new).run_dir == new
    assert start_of(config, folder).finished
    config.training.resume = "auto"
    before = sorted(folder.rglob("*"))
    assert fit(mini.plain(config), str(folder)) == 0.25
    assert sorted(folder.rglob("*")) == before


def test_a_folder_with_another_config_is_refused_with_the_difference(stopped_run):
    config, folder = stopped_run
    config.optimization.optimizer.lr, config.launch.nproc_per_node = 0.5, 2
    with pytest.raises(ConfigError) as found:
        start_of(config, folder)
    assert "optimization.optimizer.lr: 0.003 -> 0.5" in str(found.value)
    assert "nproc" not in str(found.value)  # who computes is not what is computed


def test_a_run_is_never_written_over(stopped_run, monkeypatch):
    config, folder = stopped_run
    with pytest.raises(ConfigError, match=r"holds a run already: give training\.resume=auto"):
        start_of(config, folder, resume=None)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # the cluster started the same job again
    assert start_of(config, folder, resume=None).step == 5


def test_two_processes_never_train_in_one_folder(stopped_run, monkeypatch):
    config, folder = stopped_run
    monkeypatch.setattr("edge_glass.training.resume.LOCK_SECONDS", 0.01)
    config.training.resume = "auto"
    with ExitStack() as stack:
        find_start(config, folder, stack)
        with pytest.raises(UserError, match="being trained by another process"), ExitStack() as second:
            find_start(config, folder, second)
        assert start_of(config, folder.with_name("edge-glass-2")).run_dir != folder  # nor is it looked for there


def test_changed_data_is_told_of(stopped_run, tmp_path, caplog):
    config, folder = stopped_run
    manifest = json.loads((Checkpoints(folder).find("last") / "manifest.json").read_text())
    assert len(manifest["data_hash"]) == 16 and manifest["towers"] == {
        "model.towers.text.encoder": manifest["towers"]["model.towers.text.encoder"]
    }
    rows = mini.image_rows()
    rows[0]["text"] = "red square"
    shutil.copytree(Path(config.dataset.image).parent, tmp_path / "data")
    config.dataset.image = str(mini.write_parquet(tmp_path / "data" / "images.parquet", rows))
    config.training.resume = str(folder)
    fit(mini.plain(config), str(folder))
    assert "data set's files have changed" in caplog.text


def test_differences_name_what_is_new_and_what_has_gone():
    old = mini.OmegaConf.create({"a": {"b": 1, "c": [1, 2]}, "logger": {"x": 1}, "d": {}})
    new = mini.OmegaConf.create({"a": {"b": 2, "c": [1, 2], "e": 3, "f": None}, "logger": {"x": 2}, "d": {}})
    assert differences(old, new) == ["a.b: 1 -> 2", "a.e: not there -> 3"]
    assert differences(old, old) == []
