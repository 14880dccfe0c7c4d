import subprocess
import sys
from functools import cache

import pytest
from omegaconf import DictConfig, OmegaConf

from edge_glass.config import ConfigError
from edge_glass.signatures import check_targets
from tests import mini

SOME_TOWER = {
    "_target_": "edge_glass.models.projection.MatryoshkaProjection",
    "_partial_": True,
    "out_dim": 256,
    "widths": [256, 128],
}


@cache
def default_config() -> DictConfig:
    return mini.composed()


def config_with(key: str, value) -> dict:
    """The default config as plain containers, with one value more or changed."""
    config = default_config().copy()
    OmegaConf.update(config, key, value, force_add=True)
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return plain


def test_the_default_config_fits_its_constructors():
    check_targets(config_with("seed", 0), foreign=True)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("objective.alignment.chunks", 5, ["objective.alignment.chunks", "Did you mean chunk?"]),
        ("encoder.image.projection.droput", 0.1, ["encoder.image.projection.droput", "Did you mean dropout?"]),
        ("encoder.audio.colour", "red", ["encoder.audio.colour", "segments"]),
        ("backbone.text.nam", "x", ["backbone.text.nam", "Did you mean name?"]),
        ("dataset.train.rows_", 1, ["dataset.train.rows_", "keyword_share"]),
        ("objective.alignment.chunk", 1.5, ["objective.alignment.chunk=1.5", "int", "float"]),
        ("objective.alignment.chunk", True, ["objective.alignment.chunk=True", "int", "bool"]),
        ("objective.alignment.temperature", "warm", ["objective.alignment.temperature='warm'", "float"]),
        ("objective.alignment.kind", "softmax", ["objective.alignment.kind='softmax'", "infonce", "siglip"]),
        ("objective.alignment.width_weights", [1.0, "a"], ["objective.alignment.width_weights", "list[float] | None"]),
        (
            "objective.alignment.pair_weights.image_text",
            "much",
            ["objective.alignment.pair_weights", "dict[str, float]"],
        ),
        ("encoder.image.segments", None, ["encoder.image.segments=None", "int"]),
        ("encoder.image.encoder", None, ["encoder.image.encoder=None"]),
        ("encoder.image.encoder", "resnet", ["encoder.image.encoder='resnet'"]),
        ("encoder.image._target_", "edge_glass.models.build.build_towr", ["build_towr", "build_tower"]),
        ("encoder.image._target_", "edge_glass.model.build.build_tower", ["no module 'model'"]),
        ("encoder.image._target_", "edge_glass.models", ["edge_glass.models"]),
        ("encoder.image._target_", 5, ["encoder.image._target_", "5"]),
        (
            "backbone.image._target_",
            "edge_glass.encoders.vision.VisionEncoder.from_confg",
            ["from_confg", "from_config", "from_pretrained"],
        ),
        ("optimization.optimizer._target_", "torch.optim.AdamX", ["optimization.optimizer", "torch.optim.AdamX"]),
        ("optimization.optimizer._target_", "torchh.optim.Adam", ["torchh.optim.Adam"]),
        ("optimization.optimizer._target_", "Adam", ["optimization.optimizer._target_='Adam'"]),
        ("optimization.optimizer.learning_rate", 1.0, ["optimization.optimizer.learning_rate", "lr"]),
        ("optimization.scheduler.warm_up", 0.1, ["optimization.scheduler.warm_up", "Did you mean warmup?"]),
    ],
)
def test_what_a_constructor_does_not_take_is_named_with_what_it_takes(key, value, words):
    with pytest.raises(ConfigError) as found:
        check_targets(config_with(key, value), foreign=True)
    assert [word for word in words if word not in str(found.value)] == []


def test_a_missing_argument_is_named_unless_it_comes_later():
    node = {"_target_": "edge_glass.models.perceiver.PerceiverResampler", "latents": 4}
    with pytest.raises(ConfigError, match=r"pool: .*\.PerceiverResampler also needs \['dim'\]"):
        check_targets({"pool": node})
    check_targets({"pool": {**node, "_partial_": True}})


def test_whole_numbers_are_floats_and_null_is_what_optional_arguments_take():
    check_targets({"projection": {**SOME_TOWER, "dropout": 0, "hidden_dim": None}})
    check_targets({"projection": {**SOME_TOWER, "dropout": 0.5, "hidden_dim": 8}})


def test_nodes_in_lists_and_in_other_nodes_are_checked():
    with pytest.raises(ConfigError, match=r"towers\[1\]\.inner\.wdths"):
        check_targets({"towers": [SOME_TOWER, {"inner": {**SOME_TOWER, "wdths": [2]}}]})


def test_a_built_object_is_taken_where_one_is_wanted():
    tower = {
        "_target_": "edge_glass.models.build.build_tower",
        "encoder": {"_target_": "edge_glass.encoders.vision.VisionEncoder.from_pretrained", "name": "x"},
        "resampler": None,
        "segments": 1,
        "projection": SOME_TOWER,
    }
    check_targets(tower)


def test_other_packages_are_left_alone_until_they_are_asked_for():
    node = {"optimizer": {"_target_": "no_such_package.Adam"}}
    check_targets(node)
    with pytest.raises(ConfigError, match="cannot be imported"):
        check_targets(node, foreign=True)


def test_a_check_of_our_own_targets_imports_nothing_heavy():
    code = (
        "import sys; from hydra import compose, initialize_config_dir; from omegaconf import OmegaConf\n"
        "from edge_glass.config import to_experiment; from edge_glass.signatures import check_targets\n"
        f"initialize_config_dir({str(mini.CONF)!r}, version_base='1.3').__enter__()\n"
        "check_targets(OmegaConf.to_container(to_experiment(compose('train'))))\n"
        "assert not {'torch', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
