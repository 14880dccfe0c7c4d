"""Segment pooling against a plain reference."""

import pytest
import torch

from edge_glass.encoders.tokens import Tokens
from edge_glass.models.pooling import SegmentPool, segment_shares


def batch(*lengths: int, width: int | None = None, dim: int = 5) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    width = width or max(lengths)
    tokens = torch.randn(len(lengths), width, dim, generator=generator)
    return Tokens(tokens, torch.arange(width) < torch.tensor(lengths)[:, None])


def reference(real: torch.Tensor, segments: int) -> torch.Tensor:
    """Each token laid down `segments` times, the line cut into `segments` pieces, each piece averaged."""
    return real.repeat_interleave(segments, dim=0).unflatten(0, (segments, -1)).mean(1).flatten()


@pytest.mark.parametrize("segments", [1, 2, 3, 5, 8, 13])
def test_each_sample_is_cut_into_equal_runs_of_its_real_tokens(segments):
    tokens = batch(8, 3, 1, 13, 7)
    pooled = SegmentPool(segments)(tokens)
    assert pooled.shape == (5, segments * 5)
    for row, length in enumerate([8, 3, 1, 13, 7]):
        expected = reference(tokens.tokens[row, :length], segments)
        assert torch.allclose(pooled[row], expected, atol=1e-5)


def test_one_segment_is_the_masked_mean():
    tokens = batch(4, 9)
    pooled = SegmentPool(1)(tokens)
    assert torch.allclose(pooled[0], tokens.tokens[0, :4].mean(0), atol=1e-6)
    assert torch.allclose(pooled[1], tokens.tokens[1].mean(0), atol=1e-6)


def test_as_many_segments_as_tokens_is_flattening():
    tokens = batch(16, 16)
    assert torch.allclose(SegmentPool(16)(tokens), tokens.tokens.flatten(1), atol=1e-6)


def test_a_sample_with_fewer_tokens_than_segments_repeats_them():
    tokens = batch(2, 8)
    first, second = tokens.tokens[0, 0], tokens.tokens[0, 1]
    assert torch.allclose(SegmentPool(4)(tokens)[0], torch.cat([first, first, second, second]), atol=1e-6)


def test_padding_changes_nothing_whatever_it_holds():
    short = batch(6)
    padded = Tokens(torch.full((1, 20, 5), float("nan")), torch.zeros(1, 20, dtype=torch.bool))
    padded.tokens[:, :6] = short.tokens
    padded.mask[:, :6] = True
    assert torch.allclose(SegmentPool(4)(padded), SegmentPool(4)(short), atol=1e-6)


def test_padding_may_lie_anywhere():
    tokens = batch(8)
    holes = Tokens(tokens.tokens, torch.tensor([[False, True, True, False, True, False, True, False]]))
    expected = reference(tokens.tokens[0, [1, 2, 4, 6]], 3)
    assert torch.allclose(SegmentPool(3)(holes)[0], expected, atol=1e-6)


def test_a_sample_without_real_tokens_gives_zeros_and_no_nan_gradient():
    tokens = batch(0, 4)
    tokens.tokens.requires_grad_()
    pooled = SegmentPool(2)(tokens)
    pooled.square().sum().backward()
    assert torch.equal(pooled[0], torch.zeros(10))
    assert tokens.tokens.grad is not None
    assert tokens.tokens.grad.isfinite().all()


def test_the_shares_of_a_segment_sum_to_one_and_tokens_count_alike():
    shares = segment_shares(batch(7, 3, width=9).mask, 4)
    assert torch.allclose(shares.sum(2), torch.ones(2, 4))
    assert torch.allclose(shares.sum(1)[0, :7], torch.full((7,), 4 / 7))


def test_the_precision_of_the_tokens_is_kept():
    tokens = batch(4)
    assert SegmentPool(2)(Tokens(tokens.tokens.bfloat16(), tokens.mask)).dtype == torch.bfloat16


def test_no_segments_are_refused():
    with pytest.raises(ValueError, match="segments is 0"):
        SegmentPool(0)
