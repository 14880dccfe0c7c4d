"""A rank that is a task of a SLURM job; tests/slurm runs it on a real one."""

import contextlib
import os
import signal

import pytest
from omegaconf import OmegaConf
from submitit.core.utils import UncompletedJobError

from edge_glass import launch, slurm_task
from edge_glass.errors import Stopped, UserError

CONFIG = OmegaConf.create({"name": "a run", "launch": {"nproc_per_node": 1, "threads": 1}})


def told(config, run_dir: str) -> tuple:
    return config["name"], run_dir


def stopped(config, run_dir: str) -> None:
    raise Stopped


def not_again(config, run_dir: str) -> None:
    raise UncompletedJobError("Job not requeued because: timed-out too many times.")


@pytest.fixture
def task_of_a_job(monkeypatch):
    """Makes this process one of the two tasks of a SLURM job, as submitit starts them."""

    def become(task: int, job: int = 7) -> None:
        facts = {"JOB_ID": job, "NTASKS": 2, "JOB_NUM_NODES": 1, "PROCID": task, "LOCALID": task, "NODEID": 0}
        for name, value in {**facts, "JOB_NODELIST": "node1"}.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))
        monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "")  # to be taken back

    return become


def run_task(function: str) -> object:
    return launch.run(f"tests.test_slurm_task:{function}", CONFIG, "run")


def test_a_slurm_task_is_a_rank_and_jobs_of_one_node_have_ports_of_their_own(task_of_a_job):
    ports = set()
    for job in (7, 8):
        task_of_a_job(1, job)
        assert run_task("told") == ("a run", "run")
        assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")] == ["1", "2", "node1"]
        ports.add(int(os.environ["MASTER_PORT"]))
    assert len(ports) == 2 and max(ports) < 32768  # where Linux begins to hand ports out


def test_when_a_slurm_job_stops_only_its_first_task_fails(task_of_a_job, monkeypatch):
    monkeypatch.setattr(slurm_task, "_state", lambda job, run_dir: "CANCELLED")
    task_of_a_job(1)
    assert run_task("stopped") is None
    task_of_a_job(0)
    with pytest.raises(Stopped):
        run_task("stopped")


def test_a_job_that_was_stopped_but_not_cancelled_is_handed_to_submitit(task_of_a_job, monkeypatch):
    monkeypatch.setattr(slurm_task, "_state", lambda job, run_dir: "RUNNING")
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: heard.append(number))
    try:
        for task in (1, 0):
            task_of_a_job(task)
            with pytest.raises(Stopped) if task == 0 else contextlib.nullcontext():
                run_task("stopped")
            assert len(heard) == (task == 0)
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_cluster_that_does_not_say_what_it_did_costs_the_requeue_not_the_saved_run(
    task_of_a_job, monkeypatch, tmp_path, caplog
):
    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue
    task_of_a_job(0)
    with pytest.raises(Stopped):
        run_task("stopped")
    assert "not queued again" in caplog.text and "training.resume=run" in caplog.text


def test_a_job_that_may_not_be_queued_again_says_how_it_can_go_on(task_of_a_job):
    task_of_a_job(0)
    with pytest.raises(UserError, match=r"too many times.*training\.resume=run.*max_num_timeout"):
        run_task("not_again")
