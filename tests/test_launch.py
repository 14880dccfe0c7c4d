import os
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from edge_glass import launch
from edge_glass.errors import UserError


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
