"""Alignment: towers, and a loss that compares their embeddings."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from edge_glass.data.batch import Batch
from edge_glass.models.alignment import MultimodalAlignmentModel
from edge_glass.tasks.task import Losses, Task


@dataclass
class LossGradient:
    """The gradient of a loss in all that the loss reads: the embeddings and its own parameters.

    Attributes:
        embeddings: modality -> `[inputs, dim]`.
        parameters: one tensor for each of `task.loss_parameters()`; empty to leave them out.
        scale: what these gradients were scaled with, for further losses.
    """

    embeddings: dict[str, Tensor]
    parameters: list[Tensor] = field(default_factory=list)
    scale: Callable[[Tensor], Tensor] = lambda loss: loss


class AlignmentTask(Task):
    """Embeds a batch and measures how well its modalities agree.

    Args:
        model: maps a `Batch` to embeddings, modality -> `[inputs, dim]`.
        loss: maps embeddings and concept ids, both by modality, to a scalar and figures for the log.
    """

    compares = True

    def __init__(self, model: MultimodalAlignmentModel, loss: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """The embeddings of a batch, modality -> `[inputs, dim]`."""
        return self.model(batch)

    def loss_of(self, embeddings: dict[str, Tensor], concept_ids: dict[str, Tensor]) -> Losses:
        """The loss of embeddings, a scalar, and figures for the log."""
        return self.loss(embeddings, concept_ids)

    def loss_parameters(self) -> list[nn.Parameter]:
        """What the loss itself learns, such as its temperatures."""
        return [parameter for parameter in self.loss.parameters() if parameter.requires_grad]

    def forward(self, batch: Batch, terms: float | None = None, gradient: LossGradient | None = None) -> Losses:
        """The loss of a batch; or, when the loss's gradient is known already, a stand-in that passes it on.

        The stand-in is zero and linear: embeddings and loss parameters, each times its gradient, summed, minus that
        value.
        Backpropagation through it gives every parameter the gradient that the loss would have given. It is
        how gradients reach the model when the loss was computed over more samples than can be embedded at
        once (`training/accumulation.py`); it goes through `forward` because DistributedDataParallel averages
        only what does.

        Args:
            batch: the samples.
            terms: not needed; see `Task`.
            gradient: gradient of the loss in the embeddings of this batch and in the loss's parameters.

        Returns:
            The loss and figures for the log without `gradient`; with it the stand-in, a scalar, and none.
        """
        return self.alignment(self.encode(batch), batch, gradient)

    def alignment(self, embeddings: dict[str, Tensor], batch: Batch, gradient: LossGradient | None) -> Losses:
        """What `forward` gives, from embeddings."""
        if gradient is None:
            return self.loss_of(embeddings, batch.ids())
        pairs = [(embeddings[modality], known) for modality, known in gradient.embeddings.items()]
        if gradient.parameters:
            pairs += zip(self.loss_parameters(), gradient.parameters, strict=True)
        products = [(tensor.float() * known.float()).sum() for tensor, known in pairs]
        stand_in = torch.stack(products).sum()
        return stand_in - stand_in.detach(), {}
