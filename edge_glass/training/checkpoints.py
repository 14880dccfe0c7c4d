"""Checkpoints: whole or not there, without the weights that were never trained, readable without pickle's code."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edge_glass.decoders.decoder import LanguageDecoder
from edge_glass.encoders.tokens import Encoder
from edge_glass.encoders.weights import weights_hash
from edge_glass.errors import UserError
from edge_glass.runs import CHECKPOINTS, METRICS, read_json, write_json

log = logging.getLogger(__name__)
WEIGHTS = "model.safetensors"
AVERAGE = "average.safetensors"
STATE = "state.pt"
MANIFEST = "manifest.json"
BEST = "best.json"
# What a full or failing disk raises, in the words of the three libraries that write.
DISK_ERRORS = (OSError, RuntimeError, SafetensorError)


class CheckpointError(UserError):
    """A checkpoint that is not there or does not fit."""


class Checkpoints:
    """The checkpoints of one run: the last few, and the best.

    A checkpoint is written beside the training, by a thread, from a copy of the moment: to a temporary folder first,
    which gets its name when every file is on the disk. A process that dies at any time leaves whole checkpoints only;
    what a disk damages later is found by the hashes in the manifest.

    Args:
        run_dir: the run's folder.
        keep_last: how many of the newest are kept beside the best.
        facts: of the run, for the manifest of each checkpoint.
    """

    def __init__(self, run_dir: Path, keep_last: int = 2, facts: Mapping[str, Any] | None = None):
        self.folder = Path(run_dir) / CHECKPOINTS
        self.keep_last = keep_last
        self.facts = dict(facts or {})
        self.failures = 0
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def save(
        self, step: int, task: nn.Module, state: Mapping[str, Any], average: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write a checkpoint of this moment; the writing goes on when this returns.

        A disk that is full or fails is warned about and counted in `failures`; the older checkpoints stay.

        Args:
            step: optimizer steps done.
            task: whose trained weights are stored; frozen towers are loaded from where they came from.
            state: everything else that a resumed run needs; tensors and plain values only.
            average: averaged weights, by the names of the trained ones, if the run has them.
        """
        self.wait()
        weights = {WEIGHTS: _copied(trained_state(task))}
        if average is not None:
            weights[AVERAGE] = _copied(average)
        moment = _copied({"step": step, **state})
        self._writing = self._threads.submit(self._write, step, weights, moment)

    def wait(self) -> None:
        """Until no checkpoint is being written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def mark_best(self, step: int, metric: str, value: float) -> None:
        """Name the checkpoint of `step` the best; it is kept until a better one is named."""
        if step not in self.steps():
            log.warning("step %d is the best so far, but its checkpoint could not be written", step)
            return
        write_json(self.folder / BEST, {"step": step, "metric": metric, "value": value})
        self._prune()

    def best(self) -> dict[str, Any] | None:
        """`step`, `metric` and `value` of the best checkpoint, or None."""
        path = self.folder / BEST
        return read_json(path) if path.is_file() else None

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, oldest first."""
        self.wait()
        return self._steps()

    def find(self, which: str) -> Path:
        """The folder of the `last` or the `best` checkpoint.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.folder}; the run stopped before its first")
        best = self.best()
        folder = self._path(best["step"] if which == "best" and best is not None else steps[-1])
        if (fault := damage(folder)) is not None:
            raise CheckpointError(
                f"{folder} is damaged: {fault}; there are also {[s for s in steps if s != steps[-1]]}"
            )
        return folder

    def newest_whole(self) -> Path | None:
        """The newest checkpoint that is as it was written; damaged ones are set aside with a warning."""
        for step in reversed(self.steps()):
            folder = self._path(step)
            fault = damage(folder)
            if fault is None:
                return folder
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
            log.warning("%s is damaged (%s): set aside as %s; the one before it is used", folder, fault, aside.name)
        return None

    def forget_after(self, step: int) -> None:
        """Forget a best checkpoint that a run which goes on from `step` will reach again."""
        best = self.best()
        if best is not None and best["step"] > step:
            (self.folder / BEST).unlink()

    def _write(self, step: int, weights: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        final = self._path(step)
        temporary = self.folder / f".{final.name}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for torn in self.folder.glob(".*.tmp"):  # of a process that was killed
                shutil.rmtree(torn) if torn.is_dir() else torn.unlink()
            temporary.mkdir()
            for name, tensors in weights.items():
                save_file(tensors, temporary / name)
            torch.save(state, temporary / STATE)
            for name in weights:  # safetensors makes them the owner's alone
                (temporary / name).chmod((temporary / STATE).stat().st_mode)
            files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
            manifest = {"step": step, "files": files, **self.facts}
            write_json(temporary / MANIFEST, {**manifest, "sha256": _hash_of(manifest)})
            for path in (*temporary.iterdir(), temporary, *self.folder.parent.glob(METRICS)):
                _to_disk(path)
            self._remove(final)
            os.replace(temporary, final)
            _to_disk(self.folder)
        except DISK_ERRORS as error:
            shutil.rmtree(temporary, ignore_errors=True)
            self.failures += 1
            log.warning(
                "the checkpoint of step %d could not be written to %s: %s; training goes on, the newest is of step %s",
                step,
                self.folder,
                str(error).splitlines()[0],
                self._steps()[-1] if self._steps() else "none yet",
            )
        else:
            self._prune()

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    def _steps(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def _prune(self) -> None:
        best = self.best()
        steps = self._steps()
        keep = {*steps[-self.keep_last :], best["step"] if best else -1}
        for step in steps:
            if step not in keep:
                self._remove(self._path(step))

    def _remove(self, folder: Path) -> None:
        if folder.exists():  # under another name first: half a checkpoint must not look like one
            gone = folder.with_name(f".{folder.name}.old.tmp")
            shutil.rmtree(gone, ignore_errors=True)
            os.replace(folder, gone)
            shutil.rmtree(gone)


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if they are as they were written."""
    try:
        manifest = read_manifest(folder)
        if manifest.pop("sha256", None) != _hash_of(manifest):
            return f"{MANIFEST} is not as it was written"
        for name, expected in manifest["files"].items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _fingerprint(folder / name) != expected:
                return f"{name} is not as it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: {error}"
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's step, the hashes of its files, and the facts of the run that wrote it."""
    return read_json(folder / MANIFEST)


def trained_state(task: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the task, without those of frozen encoders and of what a decoder only adapts."""
    left_out = {f"{part}.{name}" for part, names in _loaded(task).items() for name in names}
    return {name: tensor.contiguous() for name, tensor in task.state_dict().items() if name not in left_out}


def tower_identities(task: nn.Module) -> dict[str, str]:
    """A hash of the weights of each part that a checkpoint builds on without holding it."""
    return {name: weights_hash(loaded) for name, loaded in _loaded(task).items()}


def load_weights(task: nn.Module, folder: Path, name: str = WEIGHTS) -> None:
    """Put a checkpoint's weights into a task that was built from the same config.

    Args:
        task: to load into.
        folder: of the checkpoint.
        name: `WEIGHTS` or `AVERAGE`.

    Raises:
        CheckpointError: weights that are missing there, or that the task has no place for, or that were trained on
            top of other frozen towers.
    """
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"no weights at {path}")
    stored = load_file(path)
    expected = trained_state(task)
    missing, unknown = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    odd = [name for name in expected.keys() & stored.keys() if expected[name].shape != stored[name].shape]
    if missing or unknown or odd:
        raise CheckpointError(
            f"{path} is of another model: it lacks {missing[:3]}, has {unknown[:3]} too many and {odd[:3]} in another "
            "shape; build the model from the config.yaml beside its checkpoints"
        )
    _check_loaded(task, folder, path)
    task.load_state_dict(stored, strict=False)


def _check_loaded(task: nn.Module, folder: Path, path: Path) -> None:
    written = read_manifest(folder).get("towers", {})
    other = [tower for tower, identity in tower_identities(task).items() if written.get(tower, identity) != identity]
    if other:
        raise CheckpointError(
            f"{path} was trained on top of other weights of the frozen {', '.join(other)} than those loaded now; put "
            "back the ones named in the config.yaml beside its checkpoints"
        )


def take_over(task: nn.Module, folder: Path) -> list[str]:
    """Begin from the weights of another run: every part of the task that its checkpoint holds.

    Args:
        task: whose towers are built from the same config.
        folder: of the checkpoint.

    Returns:
        The parts that were taken over, such as `model.towers.image`.

    Raises:
        CheckpointError: the checkpoint lacks weights of the towers, holds them in another shape, or was trained on top
            of other frozen weights.
    """
    path = folder / judged_weights(folder)
    stored = load_file(path)
    expected = trained_state(task)
    shared = expected.keys() & stored.keys()
    missing = sorted(name for name in expected if name.startswith("model.") and name not in shared)
    odd = sorted(name for name in shared if expected[name].shape != stored[name].shape)
    if missing or odd:
        raise CheckpointError(
            f"{path} does not hold the towers of this config: it lacks {missing[:3]} and has {odd[:3]} in another "
            "shape; give the encoder and backbone settings of the config.yaml beside its checkpoints"
        )
    _check_loaded(task, folder, path)
    task.load_state_dict({name: stored[name] for name in shared}, strict=False)
    return list(
        dict.fromkeys(
            ".".join(name.split(".")[: 3 if name.startswith("model.") else 1]) for name in expected if name in shared
        )
    )


def judged_weights(folder: Path) -> str:
    """The name of the weights that a checkpoint is judged by: the averaged ones, if it has them."""
    return AVERAGE if (folder / AVERAGE).is_file() else WEIGHTS


def load_state(folder: Path) -> dict[str, Any]:
    """Everything of a checkpoint but the weights, read without running code."""
    return torch.load(folder / STATE, map_location="cpu", weights_only=True)


def _loaded(task: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Part -> the weights by their names in it that stay as they were loaded from elsewhere."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, module in task.named_modules():
        if isinstance(module, Encoder) and module.frozen:
            found[name] = module.state_dict()
        elif isinstance(module, LanguageDecoder) and module.adapted:
            trained = {key for key, parameter in module.named_parameters() if parameter.requires_grad}
            found[name] = {key: tensor for key, tensor in module.state_dict().items() if key not in trained}
    return found


def _copied(value: Any) -> Any:
    """The same containers and values with copies of the tensors, in the host's memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value


def _hash_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
