"""What is trained: a model and its loss as one Module, so that DistributedDataParallel wraps one thing."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from edge_glass.data.batch import Batch


@dataclass
class LossGradient:
    """The gradient of a loss in all that the loss reads: the embeddings and its own parameters.

    Attributes:
        embeddings: modality -> `[batch, dim]`.
        parameters: one tensor for each of `task.loss_parameters()`; empty to leave them out.
    """

    embeddings: dict[str, Tensor]
    parameters: list[Tensor] = field(default_factory=list)


class AlignmentTask(nn.Module):
    """Embeds a batch and measures how well its modalities agree.

    Args:
        model: maps a `Batch` to embeddings, modality -> `[batch, dim]`.
        loss: maps embeddings and concept ids, both by modality, to a scalar and figures for the log.
    """

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """The embeddings of a batch, modality -> `[inputs, dim]`."""
        return self.model(batch)

    def loss_of(
        self, embeddings: dict[str, Tensor], concept_ids: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of embeddings, a scalar, and figures for the log."""
        return self.loss(embeddings, concept_ids)

    def loss_parameters(self) -> list[nn.Parameter]:
        """What the loss itself learns, such as its temperatures."""
        return [parameter for parameter in self.loss.parameters() if parameter.requires_grad]

    def forward(self, batch: Batch, gradient: LossGradient | None = None):
        """The loss of a batch; or, when the loss's gradient is known already, a stand-in that passes it on.

        The stand-in is linear: embeddings and loss parameters, each times its gradient, summed.
        Backpropagation through it gives every parameter the gradient that the loss would have given. It is
        how gradients reach the model when the loss was computed over more samples than can be embedded at
        once (`training/accumulation.py`); it goes through `forward` because DistributedDataParallel averages
        only what does.

        Args:
            batch: the samples.
            gradient: gradient of the loss in the embeddings of this batch and in the loss's parameters.

        Returns:
            `(loss, log figures)` without `gradient`; with it the stand-in, a scalar.
        """
        embeddings = self.encode(batch)
        if gradient is None:
            return self.loss_of(embeddings, batch.ids())
        pairs = [(embeddings[modality], known) for modality, known in gradient.embeddings.items()]
        if gradient.parameters:
            pairs += zip(self.loss_parameters(), gradient.parameters, strict=True)
        return sum((tensor.float() * known.float()).sum() for tensor, known in pairs)
