"""The resampler, and that it does not collapse."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from edge_glass.encoders.tokens import Tokens
from edge_glass.models.perceiver import PerceiverResampler, sinusoids

DIM = 32


def resampler(**options) -> PerceiverResampler:
    torch.manual_seed(0)
    return PerceiverResampler(**{"dim": DIM, "latents": 4, "heads": 4, "max_tokens": 64, **options})


def batch(*lengths: int, width: int | None = None, dim: int = DIM) -> Tokens:
    generator = torch.Generator().manual_seed(1)
    width = width or max(lengths)
    tokens = torch.randn(len(lengths), width, dim, generator=generator)
    return Tokens(tokens, torch.arange(width) < torch.tensor(lengths)[:, None])


def pooled(model: PerceiverResampler, tokens: Tokens) -> torch.Tensor:
    return model(tokens).tokens.mean(1)


def off_diagonal_cosine(embeddings: torch.Tensor) -> torch.Tensor:
    unit = normalize(embeddings, dim=-1)
    return (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]


@pytest.mark.parametrize("options", [{}, {"depth": 1, "latents": 7}, {"heads": 3, "head_dim": 8}])
def test_any_length_becomes_the_same_number_of_latents(options):
    model = resampler(**options)
    for lengths in ((5, 12), (40, 1, 64)):
        out = model(batch(*lengths))
        assert out.tokens.shape == (len(lengths), options.get("latents", 4), DIM)
        assert out.mask.shape == out.tokens.shape[:2]
        assert out.mask.all()


def test_padding_changes_nothing_whatever_it_holds():
    model = resampler()
    short = batch(6)
    padded = Tokens(torch.full((1, 20, DIM), float("nan")), torch.zeros(1, 20, dtype=torch.bool))
    padded.tokens[:, :6] = short.tokens
    padded.mask[:, :6] = True
    assert torch.allclose(model(padded).tokens, model(short).tokens, atol=1e-5)


def test_a_sample_is_the_same_alone_and_beside_a_longer_one():
    model = resampler()
    both = batch(6, 20)
    alone = Tokens(both.tokens[:1, :6], both.mask[:1, :6])
    assert torch.allclose(model(both).tokens[:1], model(alone).tokens, atol=1e-5)


def test_every_real_token_counts():
    model = resampler()
    tokens = batch(12)
    before = model(tokens).tokens
    for place in range(12):
        changed = tokens.tokens.clone()
        changed[0, place] += torch.randn(DIM)
        assert not torch.allclose(model(Tokens(changed, tokens.mask)).tokens, before, atol=1e-3)


def test_the_order_of_tokens_is_seen():
    model = resampler()
    tokens = batch(12)
    turned = Tokens(tokens.tokens.flip(1), tokens.mask)
    difference = (pooled(model, tokens) - pooled(model, turned)).norm() / pooled(model, tokens).norm()
    assert difference > 0.05


def test_a_sample_without_real_tokens_gives_finite_latents_and_gradients():
    model = resampler()
    out = model(batch(0, 5)).tokens
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_every_parameter_gets_a_gradient():
    model = resampler()
    model(batch(5, 12)).tokens.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("length", [4, 16, 64])
@pytest.mark.parametrize("depth", [1, 2, 6])
def test_different_inputs_give_clearly_different_outputs_at_initialisation(depth, length):
    embeddings = pooled(resampler(depth=depth), batch(*[length] * 24))
    assert off_diagonal_cosine(embeddings).mean() < 0.75
    assert off_diagonal_cosine(embeddings - embeddings.mean(0)).max() < 0.9


def test_inputs_that_share_a_strong_common_part_come_out_no_more_alike_than_they_went_in():
    tokens = batch(*[32] * 24)
    tokens.tokens += torch.randn(DIM, generator=torch.Generator().manual_seed(2))
    into = off_diagonal_cosine(tokens.tokens.mean(1)).mean()
    out = off_diagonal_cosine(pooled(resampler(), tokens)).mean()
    assert out < into + 0.02
    assert out < 0.99


@pytest.mark.parametrize("common", [0.0, 1.0])
def test_a_few_contrastive_steps_fall_well_below_the_logarithm_of_the_batch(common):
    """A noisy, padded stand-in for a frozen tower, whose tokens share a common part as real ones do."""
    concepts, size, length = 64, 32, 30
    model = resampler(latents=8)
    generator = torch.Generator().manual_seed(3)
    prototypes = torch.randn(concepts, length, DIM, generator=generator)
    prototypes = prototypes + common * torch.randn(DIM, generator=generator)
    targets = normalize(torch.randn(concepts, DIM, generator=generator), dim=-1)
    head = torch.nn.Linear(DIM, DIM)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
    losses = []
    for _ in range(120):
        ids = torch.randperm(concepts, generator=generator)[:size]
        noise = torch.randn(size, length, DIM, generator=generator)
        lengths = torch.randint(length // 2, length + 1, (size, 1), generator=generator)
        tokens = Tokens(prototypes[ids] + 0.5 * noise, torch.arange(length) < lengths)
        embeddings = normalize(head(pooled(model, tokens)), dim=-1)
        loss = cross_entropy(embeddings @ targets[ids].T / 0.07, torch.arange(size))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.3 * math.log(size)


def test_autocast_gives_nearly_the_same_latents():
    model, tokens = resampler(), batch(5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(tokens).tokens.float()
    assert torch.allclose(low, model(tokens).tokens, atol=0.1)


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(ValueError, match="got 65 tokens a sample and knows positions for 64"):
        resampler()(batch(65))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="5 heads do not divide dim 32"):
        resampler(heads=5)


def test_sinusoids_tell_all_positions_apart():
    positions = sinusoids(200, 33)
    distances = torch.cdist(positions, positions) + 10 * torch.eye(200)
    assert positions.shape == (200, 33)
    assert distances.min() > 0.1
    assert torch.allclose(positions[7, 0], torch.tensor(7.0).sin())
    assert torch.allclose(positions[7, 17], torch.tensor(7.0).cos())
