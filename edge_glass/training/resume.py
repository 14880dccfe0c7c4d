"""Which run a process takes up: a new one, its own after a crash, or one that was stopped."""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from edge_glass.config import ConfigError
from edge_glass.errors import UserError
from edge_glass.runs import AUTO, CONFIG, differences, holds_run, is_finished
from edge_glass.training.checkpoints import Checkpoints, read_manifest

log = logging.getLogger(__name__)
LOCK = ".lock"
# A killed run's last process may take a few seconds to notice that it is alone.
LOCK_SECONDS = 30


@dataclass
class Start:
    """Where a run begins.

    Attributes:
        run_dir: its folder.
        checkpoint: what it goes on from; None: from the beginning.
        goes_on: whether the folder holds its earlier part.
        finished: nothing is left to do.
    """

    run_dir: Path
    checkpoint: Path | None = None
    goes_on: bool = False
    finished: bool = False

    @property
    def step(self) -> int:
        return read_manifest(self.checkpoint)["step"] if self.checkpoint else 0

    @property
    def global_batch(self) -> int | None:
        """Samples a step of the earlier part, over all its ranks."""
        return read_manifest(self.checkpoint)["global_batch"] if self.checkpoint else None


def find_start(config: DictConfig, run_dir: Path, stack: ExitStack) -> Start:
    """What `training.resume` means here.

    A folder: that run goes on. `auto`: the run that this folder holds, else the newest unfinished one of the same
    config beside it, else a new one. null: a new run, except that a job which SLURM has started again goes on in its
    folder.

    Args:
        config: checked and resolved.
        run_dir: the folder of the run, or of a new one.
        stack: keeps the folder for this process alone until it is closed.

    Raises:
        ConfigError: a run of another config is in the folder, or one that was not to be resumed.
        UserError: another process trains there.
    """
    resume = config.training.resume
    if resume is None and holds_run(run_dir) and not int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        raise ConfigError(
            f"{run_dir} holds a run already: give training.resume=auto to go on with it, or another hydra.run.dir"
        )
    if resume == AUTO and not holds_run(run_dir):
        run_dir = _newest_unfinished(config, run_dir) or run_dir
    stack.enter_context(_held(run_dir))
    if not holds_run(run_dir):
        return Start(run_dir)
    if resume in (None, AUTO):
        changes = differences(_config_of(run_dir), config)
        if changes:
            raise ConfigError(
                f"{run_dir} holds a run of another config:\n  " + "\n  ".join(changes) + "\ngive the first of each two "
                "values to go on with it, or another hydra.run.dir for a new run"
            )
        if is_finished(run_dir):
            return Start(run_dir, goes_on=True, finished=True)
    checkpoint = Checkpoints(run_dir).newest_whole()
    if checkpoint is None:
        log.warning("%s has no checkpoint: the run starts from its beginning", run_dir)
    return Start(run_dir, checkpoint, goes_on=True)


@contextmanager
def _held(run_dir: Path) -> Iterator[None]:
    """The folder for this process alone, until it ends, however it ends."""
    new = not run_dir.exists()
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("%s is in use by another process; waiting up to %d s for it to end", run_dir, LOCK_SECONDS)
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise UserError(f"{run_dir} is being trained by another process; wait for it, or stop it") from None
    try:
        yield
    finally:
        lock.release()
        if {path.name for path in run_dir.iterdir()} <= {LOCK}:  # a run that never began
            (run_dir / LOCK).unlink(missing_ok=True)
            if new:
                run_dir.rmdir()


def _newest_unfinished(config: DictConfig, run_dir: Path) -> Path | None:
    """A run's folder is outputs/<date>/<name>-<time>; other places are not searched."""
    if not run_dir.name.startswith(f"{config.name}-"):
        return None
    found = run_dir.absolute().parent.parent.glob(f"*/{config.name}-*/{CONFIG}")
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        folder = path.parent
        if not is_finished(folder) and not differences(_config_of(folder), config) and not _in_use(folder):
            return folder
    log.info("no unfinished run of this config in %s: a new one starts", run_dir.parent.parent)
    return None


def _in_use(folder: Path) -> bool:
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def _config_of(folder: Path) -> DictConfig:
    config = OmegaConf.load(folder / CONFIG)
    assert isinstance(config, DictConfig)
    return config
