import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.errors import HydraException
from omegaconf import OmegaConf

from edge_glass.config import (
    ConfigError,
    check,
    explain_override,
    load_config,
    modalities,
    save_config,
    to_experiment,
)
from edge_glass.signatures import check_targets
from tests import mini

ROOT = mini.CONF.parent
PATHS = {
    "dataset/image_text": ["encoder=vision_text", "dataset.image=pictures"],
    "dataset/audio_text": ["encoder=audio_text", "dataset.audio=speech"],
    "dataset/pixmo_cap_openorca": ["encoder=vision_text"],
    "dataset/triplets": ["dataset.image=pictures", "dataset.audio=speech"],
    "objective/joint": ["decoder=trm"],
    "objective/instruction": ["decoder=trm", "objective.init_from=run"],
    **{
        option: ["experiment=trm_sudoku"]
        for option in ("encoder/none", "dataset/sudoku", "dataset/maze", "decoder/trm_solver", "objective/puzzle")
    },
}
SHARED = ("space", "prompts", "text", "reads")  # files that are part of every option of their group
PARTS = {  # groups that a tower takes in: at which places
    "resampler": [f"resampler@encoder.{name}.resampler" for name in ("image", "audio", "text")],
    "language_model": ["language_model@backbone.decoder"],
    "projection": [f"projection@encoder.{name}.projection" for name in ("image", "audio", "text")],
}
NO_GROUPS = ("hydra", "tower")  # Hydra's own looks; parts of every encoder


def options() -> list[tuple[str, ...]]:
    """Every option of every group, as a command line."""
    found = []
    for file in sorted(mini.CONF.glob("*/*.yaml")):
        group, option = file.parent.name, file.stem
        if group in NO_GROUPS or option in SHARED:
            continue
        places = ["projection@encoder.text.projection"] if option == "whitened" else PARTS.get(group, [group])
        found += [(f"{place}={option}", *PATHS.get(f"{group}/{option}", ())) for place in places]
    return found


def documented() -> list[tuple[str, ...]]:
    """Every `python train.py ...` of the docs and of the headers under conf/, as a command line."""
    commands = set()
    for file in (ROOT / "train.py", *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *mini.CONF.rglob("*.yaml")):
        for line in re.findall(r"python train\.py ([^`#\n]*)", file.read_text(encoding="utf-8").replace("\\\n", " ")):
            words = [word for word in shlex.split(line) if "=" in word]
            if words and not any(word.startswith("training.resume") or "<" in word for word in words):
                commands.add(tuple(first_job(word) for word in words))
    return sorted(commands)


def first_job(override: str) -> str:
    """What the first job of a sweep gets."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return override
    values = parsed.value()
    first = values.start if isinstance(values, IntervalSweep) else next(iter(parsed.sweep_string_iterator()))
    return f"{parsed.get_key_element()}={first}"


def checked(*overrides: str):
    """What `python train.py <overrides>` does before it imports anything heavy, and the check of other packages."""
    try:
        composed = mini.composed(*overrides)
    except HydraException as error:
        raise ConfigError(explain_override(error)) from error
    config = to_experiment(composed)
    check_targets(OmegaConf.to_container(config), foreign=True)
    return config


def test_there_are_documented_commands_to_test():
    assert len(documented()) > 15


@pytest.mark.parametrize("command", sorted({*options(), *documented()}), ids=" ".join)
def test_every_option_and_every_documented_command_is_a_valid_config(command):
    config = checked(*command)
    assert len(modalities(config)) >= (0 if config.dataset.puzzles is not None else 2)


@pytest.mark.parametrize(
    ("option", "present"),
    [
        ("trimodal", ["image", "audio", "text"]),
        ("vision_text", ["image", "text"]),
        ("audio_text", ["audio", "text"]),
    ],
)
def test_an_encoder_has_the_towers_that_its_name_says(option, present):
    assert modalities(checked(f"encoder={option}")) == present


def test_the_space_is_written_once_and_reaches_every_tower_and_the_loss():
    config = checked("encoder.dim=96", "encoder.widths=[96,24]")
    assert [config.encoder[name].projection.out_dim for name in modalities(config)] == [96, 96, 96]
    assert list(config.objective.alignment.widths) == [96, 24]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.max_stepz=3"], ["training.max_stepz", "Did you mean training.max_steps?"]),
        (["encoder.image.projection.hiden_dim=3"], ["Did you mean encoder.image.projection.hidden_dim?"]),
        (["trainng.max_steps=3"], ["trainng", "Did you mean training?"]),
        (["+training.max_stepz=3"], ["training.max_stepz", "Did you mean training.max_steps?"]),
        (["+speed=3"], ["speed", "backbone", "training"]),
        (["backbone=tinny"], ["backbone/tinny", "tiny", "pretrained"]),
        (["training.max_steps=[1"], ["'training.max_steps=[1' cannot be read as key=value"]),
        (["backbon=tiny"], ["backbon"]),
        (["training.max_steps=many"], ["training.max_steps=many", "Integer"]),
        (["training.max_steps=null"], ["training.max_steps"]),
        (["dataset.keep_decoded_mb=[1]"], ["dataset.keep_decoded_mb"]),
        (["training.precision=fp8"], ["training.precision", "fp8", "bf16"]),
        (["dataset.pair_by=colour"], ["dataset.pair_by", "colour", "sample_id"]),
        (["logger.wandb.mode=sometimes"], ["logger.wandb.mode", "sometimes", "offline"]),
        (["encoder.dim=256", "encoder.widths=[300,64]"], ["encoder.widths=[300, 64]", "encoder.dim=256"]),
        (["encoder.dim=300"], ["encoder.widths=[", "encoder.dim=300", "[300, 150]"]),
        (["encoder.widths=[256,0]"], ["encoder.widths=[256, 0]", "positive"]),
        (["encoder.widths=[256,64,64]"], ["encoder.widths=[256, 64, 64]", "distinct"]),
        (["dataset.recall=0"], ["dataset.recall=0.0", "positive", "null"]),
        (["optimization.negative_captions=-1"], ["optimization.negative_captions=-1"]),
        (["encoder.widths=[]"], ["encoder.widths=[]"]),
        (["encoder.widths=wide"], ["encoder.widths=wide"]),
        (["objective.alignment.widths=[9999]"], ["objective.alignment.widths=[9999]", "encoder.dim="]),
        (["encoder.image=null", "encoder.audio=null"], ["encoder", "['text']", "at least two"]),
        (["encoder=vision_text", "dataset=image_text"], ["dataset.image=<path>"]),
        (["dataset.image=null"], ["dataset.image=<path>", "encoder=audio_text"]),
        (["dataset.audio=null"], ["dataset.audio=<path>", "encoder=vision_text"]),
        (["optimization.batch_size=1"], ["optimization.batch_size=1", "at least 2"]),
        (["optimization.accumulation=0"], ["optimization.accumulation=0", "at least 1"]),
        (["training.max_steps=0"], ["training.max_steps=0", "at least 1"]),
        (["training.workers=-1"], ["training.workers=-1", "at least 0"]),
        (["launch.nproc_per_node=0"], ["launch.nproc_per_node=0", "at least 1"]),
        (["training.max_seconds=0"], ["training.max_seconds=0", "positive"]),
        (["training.test_checkpoint=newest"], ["training.test_checkpoint='newest'", "'last' or 'best'"]),
        (["training.test_checkpoint=best", "training.monitor=null"], ["training.monitor"]),
        (["dataset.validation_view=vall"], ["dataset.validation_view='vall'", "'val', 'test'"]),
        (["dataset.max_bad_share=2"], ["dataset.max_bad_share=2", "0..1"]),
        (["+dataset.shares={val: 0.6, test: 0.5}"], ["dataset.shares", "0.6", "below 1"]),
        (["+dataset.shares={val: -0.1}"], ["dataset.shares", "-0.1"]),
        (["~dataset.views", "dataset.validation_view=null"], ["dataset.views is empty"]),
        (["name=${nme}"], ["nme"]),
        (["backbone=pretrained", "backbone.audio.context=shrt"], ["context='shrt'", "'full', 'short'"]),
        (["backbone=pretrained", "backbone.audio.margin_frames=0.5"], ["margin_frames=0.5", "int"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in value[0] else "",
)
def test_what_does_not_fit_is_named_with_what_would(overrides, words):
    with pytest.raises(ConfigError) as found:
        checked(*overrides)
    message = str(found.value)
    assert [word for word in words if word not in message] == []
    assert "Traceback" not in message and "object_type" not in message


def test_a_config_is_read_back_as_it_was_written(tmp_path):
    for command in ((), ("encoder=vision_text", "training.precision=bf16", "dataset.pair_by=text", "logger=wandb")):
        config = checked(*command)
        save_config(config, tmp_path / "config.yaml")
        again = load_config(tmp_path / "config.yaml")
        assert again == config
        assert OmegaConf.get_type(again.training) is OmegaConf.get_type(config.training)


def test_a_written_config_holds_no_reference(tmp_path):
    save_config(checked(), tmp_path / "config.yaml")
    assert "${" not in (tmp_path / "config.yaml").read_text()


def test_a_missing_or_foreign_config_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no config at .*nothing\.yaml"):
        load_config(tmp_path / "nothing.yaml")
    (tmp_path / "other.yaml").write_text("learning_rate: 3\n")
    with pytest.raises(ConfigError, match="learning_rate"):
        load_config(tmp_path / "other.yaml")


def test_checking_changes_nothing():
    config = checked()
    before = OmegaConf.to_yaml(config)
    check(config)
    assert OmegaConf.to_yaml(config) == before
    assert isinstance(config.name, str) and Path(config.dataset.image).suffix == ".parquet"
