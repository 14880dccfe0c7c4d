"""The image tower's backbone, over small models in the hub's own format."""

from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    ResNetConfig,
    ResNetModel,
)

from edge_glass.encoders.vision import VisionEncoder
from edge_glass.encoders.weights import WeightsNotFound

HALF = [0.5, 0.5, 0.5]
SMALL: dict[str, dict[str, Any]] = {
    "resnet": {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    },
    "bit": {"embedding_size": 16, "hidden_sizes": [16, 16], "depths": [1, 1], "num_groups": 4},
    "convnext": {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "patch_size": 4},
    "clip_vision_model": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 8,
    },
}
TOKENS = {"resnet": 16, "bit": 16, "convnext": 16, "clip_vision_model": 17}  # of 32 x 32 pixels


def small(model_type: str) -> VisionEncoder:
    return VisionEncoder.from_config(model_type, 32, HALF, HALF, **SMALL[model_type])


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP checkpoint with its image processor, whole and as its image half alone."""
    torch.manual_seed(0)
    half = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        vision_config={**half, "image_size": 32, "patch_size": 8},
        text_config={**half, "vocab_size": 50},
        projection_dim=8,
    )
    model = CLIPModel(config).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder / "whole")
    CLIPVisionModel.from_pretrained(folder / "whole").save_pretrained(folder / "image_half")
    for part in ("whole", "image_half"):
        processor.save_pretrained(folder / part)
    return folder, model


@pytest.mark.parametrize("model_type", SMALL)
def test_every_vision_class_gives_tokens(model_type):
    encoder = small(model_type)
    tokens = encoder(images())
    assert tokens.tokens.shape == (3, TOKENS[model_type], 16)
    assert (encoder.token_count, encoder.dim) == (TOKENS[model_type], 16)
    assert tokens.mask.shape == (3, TOKENS[model_type])
    assert tokens.mask.dtype == torch.bool
    assert tokens.mask.all()


@pytest.mark.parametrize("model_type", SMALL)
def test_every_trainable_parameter_gets_a_gradient(model_type):
    encoder = small(model_type)
    encoder(images()).tokens.square().sum().backward()
    trainable = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    assert trainable
    assert all(parameter.grad is not None for parameter in trainable)


def test_a_head_that_the_tokens_do_not_depend_on_is_not_trained():
    untrained = {name for name, value in small("clip_vision_model").named_parameters() if not value.requires_grad}
    assert untrained == {"backbone.post_layernorm.weight", "backbone.post_layernorm.bias"}


def test_the_map_of_a_convolutional_net_is_read_row_by_row():
    encoder = small("resnet").eval()
    tokens = encoder(images()).tokens
    feature_map = encoder.backbone(images()).last_hidden_state  # [batch, dim, 4, 4]
    for row in range(4):
        for column in range(4):
            assert torch.allclose(tokens[:, row * 4 + column], feature_map[:, :, row, column], atol=1e-6)


def test_the_class_token_of_a_transformer_stays_first():
    encoder = small("clip_vision_model").eval()
    pooled = encoder.backbone(images()).pooler_output
    first = encoder.backbone.post_layernorm(encoder(images()).tokens[:, 0])
    assert torch.allclose(first, pooled, atol=1e-6)


def test_the_config_takes_its_image_size_from_the_encoder():
    encoder = VisionEncoder.from_config("clip_vision_model", 64, HALF, HALF, **SMALL["clip_vision_model"])
    assert encoder.backbone.config.image_size == 64
    assert encoder.token_count == 1 + 8 * 8


def test_a_tower_from_a_config_trains_and_updates_its_batch_statistics():
    encoder = small("resnet")
    assert not encoder.frozen
    assert encoder.training
    before = encoder.backbone.embedder.embedder.normalization.running_mean.clone()
    encoder(images())
    assert not torch.equal(before, encoder.backbone.embedder.embedder.normalization.running_mean)


def test_building_an_encoder_leaves_batch_statistics_untouched():
    statistics = small("resnet").backbone.embedder.embedder.normalization
    assert statistics.num_batches_tracked == 0
    assert torch.equal(statistics.running_mean, torch.zeros(8))


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"reads images of \[32, 32\] pixels; these are \[64, 64\]"):
        small("resnet")(torch.zeros(1, 3, 64, 64))


def test_a_misspelt_option_is_refused():
    with pytest.raises(ValueError, match="did you mean 'hidden_sizes'"):
        VisionEncoder.from_config("resnet", 32, HALF, HALF, hiden_sizes=[8, 16])


@pytest.mark.parametrize("part", ["whole", "image_half"])
def test_a_clip_checkpoint_gives_its_own_tokens_and_normalisation(clip, part):
    folder, model = clip
    encoder = VisionEncoder.from_pretrained(str(folder / part))
    expected = model.vision_model(images()).last_hidden_state
    assert torch.allclose(encoder(images()).tokens, expected, atol=1e-6)
    assert encoder.image_size == 32  # what is cropped, not what is resized
    assert encoder.mean == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert encoder.std == pytest.approx([0.26862954, 0.26130258, 0.27577711])


def test_the_checkpoints_here_name_their_weights_as_published_ones_do(clip):
    folder, _ = clip
    for part in ("whole", "image_half"):
        with safe_open(folder / part / "model.safetensors", "pt") as file:
            assert "vision_model.embeddings.class_embedding" in file.keys()  # noqa: SIM118


def test_the_text_half_of_a_clip_checkpoint_is_not_held(clip):
    folder, model = clip
    encoder = VisionEncoder.from_pretrained(str(folder / "whole"))
    held = sum(parameter.numel() for parameter in encoder.parameters())
    assert held == sum(parameter.numel() for parameter in model.vision_model.parameters())


def test_a_frozen_encoder_has_no_gradient_and_stays_in_eval_mode(clip):
    encoder = VisionEncoder.from_pretrained(str(clip[0] / "whole"))
    encoder.train()
    assert encoder.frozen
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(images().requires_grad_()).tokens.requires_grad


def test_frozen_batch_statistics_do_not_move_while_the_model_around_trains():
    backbone = ResNetModel(ResNetConfig(**SMALL["resnet"]))
    model = torch.nn.Sequential(VisionEncoder(backbone, 32, HALF, HALF, frozen=True)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(images())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pretrained_weights_can_be_trained_on(clip):
    encoder = VisionEncoder.from_pretrained(str(clip[0] / "whole"), frozen=False)
    assert encoder.train().training
    encoder(images()).tokens.sum().backward()
    assert encoder.backbone.embeddings.class_embedding.grad is not None


def test_a_convolutional_checkpoint_with_its_processor_loads(tmp_path):
    backbone = ResNetModel(ResNetConfig(**SMALL["resnet"])).eval()
    backbone.save_pretrained(tmp_path)
    CLIPImageProcessor(
        size={"height": 32, "width": 32}, do_center_crop=False, image_mean=HALF, image_std=HALF
    ).save_pretrained(tmp_path)
    encoder = VisionEncoder.from_pretrained(str(tmp_path))
    assert (encoder.image_size, encoder.mean) == (32, HALF)
    expected = backbone(images()).last_hidden_state.flatten(2).transpose(1, 2)
    assert torch.allclose(encoder(images()).tokens, expected, atol=1e-5)


def test_a_checkpoint_without_image_processor_is_refused(tmp_path):
    ResNetModel(ResNetConfig(**SMALL["resnet"])).save_pretrained(tmp_path)
    with pytest.raises(WeightsNotFound, match="image processor"):
        VisionEncoder.from_pretrained(str(tmp_path))


def test_a_plain_convnet_is_a_model_of_transformers_own_format(tmp_path):
    encoder = VisionEncoder.from_config("plain_convnet", 16, [0.5] * 3, [0.25] * 3, hidden_sizes=[4, 8]).eval()
    images = torch.randn(2, 3, 16, 16)
    tokens = encoder(images).tokens
    assert tokens.shape == (2, 16, 8) and encoder.token_count == 16
    encoder.backbone.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(images).last_hidden_state.flatten(2).transpose(1, 2), tokens)
    with pytest.raises(ValueError, match="did you mean 'hidden_sizes'"):
        VisionEncoder.from_config("plain_convnet", 16, [0.5] * 3, [0.25] * 3, hidden_size=[4])
