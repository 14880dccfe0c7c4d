"""What the training loop asks of whatever it trains."""

from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from edge_glass.data.batch import SkippedRow


class TrainingBatch(Protocol):
    """What the loop needs of a batch; the task that reads it knows the rest.

    Attributes:
        sample_ids: names of the rows, for messages.
        skipped: rows that were met on the way to this batch and could not be decoded.
    """

    sample_ids: list[str]
    skipped: list[SkippedRow]

    def __len__(self) -> int: ...
    def to(self, device: torch.device | str) -> Self: ...
    def split(self, parts: int) -> list[Self]: ...


class Task(nn.Module):
    """A model with its loss.

    `forward(batch, terms)` gives the loss of a batch, a scalar, and figures for the log. Where the loss is a mean over
    terms (answer tokens, puzzles), `terms` is how many a rank has in the whole step, so that the losses of
    micro-batches add up to the mean over all of them; None: those of this batch.

    Attributes:
        compares: whether the loss compares the samples of a batch with each other, so that the losses of micro-batches
            are not parts of the loss of a batch; see `training/accumulation.py`.
        leaves_out: whether a step may leave out some of the parameters.
    """

    compares = False
    leaves_out = False

    def terms(self, batch: Any) -> int:
        """How many terms the mean of a batch's loss has."""
        return len(batch)

    def forget_step(self) -> None:
        """Called when a step came to no finite loss or gradient and was left out."""

    def state_of_rank(self) -> dict[str, Any]:
        """What this rank takes from step to step beside the weights; tensors and plain values only."""
        return {}

    def restore_state_of_rank(self, state: dict[str, Any]) -> None:
        """Take up what `state_of_rank` gave."""


Losses = tuple[Tensor, dict[str, Tensor]]
