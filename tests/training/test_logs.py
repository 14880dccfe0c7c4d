"""Figures reach metrics.jsonl whatever a disk does, and wandb never holds up a run."""

import contextlib
import json
import os
import resource
import signal
import socket
import sys
import threading
from types import SimpleNamespace

import pytest

from edge_glass.reports.report import write_report
from edge_glass.runs import read_json, write_json
from edge_glass.training import logs
from edge_glass.training.logs import JsonLines, TensorBoard, open_sinks
from tests import mini

KEY = "0123456789" * 4
LOGGER = {"tensorboard": False, "wandb": {"mode": "online", "project": "p", "entity": None, "tags": []}}


def row(step: int) -> dict:
    return {"kind": "train", "step": step, "loss": 1 / step}


def said(caplog) -> list[str]:
    """What the run says; wandb logs for itself."""
    return [record.getMessage() for record in caplog.records if record.name == logs.__name__]


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def no_file_beyond(size: int):
    """Lets no file of this process grow beyond a size, as a full disk would; not even the output of pytest."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_rows_that_a_full_disk_did_not_take_are_written_when_it_does(tmp_path, caplog):
    sink = JsonLines(tmp_path)
    sink.write(row(1))
    with no_file_beyond((tmp_path / "metrics.jsonl").stat().st_size + 7):  # room for a part of the next row
        sink.write(row(2))
        sink.write(row(3))
    assert "its rows are kept in memory" in caplog.text
    assert b"".join((tmp_path / "metrics.jsonl").read_bytes().splitlines(True)[1:]) == b'{"kind"'
    sink.write(row(4))
    sink.close()
    assert rows_of(tmp_path) == [row(1), row(2), row(3), row(4)]
    assert len(said(caplog)) == 1


def test_rows_that_were_never_written_are_counted_at_the_end(tmp_path, caplog):
    sink = JsonLines(tmp_path)
    with no_file_beyond(0):
        sink.write(row(1))
        sink.write(row(2))
        sink.close()
    assert "the last 2 rows could not be written" in caplog.text


def test_half_a_row_of_a_killed_process_is_cut_off(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row(1)) + "\n" + json.dumps(row(2))[:9])
    JsonLines(tmp_path).write(row(2))
    assert rows_of(tmp_path) == [row(1), row(2)]


def test_rows_are_brought_to_the_disk_when_asked(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    sink = JsonLines(tmp_path)
    sink.write(row(1))
    assert not synced
    sink.sync()
    assert len(synced) == 1


def test_tensorboard_on_a_failing_disk_ends_alone(tmp_path, monkeypatch, caplog):
    sink = TensorBoard(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sink.writer, "add_scalar", full)
    sink.write(row(1))
    sink.write(row(2))
    sink.close()
    assert caplog.text.count("No space left on device") == 1


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    """A user who never logged in to wandb."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))


def run_with_wandb(folder, **facts):
    """The sinks of a run of two steps, from open to close."""
    folder.mkdir(exist_ok=True)
    sinks = open_sinks(folder, LOGGER, {"seed": 0}, facts)
    for step in (1, 2):
        for sink in sinks:
            sink.write(row(step))
    for sink in sinks:
        sink.close()


def test_without_a_key_wandb_is_offline_and_the_report_says_how_to_sync(no_login, tmp_path, caplog):
    run_with_wandb(tmp_path / "run")
    assert said(caplog) == ["wandb is offline: no API key (set WANDB_API_KEY, or run `wandb login`)"]
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb"))
    write_json(tmp_path / "run" / "summary.json", {})
    assert f"`wandb sync {offline}`" in write_report(tmp_path / "run").read_text()


@pytest.fixture(params=["absent", "silent"])
def bad_server(request, no_login, monkeypatch):
    """A port where nobody listens, or where connections are taken and nothing is ever answered."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "silent":
            server.listen(64)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setattr(logs, "INIT_SECONDS", 1.0)
        yield


def test_a_server_that_does_not_answer_costs_a_warning(bad_server, tmp_path, caplog):
    run_with_wandb(tmp_path / "run")
    (message,) = said(caplog)
    assert message.startswith("wandb is offline: its server did not let the run in (Failed to get resume status")
    assert rows_of(tmp_path / "run") == [row(1), row(2)]
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_a_run_ends_whole_without_its_server(bad_server, mini_data, text_tower, no_pictures, tmp_path, caplog):
    small = ("encoder=vision_text", "training.max_steps=2", "logger=wandb")
    mini.run(mini.experiment(mini_data, text_tower, *small), tmp_path / "run")
    assert "its server did not let the run in" in caplog.text
    assert [row["kind"] for row in rows_of(tmp_path / "run")] == ["train", "train", "eval"]
    assert "wandb sync" in (tmp_path / "run" / "report.md").read_text()


class FakeWandb:
    """Stands in for the package: notes what it is asked for, and waits where it is told to, as for a server."""

    def __init__(self, waits_in: str = ""):
        self.waits_in = waits_in
        self.answer = threading.Event()
        self.options: dict = {}
        self.logged: list = []
        self.finished = False

    Settings = SimpleNamespace

    def login(self, **_):
        return True

    def init(self, **options):
        self._wait("init")
        self.options = options
        return SimpleNamespace(log=self.log, finish=self.finish, settings=SimpleNamespace(sync_dir="/x/wandb/run-1-a"))

    def log(self, figures, step):
        self._wait("log")
        self.logged.append((step, figures))

    def finish(self):
        self._wait("finish")
        self.finished = True
        if self.waits_in == "timeout":
            raise TimeoutError

    def teardown(self):
        self._wait("teardown")

    def _wait(self, place: str):
        if self.waits_in == place:
            self.answer.wait()


def fake(monkeypatch, **options) -> FakeWandb:
    wandb = FakeWandb(**options)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb


def test_with_a_key_wandb_is_online_and_knows_config_commit_and_data(tmp_path, monkeypatch, caplog):
    wandb = fake(monkeypatch)
    run_with_wandb(tmp_path, commit="c0ffee", data_hash="da7a")
    assert wandb.options["mode"] == "online" and wandb.options["resume"] == "allow"
    assert wandb.options["id"] == read_json(tmp_path / "wandb.json")["id"]
    assert wandb.options["config"] == {"seed": 0, "commit": "c0ffee", "data_hash": "da7a"}
    assert wandb.logged == [(1, {"train/loss": 1.0}), (2, {"train/loss": 0.5})]
    assert wandb.finished and not said(caplog)


def test_a_run_that_goes_on_is_the_same_run_to_wandb(tmp_path, monkeypatch):
    ids = set()
    for _ in range(2):
        wandb = fake(monkeypatch)
        run_with_wandb(tmp_path)
        ids.add(wandb.options["id"])
    assert ids == {read_json(tmp_path / "wandb.json")["id"]}


@pytest.mark.parametrize("place", ["init", "log", "finish", "teardown"])
def test_a_wandb_that_hangs_is_left_alone_with_a_warning(tmp_path, monkeypatch, caplog, place):
    wandb = fake(monkeypatch, waits_in=place)
    monkeypatch.setattr(logs, "CLOSE_SECONDS", 0.1)
    run_with_wandb(tmp_path)  # returns, although the answer comes only now:
    wandb.answer.set()
    (message,) = said(caplog)
    assert "is left alone; all figures are in" in message
    assert rows_of(tmp_path) == [row(1), row(2)]


def test_figures_that_the_server_did_not_take_in_time_are_named_in_the_report(tmp_path, monkeypatch, caplog):
    fake(monkeypatch, waits_in="timeout")
    run_with_wandb(tmp_path)
    assert "did not take all figures" in caplog.text
    write_json(tmp_path / "summary.json", {})
    assert f"`wandb sync {tmp_path}/wandb/run-1-a`" in write_report(tmp_path).read_text()


def test_a_wandb_that_fails_in_the_middle_costs_a_warning(tmp_path, monkeypatch, caplog):
    wandb = fake(monkeypatch)
    monkeypatch.setattr(wandb, "log", lambda *_, **__: 1 / 0)
    run_with_wandb(tmp_path)
    assert "wandb failed: division by zero; the run goes on without it" in caplog.text
