"""The recursion against the paper's own words, and what each token may see."""

import math

import pytest
import torch
from torch import Tensor

from edge_glass.decoders.recursion import EPSILON, KeyValueCache, Recursion, Thought, truncated_normal


def recursion(**options) -> Recursion:
    torch.manual_seed(0)
    return Recursion(**{"width": 16, "heads": 2, "latent_steps": 2, "cycles": 3, **options}).double()


def question(batch: int = 2, tokens: int = 5, width: int = 16) -> Tensor:
    return torch.randn(batch, tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def all_real(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool)


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()


def rotated(head: Tensor) -> Tensor:
    """RoPE of a head `[tokens, dim]`: the pair (k, k + dim / 2) turns by place * 10000^(-2k / dim)."""
    tokens, dim = head.shape
    turned = head.clone()
    for place in range(tokens):
        for k in range(dim // 2):
            angle = place * 10_000 ** (-2 * k / dim)
            a, b = head[place, k], head[place, k + dim // 2]
            turned[place, k] = a * math.cos(angle) - b * math.sin(angle)
            turned[place, k + dim // 2] = a * math.sin(angle) + b * math.cos(angle)
    return turned


def plain_net(module: Recursion, x: Tensor, causal: bool) -> Tensor:
    """The net on one sample `[tokens, width]`, head by head."""
    for block in module.net:
        queries, keys, values = (x @ block.attend.weight.T).chunk(3, dim=-1)
        heads = []
        for q, k, v in zip(*(part.chunk(block.heads, dim=-1) for part in (queries, keys, values)), strict=True):
            scores = rotated(q) @ rotated(k).T / math.sqrt(q.shape[-1])
            if causal:
                scores = scores + torch.full_like(scores, -math.inf).triu(1)
            heads.append(scores.softmax(-1) @ v)
        x = norm(x + torch.cat(heads, dim=-1) @ block.attended.weight.T)
        gate, value = (x @ block.widen.weight.T).chunk(2, dim=-1)
        x = norm(x + (gate / (1 + (-gate).exp()) * value) @ block.narrow.weight.T)
    return x


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("latent_steps", "cycles", "layers"), [(1, 1, 1), (6, 3, 2), (2, 4, 2)])
def test_a_supervision_step_is_the_papers_update(causal, latent_steps, cycles, layers):
    module = recursion(causal=causal, latent_steps=latent_steps, cycles=cycles, layers=layers)
    x = question()
    found = module(x, module.begin(x), module.sight(all_real(x)))
    for sample in range(2):
        y, z = module.first_answer.expand(5, 16), module.first_latent.expand(5, 16)
        for _ in range(cycles):  # the paper's figure 3
            for _ in range(latent_steps):
                z = plain_net(module, x[sample] + y + z, causal)
            y = plain_net(module, y + z, causal)
        torch.testing.assert_close(found.answer[sample], y, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.latent[sample], z, rtol=0, atol=1e-10)


def test_only_the_last_cycle_is_trained_through():
    module = recursion()
    x = question()
    sight = module.sight(all_real(x))
    module(x, module.begin(x), sight).answer.sum().backward()
    found = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    with torch.no_grad():
        module.cycles = 2
        before = module(x, module.begin(x), sight)
    module.cycles = 1
    module(x, before, sight).answer.sum().backward()
    for parameter, gradient in zip(module.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=1e-12)
        assert gradient.abs().max() > 0


def test_without_recursion_the_net_is_applied_once():
    module = recursion(recursive=False, cycles=1)
    x = question()
    found = module(x, module.begin(x), module.sight(all_real(x)))
    torch.testing.assert_close(found.answer[0], plain_net(module, x[0], causal=False), rtol=0, atol=1e-10)


@pytest.mark.parametrize("padded", [False, True])
def test_a_causal_token_sees_nothing_that_comes_later(padded):
    module = recursion(causal=True)
    x, changed = question(), question()
    changed[:, 3:] += 1.0
    real = all_real(x)
    real[1, 0] = not padded  # a mask of padding must not undo the mask of what comes later
    first, second = (module(q, module.begin(q), module.sight(real)).answer for q in (x, changed))
    torch.testing.assert_close(first[:, :3], second[:, :3], rtol=0, atol=1e-12)
    assert (first[:, 3:] - second[:, 3:]).abs().amax(2).min() > 1e-3


def test_without_causality_every_token_sees_every_other():
    module = recursion(causal=False)
    x, changed = question(), question()
    changed[:, 4:] += 1.0
    first, second = (module(q, module.begin(q), module.sight(all_real(x))).answer for q in (x, changed))
    assert (first - second).abs().amax(2).min() > 1e-3


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("left", "right"), [(0, 3), (3, 0), (2, 2)])
def test_padding_changes_nothing(causal, left, right):
    module = recursion(causal=causal)
    x = question()
    padding = torch.full((2, 1, 16), 7.0, dtype=torch.float64)
    padded = torch.cat([padding.expand(-1, left, -1), x, padding.expand(-1, right, -1)], dim=1)
    real = torch.tensor([False] * left + [True] * 5 + [False] * right).expand(2, -1)
    alone = module(x, module.begin(x), module.sight(all_real(x))).answer
    found = module(padded, module.begin(padded), module.sight(real)).answer
    torch.testing.assert_close(found[:, left : left + 5], alone, rtol=0, atol=1e-12)
    assert found.isfinite().all()


@pytest.mark.parametrize("pieces", [[1] * 7, [4, 1, 1, 1], [3, 4]])
def test_token_by_token_with_a_cache_equals_all_at_once(pieces):
    module = recursion(causal=True)
    x = question(tokens=7)
    real = all_real(x)
    real[0, :2] = False  # padded on the left
    whole = module.begin(x)
    for _ in range(2):  # supervision steps share the cache
        whole = module(x, whole, module.sight(real))
    cache, found, start = KeyValueCache(7), [], 0
    for piece in pieces:
        new = x[:, start : start + piece]
        start += piece
        cache.begin(piece)
        sight = module.sight(real[:, :start], cache)
        thought = module.begin(new)
        for _ in range(2):
            thought = module(new, thought, sight)
        cache.end()
        found.append(thought.answer)
    torch.testing.assert_close(torch.cat(found, dim=1)[real], whole.answer[real], rtol=0, atol=1e-12)


def test_a_full_cache_takes_no_more():
    cache = KeyValueCache(3)
    with pytest.raises(ValueError, match="4 tokens do not fit into a cache of 3"):
        cache.begin(4)


def test_a_thought_goes_on_without_its_history():
    y = torch.ones(1, 1, 2, requires_grad=True)
    detached = Thought(2 * y, 3 * y).detach()
    assert not detached.answer.requires_grad and not detached.latent.requires_grad


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 3}, "3 heads do not fit width 16"),
        ({"width": 6, "heads": 2}, "must be even"),
        ({"cycles": 0}, "cycles=0"),
        ({"latent_steps": 0}, "latent_steps=0"),
        ({"layers": 0}, "layers=0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        recursion(**options)


def test_the_cut_normal_has_the_deviation_it_was_asked_for():
    torch.manual_seed(0)
    values = truncated_normal(torch.empty(200_000), 0.5)
    assert abs(float(values.std()) - 0.5) < 0.005
    assert float(values.abs().max()) < 2 * 0.5 / 0.87  # cut at two deviations of the uncut one
