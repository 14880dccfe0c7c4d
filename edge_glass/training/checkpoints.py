"""Checkpoints: whole or not there, without the weights that were never trained, readable without pickle's code."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edge_glass.encoders.tokens import Encoder
from edge_glass.errors import UserError
from edge_glass.runs import CHECKPOINTS, read_json, write_json

WEIGHTS = "model.safetensors"
STATE = "state.pt"
BEST = "best.json"


class CheckpointError(UserError):
    """A checkpoint that is not there or does not fit."""


class Checkpoints:
    """The checkpoints of one run: the last few, and the best.

    Args:
        run_dir: the run's folder.
        keep_last: how many of the newest are kept beside the best.
    """

    def __init__(self, run_dir: Path, keep_last: int = 1):
        self.folder = Path(run_dir) / CHECKPOINTS
        self.keep_last = keep_last

    def save(self, step: int, task: nn.Module, state: dict[str, Any]) -> Path:
        """Write a checkpoint: to a temporary folder first, which then gets its name.

        Args:
            step: optimizer steps done.
            task: whose trained weights are stored; frozen towers are loaded from where they came from.
            state: everything else that a resumed run needs; tensors and plain values only.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self._path(step)
        temporary = self.folder / f".{final.name}.tmp"
        for torn in self.folder.glob(".step-*.tmp"):  # by a process that was killed
            shutil.rmtree(torn)
        temporary.mkdir()
        save_file(trained_state(task), temporary / WEIGHTS)
        torch.save({"step": step, **state}, temporary / STATE)
        for file in temporary.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        self._prune()
        return final

    def mark_best(self, step: int, metric: str, value: float) -> None:
        """Name the checkpoint of `step` the best; it is kept until a better one is named."""
        write_json(self.folder / BEST, {"step": step, "metric": metric, "value": value})
        self._prune()

    def best(self) -> dict[str, Any] | None:
        """`step`, `metric` and `value` of the best checkpoint, or None."""
        path = self.folder / BEST
        return read_json(path) if path.is_file() else None

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, oldest first."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def find(self, which: str) -> Path:
        """The folder of the `last` or the `best` checkpoint.

        Raises:
            CheckpointError: there is none.
        """
        steps = self.steps()
        best = self.best()
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.folder}; the run stopped before its first")
        if which == "best" and best is not None:
            return self._path(best["step"])
        return self._path(steps[-1])

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    def _prune(self) -> None:
        best = self.best()
        steps = self.steps()
        keep = {*steps[-self.keep_last :], best["step"] if best else -1}
        for step in steps:
            if step not in keep:
                shutil.rmtree(self._path(step))


def trained_state(task: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the task, without those of frozen encoders."""
    frozen = tuple(f"{name}." for name, module in task.named_modules() if isinstance(module, Encoder) and module.frozen)
    state = task.state_dict()
    return {name: tensor.contiguous() for name, tensor in state.items() if not name.startswith(frozen or ("\0",))}


def load_weights(task: nn.Module, folder: Path) -> None:
    """Put a checkpoint's weights into a task that was built from the same config.

    Raises:
        CheckpointError: weights that are missing there, or that the task has no place for.
    """
    path = folder / WEIGHTS
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
    task.load_state_dict(stored, strict=False)


def load_state(folder: Path) -> dict[str, Any]:
    """Everything of a checkpoint but the weights, read without running code."""
    return torch.load(folder / STATE, map_location="cpu", weights_only=True)
