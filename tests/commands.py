"""The commands as a person runs them: what they print, what they leave, how they end."""

import logging
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import mini

ROOT = mini.CONF.parent


@dataclass
class Outcome:
    """How a command ended, and everything that it left in the folder it ran in."""

    code: int
    stdout: str
    stderr: str
    files: list[str]

    def message(self) -> str:
        """The one message of a command that failed as it should."""
        assert self.code == 2, self.stderr
        assert "Traceback" not in self.stderr
        assert self.files == []
        assert self.stderr.count("error: ") == 1, self.stderr
        return self.stderr[self.stderr.index("error: ") :]


def left_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path != folder / "outputs")


def run_in_process(tmp_path: Path, monkeypatch, capfd) -> Iterator[Callable[..., Outcome]]:
    """Runs scripts in this process, where torch is already imported, in a folder of its own."""
    folder = tmp_path / "here"
    folder.mkdir()
    root = logging.getLogger()
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    handlers, level = list(root.handlers), root.level

    def run(script: str, *arguments: str) -> Outcome:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        output = capfd.readouterr()
        return Outcome(code, output.out, output.err, left_in(folder))

    yield run
    root.handlers[:] = handlers  # Hydra's hold the captured stderr of this test
    root.setLevel(level)
    for number, handler in signals.items():
        signal.signal(number, handler)


def in_a_process(folder: Path, script: str, *arguments: str, flags=()) -> Outcome:
    """Runs a script as a person would."""
    ended = subprocess.run(
        [sys.executable, *flags, str(ROOT / script), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
    )
    return Outcome(ended.returncode, ended.stdout, ended.stderr, left_in(folder))
