"""From a sequence of tokens to one vector."""

import torch
from torch import Tensor, nn

from edge_glass.encoders.tokens import Tokens


class SegmentPool(nn.Module):
    """One vector of a fixed width from any number of tokens, keeping as much of their order as wanted.

    The real tokens of a sample, taken as a line of that length, are cut into `segments` equal runs; each run
    is averaged, a token on a cut counting for both sides by its share; the averages stand side by side. One
    segment is masked mean pooling; as many segments as tokens is flattening; a sample with fewer tokens than
    segments repeats them. Padding changes nothing; a sample without real tokens gives zeros.

    Args:
        segments: the number of runs.
    """

    def __init__(self, segments: int = 1):
        super().__init__()
        if segments < 1:
            raise ValueError(f"segments is {segments}; it must be at least 1")
        self.segments = segments

    def forward(self, tokens: Tokens) -> Tensor:
        """`[batch, segments * dim]`."""
        shares = segment_shares(tokens.mask, self.segments).to(tokens.tokens.dtype)
        values = tokens.tokens.masked_fill(~tokens.mask[..., None], 0.0)  # 0 * nan is nan
        return (shares @ values).flatten(1)

    def extra_repr(self) -> str:
        return f"segments={self.segments}"


def segment_shares(mask: Tensor, segments: int) -> Tensor:
    """How much each token counts in each segment.

    Args:
        mask: `[batch, tokens]` bool, True for real tokens.
        segments: the number of equal runs.

    Returns:
        `[batch, segments, tokens]` float32, rows summing to one (to zero without real tokens).
    """
    count = mask.sum(1)[:, None, None]  # [batch, 1, 1]
    place = (mask.cumsum(1) - 1)[:, None, :]  # the token lies at place..place + 1 of its sample's line
    start = torch.arange(segments, device=mask.device)[None, :, None] * count  # in units of 1 / segments
    overlap = torch.minimum(start + count, (place + 1) * segments) - torch.maximum(start, place * segments)
    return overlap.clamp(min=0) * mask[:, None, :] / count.clamp(min=1)
