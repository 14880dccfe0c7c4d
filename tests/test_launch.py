import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from submitit.core.utils import UncompletedJobError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from edge_glass import launch
from edge_glass.errors import Stopped, UserError


class Misfit(UserError):
    """One of the many kinds of errors that are for the user."""


def told(config, run_dir: str) -> tuple:
    return config["name"], config["launch"]["nproc_per_node"], run_dir


def second_rank_finds_a_mistake(config, run_dir: str) -> None:
    if os.environ["RANK"] == "1":
        raise Misfit("batch_size: too large")
    time.sleep(60)  # as a rank that waits for the other in a collective


def defect(config, run_dir: str) -> float:
    return 1 / 0


def killed(config, run_dir: str) -> None:
    os.kill(os.getpid(), 9)


@pytest.fixture(autouse=True)
def no_outer_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SUBMITIT_EXECUTOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def config_of(ranks: int):
    return OmegaConf.create({"name": "a run", "launch": {"nproc_per_node": ranks, "threads": 1}})


def spawn_one(function: str, folder: Path) -> None:
    """One rank in a process of its own: half the cost of two, and all that a failure needs."""
    launch._spawn(f"tests.test_launch:{function}", OmegaConf.to_container(config_of(1)), str(folder), ranks=1)


def test_one_rank_is_a_plain_call(tmp_path):
    assert launch.run("tests.test_launch:told", config_of(1), str(tmp_path)) == ("a run", 1, str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        launch.run("tests.test_launch:defect", config_of(1), str(tmp_path))


def test_under_torchrun_this_process_is_the_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert launch.run("tests.test_launch:told", config_of(4), str(tmp_path)) == ("a run", 4, str(tmp_path))


def test_a_mistake_found_on_any_rank_is_the_message_and_ends_the_others(tmp_path, capfd):
    with pytest.raises(UserError, match=r"^batch_size: too large$"):
        launch.run("tests.test_launch:second_rank_finds_a_mistake", config_of(2), str(tmp_path))
    assert "Traceback" not in capfd.readouterr().err


def test_a_defect_in_a_rank_keeps_its_traceback(tmp_path):
    with pytest.raises(ChildFailedError, match=r"(?s)test_launch\.py.*return 1 / 0.*ZeroDivisionError"):
        spawn_one("defect", tmp_path)


def test_a_rank_that_is_killed_is_named(tmp_path):
    with pytest.raises(UserError, match=r"rank 0 ended without a word .*(Signal 9|SIGKILL)"):
        spawn_one("killed", tmp_path)


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
    return launch.run(f"tests.test_launch:{function}", config_of(1), "run")


def test_a_slurm_task_is_a_rank_and_jobs_of_one_node_have_ports_of_their_own(task_of_a_job):
    ports = set()
    for job in (7, 8):
        task_of_a_job(1, job)
        assert run_task("told") == ("a run", 1, "run")
        assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")] == ["1", "2", "node1"]
        ports.add(int(os.environ["MASTER_PORT"]))
    assert len(ports) == 2 and max(ports) < 32768  # where Linux begins to hand ports out


def test_when_a_slurm_job_stops_only_its_first_task_fails(task_of_a_job, monkeypatch):
    monkeypatch.setattr(launch, "_slurm_state", lambda job: "CANCELLED")
    task_of_a_job(1)
    assert run_task("stopped") is None
    task_of_a_job(0)
    with pytest.raises(Stopped):
        run_task("stopped")


def test_a_job_that_was_stopped_but_not_cancelled_is_handed_to_submitit(task_of_a_job, monkeypatch):
    monkeypatch.setattr(launch, "_slurm_state", lambda job: "RUNNING")
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


def test_a_job_that_may_not_be_queued_again_says_how_it_can_go_on(task_of_a_job):
    task_of_a_job(0)
    with pytest.raises(UserError, match=r"too many times.*training\.resume=run.*max_num_timeout"):
        run_task("not_again")
