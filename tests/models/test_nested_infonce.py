"""The sums of InfoNCE against the full matrices of logits, and the loss made of them in double precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.nested_loss import rows as benchmark_rows
from edge_glass.models import nested_infonce as module
from edge_glass.models.losses import AlignmentLoss
from edge_glass.models.nested_infonce import Positives, nested_infonce
from tests.models.test_losses import plain_infonce

WIDTHS = [3, 8, 16]
EXACT = {"rtol": 1e-10, "atol": 1e-10}
TILES = [(256, 1024), (4, 3), (5, 9), (1, 1)]  # all in one; with and without remainders; the smallest


def sample(rows_a: int, rows_b: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Positives]:
    """Embeddings, and concepts that repeat on both sides; the first row of `a` and the last of `b` have no positive."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 16, generator=generator, dtype=dtype).requires_grad_() for rows in (rows_a, rows_b))
    ids_a, ids_b = (torch.randint(5, (rows,), generator=generator) for rows in (rows_a, rows_b))
    ids_a[0], ids_b[-1] = 100, 200
    weights = (torch.rand(rows, generator=generator, dtype=dtype) for rows in (rows_a, rows_b))
    return a, b, Positives(ids_a, ids_b, *weights)


def full_matrices(a: Tensor, b: Tensor, scale: Tensor, positives: Positives) -> tuple[Tensor, Tensor, Tensor]:
    ids_a, ids_b, weight_a, weight_b = positives
    pull = (weight_a[:, None] + weight_b) * (ids_a[:, None] == ids_b)
    logits = [scale * F.normalize(a[:, :w], dim=1) @ F.normalize(b[:, :w], dim=1).T for w in WIDTHS]
    return (
        torch.stack([x.logsumexp(1) for x in logits]),
        torch.stack([x.logsumexp(0) for x in logits]),
        torch.stack([(pull * x).sum() for x in logits]),
    )


def gradients(parts: tuple[Tensor, ...], *sources: Tensor) -> tuple[Tensor, ...]:
    """Of a sum of all numbers of the parts with weights of both signs."""
    total = torch.stack([(part * torch.linspace(-1, 2, part.numel()).view_as(part)).sum() for part in parts]).sum()
    return torch.autograd.grad(total, sources)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("rows", [(13, 13), (10, 18), (18, 7)])
def test_sums_and_gradients_are_those_of_the_full_matrices(rows, tile, keep):
    a, b, positives = sample(*rows)
    scale = torch.tensor(30.0, dtype=torch.float64, requires_grad=True)
    found = nested_infonce(a, b, scale, WIDTHS, positives, keep, tile)
    expected = full_matrices(a, b, scale, positives)
    torch.testing.assert_close(found, expected, **EXACT)
    sources = (a, b, scale)
    torch.testing.assert_close(gradients(found, *sources), gradients(expected, *sources), **EXACT)


@pytest.mark.parametrize("chunk", [4096, 1])  # logits kept, logits computed again
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("rows", [(13, 13), (10, 18), (18, 7)])
def test_the_loss_in_double_precision_is_the_plain_formula(rows, tile, chunk, monkeypatch):
    monkeypatch.setitem(module.TILES, "cpu", tile)
    a, b, (ids_a, ids_b, *_) = sample(*rows)
    loss = AlignmentLoss(WIDTHS, width_weights=[1.0, 2.0, 3.0], chunk=chunk).double()
    scale = loss.log_scale.exp()
    plain = sum(
        weight / 6 * plain_infonce(a[:, :width], b[:, :width], ids_a, ids_b, scale)
        for width, weight in zip(WIDTHS, (1, 2, 3), strict=True)
    )
    value = loss(a, b, ids_a, ids_b)
    torch.testing.assert_close(value, plain, **EXACT)
    sources = (a, b, loss.log_scale)
    torch.testing.assert_close(torch.autograd.grad(value, sources), torch.autograd.grad(plain, sources), **EXACT)


@pytest.mark.parametrize("chunk", [4096, 1])
def test_half_precision_at_scale_100_is_finite_and_close(chunk, monkeypatch):
    monkeypatch.setitem(module.TILES, "cpu", (4, 3))
    a, b, (ids_a, ids_b, *_) = sample(13, 13)
    with torch.no_grad():  # logits from -100 to 100: no single shift serves all of them in float32
        b[:6], b[6:] = a[:6], -a[6:]
    half = [x.detach().half().requires_grad_() for x in (a, b)]
    exact = [x.detach().double().requires_grad_() for x in half]
    loss = AlignmentLoss(WIDTHS, temperature=0.01, chunk=chunk)
    value, expected = loss(*half, ids_a, ids_b), loss.double()(*exact, ids_a, ids_b)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4)
    for found, plain in zip(torch.autograd.grad(value, half), torch.autograd.grad(expected, exact), strict=True):
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found.double(), plain, rtol=2e-3, atol=2e-3)


def test_the_backward_pass_inside_autocast_stays_in_full_precision():
    a, b, positives = sample(13, 13, torch.float32)
    scale = torch.tensor(30.0, requires_grad=True)
    for keep in (True, False):
        parts = nested_infonce(a, b, scale, WIDTHS, positives, keep, (4, 3))
        with torch.autocast("cpu", torch.bfloat16):
            inside = gradients(nested_infonce(a, b, scale, WIDTHS, positives, keep, (4, 3)), a, b, scale)
        assert all(map(torch.equal, inside, gradients(parts, a, b, scale)))


def test_one_side_can_be_frozen_and_gradients_asked_for_twice():
    a, b, positives = sample(13, 10)
    scale = torch.tensor(30.0, dtype=torch.float64)
    expected = torch.autograd.grad(full_matrices(a, b, scale, positives)[0].sum(), (a, b))
    of_a = nested_infonce(a, b.detach(), scale, WIDTHS, positives, True, (4, 3))[0].sum()
    of_b = nested_infonce(a.detach(), b, scale, WIDTHS, positives, True, (4, 3))[0].sum()
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(of_a, a, retain_graph=True)[0], expected[0], **EXACT)
        torch.testing.assert_close(torch.autograd.grad(of_b, b, retain_graph=True)[0], expected[1], **EXACT)


def test_beyond_the_chunk_no_more_than_a_tile_of_logits_is_kept(monkeypatch):
    monkeypatch.setitem(module.TILES, "cpu", (4, 3))
    a, b, (ids_a, ids_b, *_) = sample(40, 50)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    def kept_for_backward(chunk: int) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            AlignmentLoss(WIDTHS, chunk=chunk)(a, b, ids_a, ids_b)
        return sum(kept)

    assert kept_for_backward(chunk=40) - kept_for_backward(chunk=39) == len(WIDTHS) * 40 * 50


def test_the_loss_and_its_gradients_are_those_of_sentence_transformers():
    (row,) = benchmark_rows({24: 1})
    assert row["equal"] and row["ratio"] > 0
