"""Averaged weights: an exponential moving average of those that are trained, which is what a run is judged by."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from edge_glass.training.checkpoints import AVERAGE, trained_state


class WeightAverage:
    """The average of a task's trained weights over its steps (Polyak & Juditsky 1992; the recent ones weigh most).

    After a step each averaged parameter is `decay * average + (1 - decay) * parameter`; buffers, such as running
    statistics, are taken as they are.

    Args:
        task: whose weights are averaged; the average begins with those it has now.
        decay: in 0..1; weights of about `1 / (1 - decay)` steps count.
    """

    def __init__(self, task: nn.Module, decay: float):
        self.task = task
        self.weights = {name: tensor.clone() for name, tensor in trained_state(task).items()}
        self._trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of this step."""
        now = trained_state(self.task)
        averaged = [name for name in now if name in self._trained]
        self._average([self.weights[name] for name in averaged], [now[name] for name in averaged], 1)
        for name in now.keys() - self._trained:
            self.weights[name].copy_(now[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The task with the averaged weights, and with its own again afterwards."""
        own = {name: tensor.clone() for name, tensor in trained_state(self.task).items()}
        self.put_in_place()
        try:
            yield
        finally:
            self.task.load_state_dict(own, strict=False)

    def put_in_place(self) -> None:
        """Give the task the averaged weights."""
        self.task.load_state_dict(self.weights, strict=False)

    def restore(self, checkpoint: Path) -> None:
        """Go on from the averages of a checkpoint."""
        stored = load_file(checkpoint / AVERAGE)
        for name, tensor in self.weights.items():
            tensor.copy_(stored[name])
