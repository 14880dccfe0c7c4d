import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from edge_glass import launch
from edge_glass.errors import LostRank, Stopped, UserError
from edge_glass.local_ranks import RankError, run_local_ranks

ROOT = Path(__file__).resolve().parents[1]
# A command whose two ranks wait until they are told to stop, and then take their time.
COMMAND = """
import sys
from edge_glass import local_ranks
from edge_glass.errors import Stopped
local_ranks.PRELOAD = ["__main__"]  # nothing of what ranks need to train
if __name__ == "__main__":
    try:
        print(local_ranks.run_local_ranks("tests.test_launch:{function}", None, sys.argv[1], count=2, threads=1))
    except Stopped:
        print("stopped")
"""


class Misfit(UserError):
    """One of the many kinds of errors that are for the user."""


def told(config, run_dir: str) -> tuple:
    return config["name"], os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"], run_dir


def second_rank_finds_a_mistake(config, run_dir: str) -> None:
    if os.environ["RANK"] == "1":
        raise Misfit("batch_size: too large")
    raise LostRank("rank 1 is gone")


def defect(config, run_dir: str) -> float:
    return 1 / 0


def killed(config, run_dir: str) -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    raise LostRank("rank 1 is gone")


def second_rank_never_ends(config, run_dir: str) -> None:
    if os.environ["RANK"] == "0":
        raise LostRank("rank 1 of 2 hangs")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def stops_when_told(config, run_dir: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: Path(run_dir, f"saved-{os.environ['RANK']}").touch())
    Path(run_dir, f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    while not Path(run_dir, f"saved-{os.environ['RANK']}").exists():
        time.sleep(0.01)
    raise Stopped


def never_stops(config, run_dir: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(run_dir, f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    time.sleep(60)


@pytest.fixture(autouse=True)
def no_outer_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SUBMITIT_EXECUTOR"):
        monkeypatch.delenv(name, raising=False)


def config_of(ranks: int):
    return OmegaConf.create({"name": "a run", "launch": {"nproc_per_node": ranks, "threads": 1}})


def run_two(function: str, folder: Path):
    return launch.run(f"tests.test_launch:{function}", config_of(2), str(folder))


def test_one_rank_is_a_plain_call(tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)
    assert launch.run("tests.test_launch:told", config_of(1), "x") == ("a run", "0", "1", "1", "x")
    with pytest.raises(ZeroDivisionError):
        launch.run("tests.test_launch:defect", config_of(1), str(tmp_path))


def test_under_torchrun_this_process_is_the_rank(monkeypatch):
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)
    assert launch.run("tests.test_launch:told", config_of(4), "x") == ("a run", "3", "4", "1", "x")


def test_ranks_know_their_place_and_rank_0_gives_the_result(tmp_path):
    assert run_two("told", tmp_path) == ("a run", "0", "2", "1", str(tmp_path))


def test_a_mistake_found_on_any_rank_is_the_message(tmp_path, capfd):
    with pytest.raises(UserError, match=r"^batch_size: too large$"):
        run_two("second_rank_finds_a_mistake", tmp_path)
    assert "Traceback" not in capfd.readouterr().err


def test_a_defect_in_a_rank_keeps_its_traceback(tmp_path):
    with pytest.raises(RankError, match=r"(?s)in rank 0:.*test_launch\.py.*return 1 / 0.*ZeroDivisionError"):
        run_two("defect", tmp_path)


def test_a_rank_that_is_killed_is_named_and_not_the_one_that_missed_it(tmp_path):
    with pytest.raises(UserError, match=r"^rank 1 was killed by SIGKILL"):
        run_two("killed", tmp_path)


def test_a_rank_that_never_ends_is_ended_when_another_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr("edge_glass.local_ranks.GRACE_SECONDS", 0.2)
    with pytest.raises(UserError, match="rank 1 of 2 hangs"):
        run_two("second_rank_never_ends", tmp_path)


def test_ranks_that_stopped_stop_the_job(tmp_path):
    (tmp_path / "saved-0").touch()
    (tmp_path / "saved-1").touch()
    with pytest.raises(Stopped):
        run_local_ranks("tests.test_launch:stops_when_told", None, str(tmp_path), count=2, threads=1)


@pytest.fixture
def command(tmp_path):
    """Starts the command and waits until both ranks are there."""
    started = []

    def start(function: str, start_new_session: bool = False) -> tuple[subprocess.Popen, list[int]]:
        script = tmp_path / "command.py"
        script.write_text(COMMAND.format(function=function))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
            start_new_session=start_new_session,
        )
        started.append(process)
        files = [tmp_path / f"pid-{rank}" for rank in (0, 1)]
        while process.poll() is None and not all(file.exists() and file.read_text() for file in files):
            time.sleep(0.02)
        return process, [int(file.read_text()) for file in files]

    yield start
    for process in started:
        process.kill()


def ended(pid: int) -> bool:
    """True once the process is gone, or has only its exit code left."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_job_reaches_every_rank_and_the_job_waits_for_them(command, tmp_path, number):
    process, ranks = command("stops_when_told")
    process.send_signal(number)
    assert process.communicate()[0] == "stopped\n"
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()
    assert all(ended(pid) for pid in ranks)


def test_a_signal_to_all_processes_lets_every_rank_save_and_the_job_know_of_it(command, tmp_path):
    process, ranks = command("stops_when_told", start_new_session=True)
    os.killpg(process.pid, signal.SIGTERM)
    output, errors = process.communicate()
    assert (output, errors) == ("stopped\n", "")
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()
    assert all(ended(pid) for pid in ranks)


def test_a_second_ctrl_c_ends_everything_at_once(command):
    process, ranks = command("never_stops")
    process.send_signal(signal.SIGINT)
    while "Ctrl-C again" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == -signal.SIGINT
    while not all(ended(pid) for pid in ranks):
        time.sleep(0.01)


def test_ranks_save_themselves_when_the_job_is_killed(command, tmp_path):
    process, ranks = command("stops_when_told")
    process.kill()
    while not all(ended(pid) for pid in ranks):  # a rank that lived on would make this wait for ever
        time.sleep(0.01)
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()
