"""Sweeps as a person runs them."""

import json
import subprocess
import sys

import pytest

from edge_glass.config import ConfigError, to_experiment
from edge_glass.runs import write_json
from edge_glass.sweeps import check_sweep, show_outcomes
from tests import mini
from tests.commands import ROOT, in_a_process

SHORT = ("training.max_steps=2", "training.eval_every=2", "encoder.audio=null")


def jobs_of(folder) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/job.json"))]


def test_a_failed_job_is_named_and_does_not_stop_the_others(tmp_path, mini_data, text_tower):
    sweep = ["-m", f"hydra.sweep.dir={tmp_path}/sweep", *mini.overrides(mini_data, text_tower), *SHORT]
    command = [*sweep, "launch.nproc_per_node=2", "optimization.batch_size=4,5000,5"]
    outcome = in_a_process(tmp_path, "train.py", *command)
    assert outcome.code == 2
    assert outcome.stderr.count("error: 20 rows do not fill one global batch of 10000") == 1
    table = outcome.stdout[outcome.stdout.index("sweep: ") :]
    assert "#1   optimization.batch_size=5000" in table and "FAILED: 20 rows do not fill" in table
    assert "2 of 3 jobs completed, 1 failed" in table and "training.resume=auto" in table
    assert [job["status"] for job in jobs_of(tmp_path / "sweep")] == ["completed", "failed", "completed"]
    for number in (0, 2):
        summary = json.loads((tmp_path / "sweep" / str(number) / "summary.json").read_text())
        assert summary["world_size"] == 2
        assert f"val/mean/R@1 {summary['metrics']['val/mean/R@1']:.4f}" in table


def test_a_sweep_that_is_run_again_leaves_finished_jobs_alone(command, tmp_path, mini_data, text_tower, no_pictures):
    sweep = ["-m", f"hydra.sweep.dir={tmp_path}/sweep", *mini.overrides(mini_data, text_tower), *SHORT, "seed=0,1"]
    assert command("train.py", *sweep).code == 0
    (tmp_path / "sweep" / "1" / "summary.json").unlink()  # as if it had been killed in its evaluation
    before = (tmp_path / "sweep" / "0" / "summary.json").stat().st_mtime_ns
    again = command("train.py", *sweep, "training.resume=auto")
    assert again.code == 0, again.stderr
    assert (tmp_path / "sweep" / "0" / "summary.json").stat().st_mtime_ns == before
    assert (tmp_path / "sweep" / "1" / "summary.json").exists()
    assert "2 of 2 jobs completed, 0 failed" in again.stdout
    refused = command("train.py", *sweep)
    assert refused.code == 2 and "holds a run already: give training.resume=auto" in refused.stderr


def test_optuna_is_given_the_monitored_figure(command, tmp_path, mini_data, text_tower, no_pictures):
    outcome = command(
        "train.py",
        "-m",
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=2",
        "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.direction=maximize",
        f"hydra.sweep.dir={tmp_path}/sweep",
        *mini.overrides(mini_data, text_tower),
        *SHORT,
        "optimization.optimizer.lr=tag(log, interval(0.001, 0.1))",
    )
    assert outcome.code == 0, outcome.stderr
    values = [job["value"] for job in jobs_of(tmp_path / "sweep")]
    found = (tmp_path / "sweep" / "optimization_results.yaml").read_text()
    assert len(values) == 2 and f"best_value: {max(values)}" in found


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["ablation=mrl,perceiver", "seed=3"],
            ["python train.py -m ablation=mrl seed=3", "python train.py -m ablation=perceiver seed=3"],
        ),
        (["ablation=glob(*)"], ["an ablation is a sweep of its own"]),
    ],
)
def test_ablations_cannot_be_swept_over(command, overrides, words):
    message = command("train.py", "-m", *overrides).message()
    assert [word for word in words if word not in message] == []


def test_one_ablation_with_further_sweeps_is_fine():
    check_sweep(["ablation=mrl", "seed=0,1", "encoder=trimodal,vision_text"])


def test_a_sweep_under_torchrun_is_refused_with_the_command_that_works(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"python train\.py -m seed=0,1 launch\.nproc_per_node=2"):
        check_sweep(["seed=0,1"])
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")  # its ranks have numbers too
    check_sweep(["seed=0,1"])


def test_torchrun_trains_one_run_and_refuses_a_sweep(tmp_path, mini_data, text_tower):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    command = [*torchrun, "--rdzv-endpoint=localhost:0", str(ROOT / "train.py")]
    small = [*mini.overrides(mini_data, text_tower), *SHORT]
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "timeout": 300}
    one = subprocess.run([*command, *small], **options)
    assert one.returncode == 0, one.stderr[-3000:]
    (summary,) = tmp_path.glob("outputs/*/*/summary.json")
    assert json.loads(summary.read_text())["world_size"] == 2
    assert len(list(tmp_path.glob("outputs/*/*"))) == 1  # the other rank's folder is gone
    sweep = subprocess.run([*command, "-m", "seed=0,1"], **options)
    assert sweep.returncode != 0
    assert sweep.stderr.count("python train.py -m seed=0,1 launch.nproc_per_node=2") == 1


@pytest.mark.parametrize("ablation", ["mrl", "perceiver"])
def test_every_job_of_an_ablation_is_a_config_that_runs(ablation):
    config = mini.composed(f"ablation={ablation}")
    assert config.name == ablation
    sweep = mini.OmegaConf.load(mini.CONF / "ablation" / f"{ablation}.yaml").hydra.sweeper.params
    jobs = mini.sweep_of(dict(sweep))
    assert len(jobs) > 5
    for job in jobs:
        to_experiment(mini.composed(f"ablation={ablation}", *job))


def test_the_table_tells_of_jobs_without_an_outcome(tmp_path, capsys):
    facts = [
        {"status": "completed", "monitor": "val/mean/R@1", "value": 0.25},
        {"status": "failed", "error": "the disk is full\nmore"},
        {"status": "running"},
        {"status": "completed", "monitor": None, "value": None},
    ]
    for number, fact in enumerate(facts):
        (tmp_path / str(number)).mkdir()
        write_json(tmp_path / str(number) / "job.json", {"number": number, "overrides": ["a=1", f"b={number}"], **fact})
    show_outcomes(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert "a=1" not in "".join(lines)  # common to all
    assert [line.split("  ")[-1].strip() for line in lines[2:6]] == [
        "val/mean/R@1 0.2500",
        "FAILED: the disk is full",
        "no outcome: stopped, killed or still running",
        "completed",
    ]
    assert "2 of 4 jobs completed, 1 failed, 1 stopped or still running" in lines[6]
    show_outcomes(tmp_path / "nothing")
    assert capsys.readouterr().out == ""
