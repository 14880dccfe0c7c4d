"""What every encoder gives, and what every encoder promises."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass
class Tokens:
    """A batch of token sequences.

    Attributes:
        tokens: `[batch, tokens, dim]`. What stands where the mask is False must not matter to a reader.
        mask: `[batch, tokens]` bool, True for real tokens.
    """

    tokens: Tensor
    mask: Tensor


class Encoder(nn.Module, ABC):
    """A backbone that turns the inputs of one modality into `Tokens`.

    A frozen encoder stays as it is: no gradient, no optimizer state, and eval mode also while the model
    around it trains.

    Args:
        backbone: the transformers model.
        dim: width of the tokens.
        frozen: whether the backbone stays as it is.
    """

    backbone: PreTrainedModel

    def __init__(self, backbone: PreTrainedModel, dim: int, frozen: bool):
        super().__init__()
        self.backbone = backbone
        self.dim = dim
        self.frozen = frozen
        if frozen:
            backbone.requires_grad_(False)
        self.train(not frozen)

    def train(self, mode: bool = True) -> "Encoder":
        return super().train(mode and not self.frozen)

    def forward(self, inputs) -> Tokens:
        """Tokens of a batch of inputs; without gradient when frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self._encode(inputs)

    def describe(self) -> dict[str, Any]:
        """What its tokens depend on beside weights and inputs."""
        config = {
            key: value
            for key, value in self.backbone.config.to_dict().items()
            if key not in ("_name_or_path", "transformers_version")
        }
        plain = (bool, int, float, str, list)
        own = {
            key: value
            for key, value in vars(self).items()
            if isinstance(value, plain) and key != "training" and not key.startswith("_")
        }
        return {"class": type(self).__name__, **own, "config": config}

    @abstractmethod
    def _encode(self, inputs) -> Tokens:
        """Tokens of a batch of inputs."""

    def _freeze_unread(self, tokens: Tensor) -> None:
        """Freeze what the tokens do not depend on, such as a pooled head.

        Such a parameter never receives a gradient; left trainable, it would count as trained and make
        DistributedDataParallel wait for it.
        """
        trainable = [parameter for parameter in self.backbone.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(tokens.sum(), trainable, allow_unused=True)
        for parameter, gradient in zip(trainable, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)
