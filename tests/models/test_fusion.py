"""Three fusions under the same promises: any subset of modalities, masks, and nothing from what is absent."""

import pytest
import torch
from torch import Tensor

from edge_glass.encoders.tokens import Tokens
from edge_glass.models.fusion import ConcatFusion, CrossAttentionFusion, Fused, GatedFusion, MultimodalFusion

DIMS = {"image": 6, "audio": 10}
WIDTH = 8
KINDS = [
    pytest.param((ConcatFusion, {}), id="concat"),
    pytest.param((ConcatFusion, {"segments": {"image": 4, "audio": 3}}), id="concat of segments"),
    pytest.param((CrossAttentionFusion, {"heads": 2, "depth": 2}), id="cross attention"),
    pytest.param((CrossAttentionFusion, {"heads": 2, "dim": 12}), id="cross attention in another width"),
    pytest.param((GatedFusion, {}), id="gated"),
    pytest.param((GatedFusion, {"segments": {"image": 4}}), id="gated of segments"),
]


def make(kind: tuple[type[MultimodalFusion], dict], dims: dict[str, int] = DIMS) -> MultimodalFusion:
    torch.manual_seed(0)
    fusion = kind[0](dims, WIDTH, 3, **kind[1])
    for name, parameter in fusion.named_parameters():
        if "gates" in name:
            torch.nn.init.constant_(parameter, 0.5)  # open: at zero nothing could be told apart
    return fusion.eval()


def tokens(modality: str, batch: int = 4, length: int = 7, seed: int = 1) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, length, DIMS[modality], generator=generator)
    return Tokens(values, torch.ones(batch, length, dtype=torch.bool))


def seen(fused: Fused, row: int) -> Tensor:
    """What a decoder sees of a sample's prefix."""
    return fused.prefix.tokens[row][fused.prefix.mask[row]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("absent", ["image", "audio"])
def test_an_absent_modality_is_as_if_it_had_never_been_configured(kind, absent):
    both, present = make(kind), "audio" if absent == "image" else "image"
    alone = make(kind, {present: DIMS[present]})
    alone.load_state_dict({name: both.state_dict()[name] for name in alone.state_dict()})
    given = tokens(present)
    expected = alone({present: given})
    masked = tokens(absent)
    masked.mask[:] = False
    for found in (both({present: given}), both({present: given, absent: masked})):
        for row in range(4):
            torch.testing.assert_close(seen(found, row), seen(expected, row))


@pytest.mark.parametrize("kind", KINDS)
def test_samples_with_and_without_a_modality_share_a_batch(kind):
    fusion, given = make(kind), {name: tokens(name) for name in DIMS}
    given["audio"].mask[2] = False
    given["image"].mask[3] = False
    found = fusion(given)
    whole = fusion({name: tokens(name) for name in DIMS})
    torch.testing.assert_close(seen(found, 0), seen(whole, 0))
    torch.testing.assert_close(seen(found, 2), seen(fusion({"image": tokens("image")}), 2))
    torch.testing.assert_close(seen(found, 3), seen(fusion({"audio": tokens("audio")}), 3))
    assert found.prefix.tokens.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_without_any_modality_has_no_prefix_and_spoils_nothing(kind):
    fusion, given = make(kind), {name: tokens(name) for name in DIMS}
    for part in given.values():
        part.mask[1] = False
        part.tokens[1] = torch.nan
        part.tokens.requires_grad_()
    found = fusion(given)
    assert not found.prefix.mask[1].any() and found.prefix.mask[0].all()
    found.prefix.tokens[[0, 2, 3]].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in fusion.parameters() if parameter.grad is not None)
    assert all(figure.isfinite() for figure in found.figures.values())


@pytest.mark.parametrize("kind", KINDS)
def test_padding_tokens_change_nothing(kind):
    fusion = make(kind)
    given = {name: tokens(name) for name in DIMS}
    padded = {
        name: Tokens(
            torch.cat([part.tokens, 9 * torch.ones(4, 2, DIMS[name])], 1),
            torch.cat([part.mask, part.mask[:, :2] & False], 1),
        )
        for name, part in given.items()
    }
    torch.testing.assert_close(fusion(padded).prefix.tokens, fusion(given).prefix.tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_the_prefix_depends_on_every_modality_and_on_the_order_of_its_tokens(kind):
    fusion, given = make(kind), {name: tokens(name) for name in DIMS}
    usual = fusion(given).prefix.tokens
    for name in DIMS:
        other = {**given, name: tokens(name, seed=2)}
        turned = {**given, name: Tokens(given[name].tokens.flip(1), given[name].mask)}
        assert (fusion(other).prefix.tokens - usual).abs().amax((1, 2)).min() > 1e-3
        assert (fusion(turned).prefix.tokens - usual).abs().amax((1, 2)).min() > 1e-4


def test_cross_attention_begins_with_closed_gates_that_open_in_training():
    torch.manual_seed(0)
    fusion = CrossAttentionFusion(DIMS, WIDTH, 3, heads=2)
    given = {name: tokens(name) for name in DIMS}
    first = fusion(given)
    assert {name: float(value) for name, value in first.figures.items()} == {"gate/image": 0.0, "gate/audio": 0.0}
    torch.testing.assert_close(first.prefix.tokens[0], first.prefix.tokens[1])  # the queries alone
    optimizer = torch.optim.SGD(fusion.parameters(), lr=0.1)
    fusion(given).prefix.tokens.square().sum().backward()
    optimizer.step()
    after = fusion(given)
    assert all(value > 0 for value in after.figures.values())
    assert (after.prefix.tokens[0] - after.prefix.tokens[1]).abs().max() > 1e-4


def test_gated_weights_are_a_samples_own_and_sum_to_one_over_what_it_has():
    fusion = make((GatedFusion, {}))
    with torch.no_grad():
        for score in fusion.scores.values():
            score.weight.mul_(5)
    given = {name: tokens(name) for name in DIMS}
    given["audio"].mask[0] = False
    figures = fusion(given).figures
    weights = [
        fusion(
            {name: Tokens(part.tokens[row : row + 1], part.mask[row : row + 1]) for name, part in given.items()}
        ).figures
        for row in range(4)
    ]
    assert float(weights[0]["gate/image"]) == 1.0 and float(weights[0]["gate/audio"]) == 0.0
    for of_row in weights[1:]:
        assert float(of_row["gate/image"] + of_row["gate/audio"]) == pytest.approx(1.0)
    assert len({round(float(of_row["gate/image"]), 4) for of_row in weights}) == 4
    assert float(figures["gate/audio"]) == pytest.approx(sum(float(w["gate/audio"]) for w in weights[1:]) / 3, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "dims", "words"),
    [
        (ConcatFusion, {}, "give one or more of"),
        (GatedFusion, {"video": 3}, r"fusion of \['video'\]"),
        (CrossAttentionFusion, {"image": 4}, "3 heads do not divide the width 8 of the queries"),
    ],
)
def test_fusions_that_cannot_be_are_refused(kind, dims, words):
    options = {"heads": 3} if kind is CrossAttentionFusion else {}
    with pytest.raises(ValueError, match=words):
        kind(dims, WIDTH, 2, **options)


def test_a_prefix_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="tokens=0"):
        ConcatFusion(DIMS, WIDTH, 0)


def test_more_tokens_than_places_are_refused():
    with pytest.raises(ValueError, match="set its max_tokens from 5 up"):
        CrossAttentionFusion(DIMS, WIDTH, 2, heads=2, max_tokens=5)({"image": tokens("image")})
