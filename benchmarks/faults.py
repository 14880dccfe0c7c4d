"""What may happen to a run: each fault starts one, breaks it or its surroundings, and lets it end."""

import os
import random
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.jobs import ROOT, Job, checkpoints_of, half_written, step_of

STEPS, SAVE_EVERY = 40, 8
TMPFS_MEGABYTES = 48


class TooLate(Exception):
    """The run ended before the fault came."""


@dataclass
class Round:
    """One run that is to be broken.

    Attributes:
        folder: for all of its files.
        arguments: of train.py, without the run's folder.
        draw: decides all that is random.
        facts: what is told of the round in the results.
    """

    folder: Path
    arguments: list[str]
    draw: random.Random
    facts: dict[str, object] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def start(self, *more: str, environment: dict[str, str] | None = None) -> Job:
        return Job([*self.arguments, f"hydra.run.dir={self.run_dir}", *more], self.folder / "broken.txt", environment)

    def started(self, *more: str, first: int = 1, last: int = STEPS - 8) -> Job:
        """A job that has come to a step drawn at random."""
        job = self.start(*more)
        self.come_to(job, self.draw.randint(first, last))
        return job

    def come_to(self, job: Job, step: int) -> None:
        self.facts["fault at step"] = step
        self.wait_for(job, lambda: step_of(self.run_dir) >= step)

    def wait_for(self, job: Job, condition: Callable[[], bool]) -> None:
        if not job.wait_for(condition) or job.process.poll() is not None:
            raise TooLate(job.text())

    def interval(self) -> int:
        """Steps that a killed run may lose: those since the last checkpoint, which takes a moment to be written."""
        return SAVE_EVERY * (2 if half_written(self.run_dir) else 1)


@dataclass
class End:
    """How a broken run ended, and what was to be expected.

    Attributes:
        job: that has ended.
        codes: exit codes that tell the truth about it.
        says: regular expression for what it must have printed.
        may_lose: steps.
        resume_says: regular expression for what the run that goes on must print.
    """

    job: Job
    codes: tuple[int, ...]
    says: str = ""
    may_lose: int = 0
    resume_says: str = ""


def kill_job(play: Round) -> End:
    """kill -9 of all processes at once, as by a power cut; with a process that loads data, or without."""
    job = play.started(f"training.workers={play.draw.randrange(2)}")
    job.kill()
    return End(job, (-signal.SIGKILL,), may_lose=play.interval())


def kill_rank(play: Round) -> End:
    """kill -9 of one of two ranks, as by the kernel when memory is out."""
    job = play.started()
    rank = play.draw.randrange(2)
    play.facts["victim"] = f"rank {rank}"
    os.kill(job.ranks()[rank], signal.SIGKILL)
    code = job.end()
    play.facts["exit code"] = code
    return End(job, (2,), rf"error: rank {rank} was killed by SIGKILL", play.interval())


def kill_parent(play: Round) -> End:
    """kill -9 of the process that started the ranks; it is taken up while they may still be ending."""
    job = play.started()
    job.tell(signal.SIGKILL, everyone=False)
    job.process.wait()
    return End(job, (-signal.SIGKILL,), may_lose=play.interval())


def terminate(play: Round) -> End:
    """SIGTERM to the command, as from `kill`, or to all of its processes, as from a cluster."""
    return _stopped_by(play, signal.SIGTERM, everyone=play.draw.random() < 0.5)


def interrupt(play: Round) -> End:
    """SIGINT to all processes, as Ctrl-C in a terminal."""
    return _stopped_by(play, signal.SIGINT, everyone=True)


def kill_while_saving(play: Round) -> End:
    """kill -9 while a checkpoint is being written."""
    job = play.started(last=STEPS // 2)
    while True:
        play.wait_for(job, lambda: half_written(play.run_dir))
        job.tell(signal.SIGSTOP)
        if half_written(play.run_dir):
            break
        job.tell(signal.SIGCONT)
    job.kill()
    return End(job, (-signal.SIGKILL,), may_lose=2 * SAVE_EVERY)


def fill_disk(play: Round) -> End:
    """No space left on the disk of the run's folder, for a while or until the run has ended."""
    play.run_dir.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_MEGABYTES}m", "tmpfs", str(play.run_dir)], check=True, text=True
    )
    ballast = play.run_dir / "ballast"
    job = play.started()
    fill(ballast)
    filled = step_of(play.run_dir)
    if play.draw.random() < 0.7:  # freed while the run goes on
        job.wait_for(lambda: "could not be written" in job.text())
        ballast.unlink()
    code = job.end()
    ballast.unlink(missing_ok=True)
    play.facts["exit code"] = code
    # What is trained while nothing can be saved has to be trained again, if the run ends before there is space.
    return End(job, (0, 2), r"could not be written|error: .*space", 0 if code == 0 else STEPS - filled + SAVE_EVERY)


def truncate_checkpoint(play: Round) -> End:
    """The newest checkpoint of a killed run has lost the end of one of its files."""

    def cut(path: Path) -> None:
        os.truncate(path, play.draw.randrange(path.stat().st_size))

    return _damaged(play, cut)


def flip_byte(play: Round) -> End:
    """One byte of the newest checkpoint of a killed run is another."""

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[play.draw.randrange(len(content))] ^= play.draw.randrange(1, 256)
        path.write_bytes(content)

    return _damaged(play, flip)


def jump_clock(play: Round) -> End:
    """The wall clock jumps by hours while the run has a limit of minutes."""
    clock = play.folder / "clock"
    path = os.pathsep.join([str(ROOT / "benchmarks" / "clock"), str(ROOT)])
    job = play.start(environment={"PYTHONPATH": path, "TORTURE_CLOCK": str(clock)})
    play.come_to(job, play.draw.randint(1, STEPS - 8))
    hours = play.draw.choice([-1, 1]) * play.draw.randint(1, 48)
    play.facts["hours"] = hours
    clock.write_text(str(hours))
    job.end()
    return End(job, (0,))


def _stopped_by(play: Round, number: signal.Signals, everyone: bool) -> End:
    job = play.started()
    play.facts["to"] = "all processes" if everyone else "the first process"
    job.tell(number, everyone)
    play.facts["exit code"] = job.end()
    return End(job, (75,), r"stopped by SIG(TERM|INT) after step \d+, saved as step \d+")


def _damaged(play: Round, damage: Callable[[Path], None]) -> End:
    job = play.started(first=2 * SAVE_EVERY + 1)
    play.wait_for(job, lambda: len(checkpoints_of(play.run_dir)) >= 2)
    job.kill()
    victim = play.draw.choice(sorted(checkpoints_of(play.run_dir)[-1].iterdir()))
    play.facts["file"] = victim.name
    damage(victim)
    lost = play.interval() + SAVE_EVERY
    return End(job, (-signal.SIGKILL,), may_lose=lost, resume_says="is damaged .*the one before it is used")


def fill(ballast: Path) -> None:
    """Write a file until the disk has no byte left."""
    with ballast.open("wb", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


def can_mount(folder: Path) -> bool:
    """Whether this user may have a small disk of its own to fill."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True).returncode == 0
    release(folder)
    folder.rmdir()
    return mounted


def release(run_dir: Path) -> None:
    """Take away the disk that a run's folder was given."""
    while os.path.ismount(run_dir):
        subprocess.run(["umount", str(run_dir)], check=True)


@dataclass(frozen=True)
class Fault:
    """A fault by the name it has in the table.

    Attributes:
        name: as printed.
        strike: breaks a run.
        ranks: of the run.
        torn_rows: train on data of which some rows cannot be decoded.
        mounts: whether it needs a disk of its own.
    """

    name: str
    strike: Callable[[Round], End]
    ranks: int = 1
    torn_rows: bool = False
    mounts: bool = False


FAULTS = (
    Fault("kill -9, all processes", kill_job),
    Fault("kill -9, one of two ranks", kill_rank, ranks=2),
    Fault("kill -9, parent of two ranks", kill_parent, ranks=2),
    Fault("kill -9 while saving", kill_while_saving),
    Fault("SIGTERM", terminate),
    Fault("SIGTERM, two ranks", terminate, ranks=2),
    Fault("Ctrl-C", interrupt),
    Fault("full disk", fill_disk, mounts=True),
    Fault("truncated checkpoint", truncate_checkpoint),
    Fault("flipped byte", flip_byte),
    Fault("corrupt data rows", kill_job, torn_rows=True),
    Fault("clock jump", jump_clock),
)
