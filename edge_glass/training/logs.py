"""Where a run's figures go: metrics.jsonl always, TensorBoard and wandb when asked."""

import json
import logging
import os
import queue
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from edge_glass.runs import METRICS, WANDB, read_json, write_json

log = logging.getLogger(__name__)
# What a server that does not answer may cost, and only at the end of a run: training goes on meanwhile.
INIT_SECONDS = 15.0
FINISH_SECONDS = 15.0
CLOSE_SECONDS = 40.0  # both of them, with time to start wandb's own process


class Sink(Protocol):
    """Takes rows of figures; never raises because of what a disk or a server does."""

    def write(self, row: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: one row a logged step or evaluation.

    Rows that a full or failing disk does not take are kept and written with the next one that it takes. The file
    holds whole rows only: half a row, of a write that failed or of a process that was killed, is cut off before the
    next is written.
    """

    def __init__(self, run_dir: Path):
        self.path = run_dir / METRICS
        self.waiting: list[str] = []
        self._warned = False

    def write(self, row: Mapping[str, Any]) -> None:
        self.waiting.append(json.dumps(row) + "\n")
        self._write_waiting()

    def sync(self) -> None:
        """Bring all rows so far to the disk itself."""
        self._write_waiting(to_disk=True)

    def close(self) -> None:
        self.sync()
        if self.waiting:
            log.error("the last %d rows could not be written to %s", len(self.waiting), self.path)

    def _write_waiting(self, to_disk: bool = False) -> None:
        try:
            with self.path.open("a+b") as file:
                file.truncate(_whole_rows(file))
                file.write("".join(self.waiting).encode())
                file.flush()
                if to_disk:
                    os.fsync(file.fileno())
        except OSError as error:
            if not self._warned:
                log.warning("%s could not be written: %s; its rows are kept in memory until it can", self.path, error)
            self._warned = True
        else:
            self.waiting.clear()


def _whole_rows(file: BinaryIO) -> int:
    """Bytes of the file up to the end of its last whole row."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return 0
    file.seek(-1, os.SEEK_END)
    if file.read(1) == b"\n":
        return size
    file.seek(0)
    return file.read().rfind(b"\n") + 1


class TensorBoard:
    """Event files in the run's folder `tensorboard/`; a disk that fails ends them, not the run."""

    def __init__(self, run_dir: Path):
        from torch.utils.tensorboard import SummaryWriter  # 3 s to import

        self.writer: Any = SummaryWriter(run_dir / "tensorboard")

    def write(self, row: Mapping[str, Any]) -> None:
        if self.writer is None:
            return
        try:
            for name, value in _figures(row).items():
                self.writer.add_scalar(name if "/" in name else f"{row['kind']}/{name}", value, row["step"])
        except OSError as error:  # its thread's, raised again at each call
            self._give_up(error)

    def close(self) -> None:
        if self.writer is None:
            return
        try:
            self.writer.close()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.writer = None
        log.warning("TensorBoard's files could not be written: %s; the run goes on without them", error)


class Wandb:
    """wandb: a server that is absent, slow or failing costs warnings, not steps.

    Everything that talks to wandb happens in a thread that is fed by a queue. Without an API key, or when the server
    does not let the run in, the figures are kept in the run's folder, for `wandb sync`. All parts of a resumed run
    are one run to wandb: its id is in `wandb.json`.

    Args:
        run_dir: the run's folder.
        mode: `online` needs an API key (`WANDB_API_KEY`, or from `wandb login`) and is `offline` without one.
        project: of wandb.
        entity: user or team; None for the key's own.
        tags: for the run's page.
        config: what the page shows as the run's config.
    """

    def __init__(
        self,
        run_dir: Path,
        mode: Literal["online", "offline"],
        project: str,
        entity: str | None,
        tags: list[str],
        config: Mapping[str, Any],
    ):
        os.environ.setdefault("WANDB_SILENT", "true")  # and never asks for a key
        # Reports of wandb's own errors to its makers hold up the end of a process that cannot reach them.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb  # here: a thread that imports while this one forks data loaders would leave them locked modules

        self.wandb = wandb
        self.run_dir = run_dir
        self.mode = mode
        self.options: dict[str, Any] = {
            "dir": run_dir,
            "project": project,
            "entity": entity,
            "tags": tags,
            "config": dict(config),
            "name": run_dir.name,
            "id": _wandb_id(run_dir),
            "resume": "allow",
        }
        self.rows: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self.thread.start()

    def write(self, row: Mapping[str, Any]) -> None:
        self.rows.put(row)

    def close(self) -> None:
        self.rows.put(None)
        self.thread.join(CLOSE_SECONDS)
        if self.thread.is_alive():
            log.warning("wandb did not end within %.0f s and is left alone; %s", CLOSE_SECONDS, self._where())

    def _work(self) -> None:
        try:
            run = self._online_run() if self.mode == "online" else None
            run = run or self._offline_run()
            while (row := self.rows.get()) is not None:
                prefix = "" if row["kind"] == "eval" else f"{row['kind']}/"
                run.log({prefix + name: value for name, value in _figures(row).items()}, step=row["step"])
            self._finish(run)
            self.wandb.teardown()  # here: at the end of the process it would wait for the server without limit
        except Exception as error:  # whatever it is, the run matters more than its picture on a page
            log.warning("wandb failed: %s; the run goes on without it; %s", _first_line(error), self._where())

    def _online_run(self) -> Any:
        """A run on the server; None without one."""
        try:
            if not self.wandb.login(prompt=False, verify=False):
                log.warning("wandb is offline: no API key (set WANDB_API_KEY, or run `wandb login`)")
                return None
            return self._init("online")
        except Exception as error:
            log.warning("wandb is offline: its server did not let the run in (%s)", _first_line(error))
            self.wandb.teardown()  # its own process holds the id of the run that it could not start
            return None

    def _offline_run(self) -> Any:
        run = self._init("offline")
        _note_unsynced(self.run_dir, run)
        return run

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        settings = self.wandb.Settings(
            console="off",
            silent=True,
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
        )
        return self.wandb.init(mode=mode, settings=settings, **self.options)

    def _finish(self, run: Any) -> None:
        try:
            run.finish()
        except TimeoutError:
            _note_unsynced(self.run_dir, run)
            log.warning("wandb's server did not take all figures; %s", self._where())

    def _where(self) -> str:
        return f"all figures are in {self.run_dir / METRICS}"


def _wandb_id(run_dir: Path) -> str:
    """The id under which wandb knows this run: made once, kept in its folder."""
    path = run_dir / WANDB
    if not path.is_file():
        write_json(path, {"id": uuid.uuid4().hex[:12], "unsynced": []})
    return read_json(path)["id"]


def _note_unsynced(run_dir: Path, run: Any) -> None:
    """Remember that the files of `run` are not on the server; the report says how they get there."""
    noted = read_json(run_dir / WANDB)
    folder = f"wandb/{Path(run.settings.sync_dir).name}"
    write_json(run_dir / WANDB, {**noted, "unsynced": [*noted["unsynced"], folder]})


def open_sinks(
    run_dir: Path, logger: Mapping[str, Any], config: Mapping[str, Any], facts: Mapping[str, Any] | None = None
) -> list[Sink]:
    """The sinks that the config asks for; metrics.jsonl is always one of them.

    Args:
        run_dir: the run's folder.
        logger: the config's group of that name.
        config: all of it, for wandb's page.
        facts: of the run that no config holds, such as `commit` and `data_hash`; beside the config on wandb's page.
    """
    sinks: list[Sink] = [JsonLines(run_dir)]
    if logger["tensorboard"]:
        try:
            sinks.append(TensorBoard(run_dir))
        except OSError as error:
            log.warning("TensorBoard did not start: %s; the run goes on without it", error)
    options = dict(logger["wandb"])
    if options["mode"] != "off":
        try:
            sinks.append(Wandb(run_dir, config={**config, **(facts or {})}, **options))
        except Exception as error:  # not installed, no disk
            log.warning(
                "wandb (logger.wandb.mode=%s) did not start: %s; the run goes on without it, its figures are in "
                "metrics.jsonl",
                options["mode"],
                error,
            )
    return sinks


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
