"""The losses against their formulas, written out the slow way."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edge_glass.models import nested_infonce
from edge_glass.models.losses import AlignmentLoss, TriModalAlignmentLoss
from tests.ranks import run_ranks

WIDTHS = [16, 8, 4]


def plain_infonce(a: Tensor, b: Tensor, ids_a: Tensor, ids_b: Tensor, scale: Tensor) -> Tensor:
    """Row by row: minus the mean log-probability of its positives; the mean of both directions."""

    def direction(logits, ids, other_ids):
        terms = []
        for row, concept in zip(logits, ids, strict=True):
            positives = other_ids == concept
            if positives.any():
                terms.append(-row.log_softmax(0)[positives].mean())
        return torch.stack(terms).mean()

    logits = scale * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    return (direction(logits, ids_a, ids_b) + direction(logits.T, ids_b, ids_a)) / 2


def plain_siglip(a: Tensor, b: Tensor, ids: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Zhai et al. 2023, algorithm 1, with positives by concept."""
    logits = scale * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T + bias
    signs = 2 * (ids[:, None] == ids[None]).float() - 1
    return -F.logsigmoid(signs * logits).sum() / len(a)


def sample(rows_a: int = 12, rows_b: int | None = None, concepts: int = 7, seed: int = 0):
    """Embeddings and ids; concepts repeat within and across both sides, and some miss on one side."""
    generator = torch.Generator().manual_seed(seed)
    rows_b = rows_a if rows_b is None else rows_b
    a, b = (torch.randn(rows, 16, generator=generator).requires_grad_() for rows in (rows_a, rows_b))
    ids_a, ids_b = (torch.randint(concepts, (rows,), generator=generator) for rows in (rows_a, rows_b))
    return a, b, ids_a, ids_b


def gradients(loss: Tensor, *sources: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, sources))


@pytest.mark.parametrize("chunk", [4096, 5])
@pytest.mark.parametrize("rows_b", [12, 9])
def test_infonce_is_the_mean_over_widths_of_the_plain_formula(chunk, rows_b):
    a, b, ids_a, ids_b = sample(rows_b=rows_b)
    ids_a[0], ids_b[-1] = 100, 200  # rows without any positive
    loss = AlignmentLoss(WIDTHS, width_weights=[3.0, 2.0, 1.0], chunk=chunk)
    scale = loss.log_scale.exp()
    plain = sum(
        weight / 6 * plain_infonce(a[:, :width], b[:, :width], ids_a, ids_b, scale)
        for width, weight in zip(WIDTHS, (3, 2, 1), strict=True)
    )
    fused = loss(a, b, ids_a, ids_b)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    sources = (a, b, loss.log_scale)
    torch.testing.assert_close(gradients(fused, *sources), gradients(plain, *sources), rtol=1e-5, atol=1e-6)


def test_with_distinct_concepts_infonce_is_clips_cross_entropy():
    a, b, _, _ = sample()
    ids = torch.randperm(12)
    logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / 0.07
    target = torch.arange(12)
    clip = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(AlignmentLoss([16])(a, b, ids, ids), clip, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [4096, 5])
def test_siglip_is_the_mean_over_widths_of_the_plain_formula(chunk):
    a, b, ids, _ = sample()
    loss = AlignmentLoss(WIDTHS, kind="siglip", temperature=0.1, chunk=chunk)
    assert loss.bias is not None
    scale = loss.log_scale.exp()
    plain = sum(plain_siglip(a[:, :width], b[:, :width], ids, scale, loss.bias) for width in WIDTHS) / 3
    fused = loss(a, b, ids, ids)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    sources = (a, b, loss.log_scale, loss.bias)
    torch.testing.assert_close(gradients(fused, *sources), gradients(plain, *sources), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["infonce", "siglip"])
def test_the_loss_is_symmetric_and_blind_to_length_and_order(kind):
    a, b, ids_a, ids_b = sample(rows_b=9)
    loss = AlignmentLoss(WIDTHS, kind=kind)
    value = loss(a, b, ids_a, ids_b)
    order = torch.randperm(12)
    torch.testing.assert_close(loss(b, a, ids_b, ids_a), value)
    torch.testing.assert_close(loss(3 * a, 0.5 * b, ids_a, ids_b), value)
    torch.testing.assert_close(loss(a[order], b, ids_a[order], ids_b), value)
    in_another_order = AlignmentLoss(WIDTHS[::-1], kind=kind)
    torch.testing.assert_close(in_another_order(a, b, ids_a, ids_b), value)


@pytest.mark.parametrize("kind", ["infonce", "siglip"])
def test_logits_exist_only_a_chunk_at_a_time(kind):
    a, b, ids_a, ids_b = sample(rows_a=64)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    def kept_for_backward(chunk: int) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            AlignmentLoss(WIDTHS, kind=kind, chunk=chunk)(a, b, ids_a, ids_b)
        return max(kept)

    assert kept_for_backward(chunk=64) == 64 * 64
    assert kept_for_backward(chunk=8) < 64 * 64 // 2


@pytest.mark.parametrize("kind", ["infonce", "siglip"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chunk", [4096, 5])
def test_logits_are_float32_inside_autocast(kind, dtype, chunk):
    a, b, ids_a, ids_b = sample()
    loss = AlignmentLoss(WIDTHS, kind=kind, chunk=chunk)
    value = loss(a, b, ids_a, ids_b)
    with torch.autocast("cpu", dtype):
        inside = loss(a, b, ids_a, ids_b)
        low_precision = loss(a.to(dtype), b.to(dtype), ids_a, ids_b)
    assert inside.dtype == low_precision.dtype == torch.float32
    assert torch.equal(inside, value)
    assert all(map(torch.equal, gradients(inside, a, b), gradients(value, a, b)))
    torch.testing.assert_close(low_precision, value, rtol=0.02, atol=0.02)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(low_precision, a, b))


def test_large_half_precision_embeddings_do_not_overflow():
    a, b, ids_a, ids_b = sample()
    big = [(1000 * x.detach()).half().requires_grad_() for x in (a, b)]  # squares beyond the largest half, 65504
    value = AlignmentLoss(WIDTHS)(*big, ids_a, ids_b)
    assert torch.isfinite(value) and all(torch.isfinite(gradient).all() for gradient in gradients(value, *big))


def test_an_all_zero_row_gives_a_finite_loss_and_gradient():
    a, b, ids_a, ids_b = sample()
    with torch.no_grad():
        a[0] = 0
        b[1, :4] = 0
    value = AlignmentLoss(WIDTHS)(a, b, ids_a, ids_b)
    assert torch.isfinite(value) and all(torch.isfinite(gradient).all() for gradient in gradients(value, a, b))


def test_without_any_positive_infonce_is_zero_and_moves_nothing():
    a, b, ids_a, ids_b = sample()
    value = AlignmentLoss(WIDTHS)(a, b, ids_a, ids_b + 1000)
    assert value == 0
    assert all((gradient == 0).all() for gradient in gradients(value, a, b))


def test_the_temperature_is_clamped_and_can_come_back_down():
    a, b, ids_a, ids_b = sample()
    loss = AlignmentLoss(WIDTHS, temperature=0.02, max_scale=100.0)
    torch.testing.assert_close(loss.scale, torch.tensor(50.0))
    with torch.no_grad():
        loss.log_scale.fill_(math.log(1000.0))
    torch.testing.assert_close(loss.scale, torch.tensor(100.0))
    value = loss(a, b, ids_a, ids_b)
    limit = torch.tensor(100.0)
    plain = sum(plain_infonce(a[:, :width], b[:, :width], ids_a, ids_b, limit) for width in WIDTHS) / 3
    torch.testing.assert_close(value, plain, rtol=1e-5, atol=1e-4)
    value.backward()
    assert loss.log_scale.grad > 0  # random embeddings: a smaller scale is better
    torch.optim.SGD(loss.parameters(), lr=0.01).step()
    assert loss.scale < 100


def test_settings_that_cannot_work_are_named():
    with pytest.raises(ValueError, match=r"widths=\[8, 8\]"):
        AlignmentLoss([8, 8])
    with pytest.raises(ValueError, match=r"widths=\[\]"):
        AlignmentLoss([])
    with pytest.raises(ValueError, match=r"width_weights=\[1.0\].*\[8, 4\]"):
        AlignmentLoss([8, 4], width_weights=[1.0])
    with pytest.raises(ValueError, match="kind='clip'"):
        AlignmentLoss([8], kind="clip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"temperature=0\.001.*max_scale=100"):
        AlignmentLoss([8], temperature=0.001)
    with pytest.raises(ValueError, match="chunk=0"):
        AlignmentLoss([8], chunk=0)
    a, b, ids_a, ids_b = sample()
    with pytest.raises(ValueError, match=r"a has shape \[12, 16\].*\[8, 32\].*\[rows, 32\]"):
        AlignmentLoss([32, 8])(a, b, ids_a, ids_b)
    with pytest.raises(ValueError, match=r"ids_b has shape \[3\], b \[12, 16\]"):
        AlignmentLoss([16])(a, b, ids_a, ids_b[:3])


def three_modalities() -> tuple[dict[str, Tensor], Tensor]:
    image, text, ids, _ = sample()
    audio, _, _, _ = sample(seed=1)
    return {"image": image, "audio": audio, "text": text}, {"image": ids, "audio": ids, "text": ids}


def test_the_trimodal_loss_is_the_weighted_mean_of_its_pairs_each_with_its_own_temperature():
    embeddings, ids = three_modalities()
    weights = {"image_text": 2.0, "audio_text": 1.0, "image_audio": 1.0}
    loss = TriModalAlignmentLoss(WIDTHS, pair_weights=weights)
    temperatures = {"image_text": 0.07, "audio_text": 0.1, "image_audio": 0.5}
    for pair, temperature in temperatures.items():
        loss.pairs[pair].log_scale.data.fill_(-math.log(temperature))
    total, figures = loss(embeddings, ids)
    expected = 0.0
    for pair, weight in weights.items():
        first, second = pair.split("_")
        alone = AlignmentLoss(WIDTHS, temperature=temperatures[pair])
        value = alone(embeddings[first], embeddings[second], ids[first], ids[second])
        torch.testing.assert_close(figures[f"loss/{pair}"], value)
        torch.testing.assert_close(figures[f"scale/{pair}"].item(), 1 / temperatures[pair])
        expected = expected + weight / 4 * value
    torch.testing.assert_close(total, expected)
    assert not any(figure.requires_grad for figure in figures.values())
    assert len(figures) == 6


def test_a_batch_of_two_modalities_trains_their_pair_and_leaves_no_parameter_unused():
    embeddings, ids = three_modalities()
    del embeddings["audio"]
    loss = TriModalAlignmentLoss(WIDTHS)
    total, figures = loss(embeddings, ids)
    torch.testing.assert_close(
        total, AlignmentLoss(WIDTHS)(embeddings["image"], embeddings["text"], ids["image"], ids["text"])
    )
    assert set(figures) == {"loss/image_text", "scale/image_text"}
    total.backward()
    assert loss.pairs["image_text"].log_scale.grad != 0
    assert loss.pairs["audio_text"].log_scale.grad == 0 and loss.pairs["image_audio"].log_scale.grad == 0


def test_a_pair_that_is_not_named_or_weighs_nothing_is_not_trained():
    embeddings, ids = three_modalities()
    loss = TriModalAlignmentLoss(WIDTHS, pair_weights={"image_text": 1.0, "image_audio": 0.0})
    _, figures = loss(embeddings, ids)
    assert set(figures) == {"loss/image_text", "scale/image_text"}
    assert len(list(loss.parameters())) == 1


def test_captions_of_other_concepts_are_negatives_for_every_sample():
    embeddings, ids = three_modalities()
    more, other = torch.randn(7, embeddings["text"].shape[1]), torch.arange(7) + 1000
    weights = {"image_text": 1.0}
    few, _ = TriModalAlignmentLoss(WIDTHS, weights)(embeddings, ids)
    texts = {"text": torch.cat([embeddings["text"], more])}
    many, _ = TriModalAlignmentLoss(WIDTHS, weights)(
        embeddings | texts, ids | {"text": torch.cat([ids["text"], other])}
    )
    expected = AlignmentLoss(WIDTHS)(embeddings["image"], texts["text"], ids["image"], torch.cat([ids["text"], other]))
    torch.testing.assert_close(many, expected)
    assert many > few


def test_pairs_that_do_not_exist_are_named():
    embeddings, ids = three_modalities()
    with pytest.raises(ValueError, match=r"\['text_image'\].*image_text"):
        TriModalAlignmentLoss(WIDTHS, pair_weights={"text_image": 1.0})
    with pytest.raises(ValueError, match="at least one of them above 0"):
        TriModalAlignmentLoss(WIDTHS, pair_weights={"image_text": 0.0})
    with pytest.raises(ValueError, match=r"embeddings of \['image'\]"):
        TriModalAlignmentLoss(WIDTHS)({"image": embeddings["image"]}, ids)


CASES = [
    {"kind": "infonce", "chunk": 4096, "rows_b": 12, "cut": 6},
    {"kind": "infonce", "chunk": 2, "rows_b": 12, "cut": 6},
    {"kind": "infonce", "chunk": 2, "rows_b": 9, "cut": 5},  # uneven shares
    {"kind": "siglip", "chunk": 4096, "rows_b": 12, "cut": 6},
    {"kind": "siglip", "chunk": 2, "rows_b": 9, "cut": 5},
]


def _share_of(cases: list[dict]) -> list[tuple]:
    """Loss and gradients on this rank, for rows before or from the cut."""
    results = []
    nested_infonce.TILES["cpu"] = (2, 5)  # in this rank only
    for case in cases:
        a, b, ids_a, ids_b = sample(rows_b=case["rows_b"])
        rows = slice(0, case["cut"]) if torch.distributed.get_rank() == 0 else slice(case["cut"], None)
        loss = AlignmentLoss(WIDTHS, kind=case["kind"], chunk=case["chunk"])
        value = loss(a[rows], b[rows], ids_a[rows], ids_b[rows])
        results.append((value.detach(), gradients(value, a, b, *loss.parameters())))
    return results


def test_two_ranks_give_the_loss_and_gradient_of_one_process():
    first, second = run_ranks(_share_of, CASES)
    for case, (value_1, gradients_1), (value_2, gradients_2) in zip(CASES, first, second, strict=True):
        a, b, ids_a, ids_b = sample(rows_b=case["rows_b"])
        loss = AlignmentLoss(WIDTHS, kind=case["kind"])
        value = loss(a, b, ids_a, ids_b)
        torch.testing.assert_close(value_1, value.detach())
        torch.testing.assert_close(value_2, value.detach())
        mean = [(one + two) / 2 for one, two in zip(gradients_1, gradients_2, strict=True)]  # as DDP averages
        torch.testing.assert_close(mean, gradients(value, a, b, *loss.parameters()), rtol=1e-5, atol=1e-6)
