"""`python train.py` in a process of its own, watched while it runs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Far beyond any sound run of this size: one that takes longer hangs.
LIMIT_SECONDS = 240.0


class Hangs(Exception):
    """A job that does not end, or does not come to where it should."""


class Job:
    """One command.

    Args:
        arguments: of train.py.
        output: the file for what it prints.
        environment: beside this process's own.
    """

    def __init__(self, arguments: list[str], output: Path, environment: Mapping[str, str] | None = None):
        self.output = output
        self.began = time.monotonic()
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "train.py", *arguments],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own, which can be killed as a whole
            )

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Until the condition holds: True; or the job has ended: False."""
        while not condition():
            if self.process.poll() is not None:
                return condition()
            if time.monotonic() - self.began > LIMIT_SECONDS:
                self.kill()
                raise Hangs(f"not there after {LIMIT_SECONDS:.0f} s")
            time.sleep(0.001)
        return True

    def end(self) -> int:
        """Wait until it ends, and return its exit code."""
        self.wait_for(lambda: self.process.poll() is not None)
        return self.process.returncode

    def tell(self, number: signal.Signals, everyone: bool = True) -> None:
        """Send a signal to all of its processes, or to the first one only."""
        if self.process.poll() is None:
            (os.killpg if everyone else os.kill)(self.process.pid, number)

    def kill(self) -> None:
        """End all of its processes at once."""
        self.tell(signal.SIGKILL)
        self.process.wait()

    def ranks(self) -> list[int]:
        """Processes of the ranks that it started: its children's children."""
        return [rank for child in _children(self.process.pid) for rank in _children(child)]

    def text(self) -> str:
        """What it printed; of a progress bar the last state."""
        lines = self.output.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(line.rpartition("\r")[2] for line in lines)


def _children(process: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:  # it has ended
        return []


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """The whole rows of metrics.jsonl."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def step_of(run_dir: Path) -> int:
    """The last step that is in metrics.jsonl."""
    return max((row["step"] for row in rows_of(run_dir)), default=0)


def checkpoints_of(run_dir: Path) -> list[Path]:
    """Checkpoints that have their final name, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def half_written(run_dir: Path) -> bool:
    """True while a checkpoint is being written, or was when its process died."""
    return any((run_dir / "checkpoints").glob(".step-*.tmp"))
