"""Towers from parts whose widths follow from each other, so that no width is written twice in a config."""

from collections.abc import Callable

from edge_glass.encoders.tokens import Encoder
from edge_glass.models.alignment import Tower
from edge_glass.models.perceiver import PerceiverResampler
from edge_glass.models.pooling import SegmentPool
from edge_glass.models.projection import ProjectionHead, WhitenedProjection


def build_tower(
    encoder: Encoder,
    resampler: Callable[..., PerceiverResampler] | None,
    segments: int,
    projection: Callable[..., ProjectionHead | WhitenedProjection],
) -> Tower:
    """A tower whose resampler and projection have the widths that its encoder asks for.

    Args:
        encoder: inputs to tokens.
        resampler: makes a resampler from `dim`; null pools the encoder's own tokens.
        segments: runs of tokens that are averaged and laid side by side: 1 is mean pooling; as many as tokens is
            flattening. With a resampler at most its number of latents.
        projection: makes a projection from `in_dim`.
    """
    resample = None if resampler is None else resampler(dim=encoder.dim)
    if resample is not None:
        segments = min(segments, len(resample.latents))
    return Tower(encoder, resample, SegmentPool(segments), projection(in_dim=segments * encoder.dim))
