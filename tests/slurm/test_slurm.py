"""Sweeps on a real SLURM: through a time limit and a preemption a run comes out as if there had been neither.

make test-slurm
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from edge_glass.runs import CONFIG, SUMMARY, read_json, read_metrics
from edge_glass.training.checkpoints import Checkpoints
from tests import mini
from tests.slurm.cluster import Cluster, NoCluster, running_cluster, wait_for

ROOT = Path(__file__).resolve().parents[2]
STEPS = 160  # enough seconds of training to be met in the middle
MIDDLE = 30
LONG = 300  # seconds that nothing here should come near to


@pytest.fixture(scope="module")
def cluster():
    try:
        with running_cluster() as cluster:
            yield cluster
    except NoCluster as reason:
        pytest.exit(f"SLURM was not tested: {reason}", returncode=1)


@pytest.fixture(scope="module")
def start_sweep(cluster, mini_data, text_tower):
    """Starts `python train.py -m ...` with two ranks a job; what still runs is ended with the module."""
    sweeps = []

    def start(folder: Path, *more: str) -> subprocess.Popen:
        options = [
            *mini.overrides(mini_data, text_tower),
            "hydra/launcher=slurm",
            "hydra.launcher.partition=main",
            "hydra.launcher.tasks_per_node=2",
            "hydra.launcher.cpus_per_task=1",
            "hydra.launcher.timeout_min=30",
            f"hydra.sweep.dir={folder}",
            f"training.max_steps={STEPS}",
            f"training.eval_every={STEPS // 2}",
            "training.save_every=20",
            *more,
        ]
        environment = {**cluster.environment, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, str(ROOT / "train.py"), "-m", *options]
        folder.mkdir(parents=True)
        with (folder / "launcher.txt").open("w") as output:
            sweep = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        sweeps.append(sweep)
        return sweep

    yield start
    for sweep in sweeps:
        sweep.kill()
        sweep.wait()


@pytest.fixture(scope="module")
def whole_sweep(cluster, start_sweep, tmp_path_factory):
    """The folder of a sweep over two seeds that nothing interrupts."""
    folder = tmp_path_factory.mktemp("sweeps") / "whole"
    sweep = start_sweep(folder, "seed=0,1")
    wait_for("jobs", cluster.jobs, sweep, LONG)
    jobs = cluster.jobs()
    assert sweep.wait(LONG) == 0, told(folder)
    assert [outcome(cluster, job) for job in jobs] == [("COMPLETED", "0:0", "0")] * 2
    return folder


def told(folder: Path) -> str:
    """What the sweep and its jobs printed, for a failing test."""
    texts = [
        folder / "launcher.txt",
        *sorted(folder.glob(".submitit/*/*.out")),
        *sorted(folder.glob(".submitit/*/*.err")),
    ]
    return "\n".join(f"-- {path.name}\n{path.read_text()[-6000:]}" for path in texts)


def step(run_dir: Path) -> int:
    """The last step in the log."""
    return max((row["step"] for row in read_metrics(run_dir)), default=0)


def weights(run_dir: Path) -> dict[str, list]:
    """Of the last checkpoint."""
    last = Checkpoints(run_dir).find("last")
    return {name: value.tolist() for name, value in load_file(last / "model.safetensors").items()}


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run_dir) if row["kind"] == "train"]


def caught_in_the_middle(cluster: Cluster, folder: Path, sweep: subprocess.Popen) -> str:
    """The number of the sweep's only job, once its run has come to the middle."""
    wait_for("the middle of the run", lambda: step(folder / "0") >= MIDDLE, sweep, LONG)
    (job,) = cluster.jobs()
    assert step(folder / "0") < STEPS - MIDDLE, "the run was over before it could be interrupted: raise STEPS"
    return job


def outcome(cluster: Cluster, job: str) -> tuple[str, str, str]:
    """A job's last state, its exit code, and how often it was queued again."""
    wait_for("the end of the job", lambda: job not in cluster.jobs(), seconds=LONG)
    found = cluster.job(job)
    return found["JobState"], found["ExitCode"], found["Restarts"]


def assert_as_uninterrupted(folder: Path, whole: Path) -> None:
    assert [path.parent.name for path in sorted(folder.glob(f"*/{CONFIG}"))] == ["0"], "one run folder, the same"
    assert read_json(folder / "0" / SUMMARY)["steps"] == STEPS
    assert weights(folder / "0") == weights(whole / "0")
    assert losses(folder / "0") == losses(whole / "0")


def test_each_job_of_a_sweep_is_one_run_whose_ranks_are_the_tasks(whole_sweep):
    assert sorted(path.parent.name for path in whole_sweep.glob(f"*/{SUMMARY}")) == ["0", "1"]
    for job in ("0", "1"):
        summary = read_json(whole_sweep / job / SUMMARY)
        assert (summary["world_size"], summary["global_batch"], summary["steps"]) == (2, 16, STEPS)
    assert weights(whole_sweep / "0") != weights(whole_sweep / "1")


def test_a_job_at_its_time_limit_is_queued_again_and_ends_as_if_uninterrupted(
    cluster, start_sweep, whole_sweep, tmp_path
):
    folder = tmp_path / "sweep"
    sweep = start_sweep(folder, "seed=0")
    job = caught_in_the_middle(cluster, folder, sweep)
    cluster.command("scancel", "--signal=USR2", job)  # what SLURM sends before a limit; limits are whole minutes
    assert sweep.wait(LONG) == 0, told(folder)
    assert outcome(cluster, job) == ("COMPLETED", "0:0", "1")
    assert_as_uninterrupted(folder, whole_sweep)


def test_a_job_that_is_preempted_is_queued_again_and_ends_as_if_uninterrupted(
    cluster, start_sweep, whole_sweep, tmp_path
):
    folder = tmp_path / "sweep"
    sweep = start_sweep(folder, "seed=0")
    job = caught_in_the_middle(cluster, folder, sweep)
    cluster.command("srun", "--partition=high", "--ntasks=2", "true")
    assert sweep.wait(LONG) == 0, told(folder)
    assert outcome(cluster, job) == ("COMPLETED", "0:0", "1")
    assert_as_uninterrupted(folder, whole_sweep)


def test_a_job_that_fails_is_named_and_the_sweep_says_so_by_its_exit_code(start_sweep, tmp_path):
    folder = tmp_path / "sweep"
    short = ["training.max_steps=4", "training.eval_every=4"]
    sweep = start_sweep(folder, *short, "training.monitor=val/mean/R@1,val/recall")
    assert sweep.wait(LONG) == 2, told(folder)
    printed = (folder / "launcher.txt").read_text()
    assert "FAILED: training.monitor='val/recall'" in printed and "1 of 2 jobs completed, 1 failed" in printed
    assert (folder / "0" / SUMMARY).is_file() and not (folder / "1" / SUMMARY).exists()
