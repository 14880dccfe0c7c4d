"""Towers and the model over any subset of the modalities."""

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from edge_glass.data.batch import AudioClips, Batch
from edge_glass.encoders.audio import AudioEncoder
from edge_glass.encoders.tokens import Encoder, Tokens
from edge_glass.encoders.vision import VisionEncoder
from edge_glass.models.alignment import MultimodalAlignmentModel, Tower
from edge_glass.models.counts import format_parameter_table, parameter_table
from edge_glass.models.perceiver import PerceiverResampler
from edge_glass.models.pooling import SegmentPool
from edge_glass.models.projection import MatryoshkaProjection, ProjectionHead
from edge_glass.models.recall import CaptionRecall

EMBEDDING = 8


class Letters(Encoder):
    """A text encoder small enough for a test: one frozen vector a letter."""

    def __init__(self):
        super().__init__(torch.nn.Embedding(128, 6), dim=6, frozen=True)

    def _encode(self, inputs: list[str]) -> Tokens:
        lengths = torch.tensor([len(text) for text in inputs])
        width = int(lengths.max())
        codes = torch.tensor([[ord(letter) for letter in text.ljust(width)] for text in inputs])
        return Tokens(self.backbone(codes), torch.arange(width) < lengths[:, None])


def image_tower() -> Tower:
    encoder = VisionEncoder.from_config(
        "resnet",
        16,
        [0.5] * 3,
        [0.5] * 3,
        embedding_size=8,
        hidden_sizes=[8, 8],
        depths=[1, 1],
        layer_type="basic",
    )
    return Tower(encoder, None, SegmentPool(4), ProjectionHead(4 * 8, EMBEDDING))


def audio_tower() -> Tower:
    encoder = AudioEncoder.from_config(
        d_model=16,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        num_mel_bins=20,
        max_source_positions=25,
    )
    resampler = PerceiverResampler(16, latents=2, depth=1, heads=2, max_tokens=25)
    return Tower(encoder, resampler, SegmentPool(2), MatryoshkaProjection(32, EMBEDDING, [4, EMBEDDING]))


def text_tower() -> Tower:
    return Tower(Letters(), None, SegmentPool(1), ProjectionHead(6, EMBEDDING, hidden_dim=10))


def model(*modalities: str) -> MultimodalAlignmentModel:
    torch.manual_seed(0)
    builders = {"image": image_tower, "audio": audio_tower, "text": text_tower}
    return MultimodalAlignmentModel({name: builders[name]() for name in modalities})


def batch(*modalities: str) -> Batch:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(6, 3, 16, 16, generator=generator)
    audio = AudioClips(torch.randn(6, 8000, generator=generator), torch.arange(1, 7) * 8000 // 6)
    text = ["red heart", "dog", "a", "grinning face", "tree", "sun"]
    return Batch(
        sample_ids=list("123456"),
        concept_ids=torch.arange(6),
        image=image if "image" in modalities else None,
        audio=audio if "audio" in modalities else None,
        text=text if "text" in modalities else None,
    )


ALL = ("image", "audio", "text")


@pytest.mark.parametrize("towers", [ALL, ("image", "text"), ("audio", "text"), ("image",)])
@pytest.mark.parametrize("held", [ALL, ("image", "audio")])
def test_embeddings_come_for_the_modalities_that_both_batch_and_model_have(towers, held):
    shared = [name for name in ALL if name in towers and name in held]
    embeddings = model(*towers)(batch(*held))
    assert list(embeddings) == shared
    assert all(embedding.shape == (6, EMBEDDING) for embedding in embeddings.values())


def test_nothing_in_common_is_an_error():
    with pytest.raises(ValueError, match=r"the batch holds \['text'\], the model has towers for \['image'\]"):
        model("image")(batch("text"))


def test_one_modality_can_be_encoded_alone():
    whole, samples = model(*ALL).eval(), batch(*ALL)
    for name, embedding in whole(samples).items():
        assert torch.allclose(whole.encode(name, samples.inputs(name)), embedding, atol=1e-6)


def test_encoding_what_the_model_has_no_tower_for_is_an_error():
    with pytest.raises(ValueError, match="no tower for 'audio'"):
        model("image").encode("audio", batch("audio").audio)


def test_embeddings_are_not_normalised():
    norms = model(*ALL)(batch(*ALL))["text"].norm(dim=1)
    assert not torch.allclose(norms, torch.ones(6), atol=1e-2)


def test_all_trainable_parameters_get_a_gradient_and_frozen_ones_none():
    whole = model(*ALL).train()
    sum(embedding.square().sum() for embedding in whole(batch(*ALL)).values()).backward()
    for name, parameter in whole.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_the_three_towers_learn_to_agree():
    whole, samples = model(*ALL).train(), batch(*ALL)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=3e-3)
    for _ in range(60):
        unit = {name: normalize(value, dim=1) for name, value in whole(samples).items()}
        loss = sum(
            cross_entropy(unit[a] @ unit[b].T / 0.1, samples.concept_ids)
            for a, b in (("image", "text"), ("audio", "text"), ("image", "audio"))
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3


def test_a_projection_that_does_not_fit_the_pooled_tokens_is_refused():
    with pytest.raises(ValueError, match="reads 7 features; pooling gives 2 segments x 6 = 12"):
        Tower(Letters(), None, SegmentPool(2), ProjectionHead(7, EMBEDDING))


def test_a_resampler_of_another_width_is_refused():
    with pytest.raises(ValueError, match="reads tokens of width 16; the encoder gives 6"):
        Tower(Letters(), PerceiverResampler(16, 2, heads=2), SegmentPool(1), ProjectionHead(16, EMBEDDING))


def test_unknown_modalities_are_refused():
    with pytest.raises(ValueError, match=r"\['picture'\]: give one or more of \['image', 'audio', 'text'\]"):
        MultimodalAlignmentModel({"picture": text_tower()})
    with pytest.raises(ValueError, match="give one or more"):
        MultimodalAlignmentModel({})


def test_towers_of_different_embedding_widths_are_refused():
    other = Tower(Letters(), None, SegmentPool(1), ProjectionHead(6, 4))
    with pytest.raises(ValueError, match=r"differ in width: \{'image': 8, 'text': 4\}"):
        MultimodalAlignmentModel({"image": image_tower(), "text": other})


def test_the_parameter_table_counts_each_part_once():
    whole = model(*ALL)
    rows = {row["part"]: row for row in parameter_table(whole.parts(), whole)}
    assert list(rows) == [
        "image.encoder",
        "image.projection",
        "audio.encoder",
        "audio.resampler",
        "audio.projection",
        "text.encoder",
        "text.projection",
        "total",
    ]
    assert rows["text.encoder"] == {"part": "text.encoder", "total": 128 * 6, "trainable": 0}
    assert rows["image.projection"]["trainable"] == 32 * EMBEDDING + EMBEDDING
    assert rows["total"]["total"] == sum(parameter.numel() for parameter in whole.parameters())
    for count in ("total", "trainable"):
        assert rows["total"][count] == sum(row[count] for part, row in rows.items() if part != "total")


def test_the_parameter_table_is_printed_in_aligned_columns():
    rows = [
        {"part": "text.encoder", "total": 22_713_216, "trainable": 0},
        {"part": "total", "total": 22_713_300, "trainable": 84},
    ]
    assert format_parameter_table(rows).splitlines() == [
        "part          parameters  trainable",
        "text.encoder  22,713,216          0",
        "total         22,713,300         84",
    ]


def test_recall_draws_pictures_and_sounds_to_the_captions_in_evaluation_alone():
    whole, samples = model(*ALL).eval(), batch(*ALL)
    with torch.no_grad():
        plain = whole(samples)
        whole.recall = CaptionRecall(plain["text"], 20.0)
        recalled = whole(samples)
        for name in ("image", "audio"):
            torch.testing.assert_close(recalled[name], whole.recall(plain[name]))
            assert not torch.allclose(recalled[name], plain[name])
        torch.testing.assert_close(recalled["text"], plain["text"])
        torch.manual_seed(0)
        trained = whole.train()(samples)
        whole.recall = None
        torch.manual_seed(0)
        assert torch.equal(whole(samples)["audio"], trained["audio"])
