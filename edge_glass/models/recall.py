"""Embeddings drawn to what a closed vocabulary can say."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize


class CaptionRecall(nn.Module):
    """The captions that an embedding may mean, averaged by how likely each is: one step of a modern Hopfield network
    (Ramsauer et al. 2021, https://arxiv.org/abs/2008.02217; for CLIP: Fürst et al. 2022,
    https://arxiv.org/abs/2110.11316).

    A picture and a sound of one thing each agree with its caption, but what they get wrong differs, and their errors
    meet when they are compared with each other. As mixtures of captions they are compared by how likely they mean the
    same: with captions nearly at right angles, the dot product of two mixtures is the probability of that. What is no
    caption of the memory cannot be said, so this is for closed vocabularies.

    Args:
        memory: `[captions, dim]`, embeddings of the captions.
        scale: of the cosines in the softmax; large recalls one caption, small a mean of many.

    Raises:
        ValueError: a scale that is not positive.
    """

    memory: Tensor

    def __init__(self, memory: Tensor, scale: float):
        super().__init__()
        if scale <= 0:
            raise ValueError(f"the scale of recall is {scale}; it must be positive")
        self.scale = scale
        self.register_buffer("memory", normalize(memory.float(), dim=-1))

    def forward(self, embeddings: Tensor) -> Tensor:
        """`[..., dim]` to `[..., dim]`."""
        with torch.autocast(embeddings.device.type, enabled=False):
            cosines = normalize(embeddings.float(), dim=-1) @ self.memory.T
            return torch.softmax(self.scale * cosines, dim=-1) @ self.memory
