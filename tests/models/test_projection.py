"""Projections into the shared embedding and into a decoder's prefix."""

import pytest
import torch

from edge_glass.encoders.tokens import Tokens
from edge_glass.models.projection import MatryoshkaProjection, MultimodalProjector, ProjectionHead, WhitenedProjection


def test_without_hidden_width_the_head_is_linear():
    head = ProjectionHead(6, 4)
    first, second = torch.randn(2, 6), torch.randn(2, 6)
    origin = head(torch.zeros(2, 6))
    assert head(first).shape == (2, 4)
    assert torch.allclose(head(first + second) + origin, head(first) + head(second), atol=1e-5)


def test_with_hidden_width_the_head_is_an_mlp_that_does_not_mind_the_scale_of_its_input():
    head = ProjectionHead(6, 4, hidden_dim=16)
    features = torch.randn(2, 6)
    assert sum(parameter.numel() for parameter in head.parameters()) == 12 + 6 * 16 + 16 + 16 * 4 + 4
    assert torch.allclose(head(1000 * features), head(features), atol=1e-3)
    assert not torch.allclose(head(-features), -head(features), atol=1e-3)


@pytest.mark.parametrize("hidden_dim", [None, 16])
def test_dropout_works_in_training_alone(hidden_dim):
    torch.manual_seed(0)
    head = ProjectionHead(32, 4, hidden_dim, dropout=0.5)
    features = torch.randn(2, 32)
    assert not torch.equal(head(features), head(features))
    head.eval()
    assert torch.equal(head(features), head(features))


@pytest.mark.parametrize("widths", [[2, 4, 8], [8, 4, 2], [8]])
def test_nested_widths_may_rise_or_fall(widths):
    projection = MatryoshkaProjection(6, 8, widths)
    assert projection.widths == sorted(widths)
    assert projection(torch.randn(3, 6)).shape == (3, 8)


@pytest.mark.parametrize(
    "widths", [[], [4], [4, 16], [2, 8, 4], [2, 2, 8], [0, 8], [-2, 8]], ids=lambda widths: str(widths)
)
def test_widths_that_do_not_fit_are_refused_with_the_reason(widths):
    with pytest.raises(ValueError, match=r"do not fit an embedding of 8.*the largest must be 8") as error:
        MatryoshkaProjection(6, 8, widths)
    assert str(widths) in str(error.value)


def test_a_prefix_is_a_unit_vector_in_the_direction_of_the_first_numbers():
    projection = MatryoshkaProjection(6, 8, [2, 8])
    embedding = projection(torch.randn(3, 6))
    for width in (2, 8):
        prefix = projection.at_width(embedding, width)
        assert prefix.shape == (3, width)
        assert torch.allclose(prefix.norm(dim=-1), torch.ones(3))
        assert torch.allclose(prefix * embedding[:, :width].norm(dim=-1, keepdim=True), embedding[:, :width])


def test_a_width_that_was_not_trained_is_refused():
    projection = MatryoshkaProjection(6, 8, [2, 8])
    with pytest.raises(ValueError, match=r"width 4 is none of the nested widths \[2, 8\]"):
        projection.at_width(torch.randn(3, 8), 4)


def test_every_token_may_become_a_prefix_token():
    tokens = Tokens(torch.randn(2, 5, 6), torch.tensor([[True] * 5, [True] * 3 + [False] * 2]))
    prefix = MultimodalProjector(6, 12)(tokens)
    assert prefix.tokens.shape == (2, 5, 12)
    assert torch.equal(prefix.mask, tokens.mask)


def test_a_fixed_prefix_comes_from_any_number_of_tokens_and_ignores_padding():
    projector = MultimodalProjector(6, 12, tokens=4, hidden_dim=10)
    short = Tokens(torch.randn(1, 3, 6), torch.ones(1, 3, dtype=torch.bool))
    padded = Tokens(torch.full((1, 9, 6), float("nan")), torch.zeros(1, 9, dtype=torch.bool))
    padded.tokens[:, :3] = short.tokens
    padded.mask[:, :3] = True
    prefix = projector(padded)
    assert prefix.tokens.shape == (1, 4, 12)
    assert prefix.mask.all()
    assert torch.allclose(prefix.tokens, projector(short).tokens, atol=1e-5)


def test_a_prefix_keeps_the_order_of_the_tokens():
    projector = MultimodalProjector(6, 12, tokens=2)
    tokens = Tokens(torch.randn(1, 4, 6), torch.ones(1, 4, dtype=torch.bool))
    turned = Tokens(tokens.tokens.flip(1), tokens.mask)
    assert torch.allclose(projector(turned).tokens, projector(tokens).tokens.flip(1), atol=1e-6)


def test_a_prefix_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="tokens is 0"):
        MultimodalProjector(6, 12, tokens=0)


def correlated(rows=400, width=12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(width, width, generator=generator) * torch.linspace(0.1, 3, width)
    return torch.randn(rows, width, generator=generator) @ mix.T + 5


@pytest.mark.parametrize("out_dim", [12, 5])
def test_a_whitened_code_is_centred_with_equal_variance_in_every_direction(out_dim):
    features = correlated()
    projection = WhitenedProjection(12, out_dim, floor=0.0)
    projection.fit(features)
    code = projection(features)
    torch.testing.assert_close(code.mean(0), torch.zeros(out_dim), atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.cov(code.T), torch.eye(out_dim), atol=1e-3, rtol=0)
    assert not list(projection.parameters())


def test_directions_without_variance_are_not_blown_up():
    features = torch.cat([torch.randn(50, 3), torch.full((50, 3), 2.0)], dim=1)
    projection = WhitenedProjection(6, 6)
    projection.fit(features)
    assert torch.isfinite(projection(features)).all()
    few = torch.randn(2, 6)
    projection.fit(few)  # fewer rows than dimensions
    assert torch.isfinite(projection(few)).all()


def test_a_whitened_code_wider_than_its_features_is_refused_with_what_would_fit():
    with pytest.raises(ValueError, match=r"encoder\.dim of at most 12"):
        WhitenedProjection(12, 13)
    with pytest.raises(ValueError, match="at least 2 rows"):
        WhitenedProjection(12, 4).fit(torch.randn(1, 12))
