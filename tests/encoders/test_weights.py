"""Where weights come from, and what is said when they do not."""

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants
from transformers import AutoModel, ResNetConfig, ResNetModel
from transformers.utils import logging

from edge_glass.encoders.weights import WeightsNotFound, checked_options, load_checkpoint, load_model
from edge_glass.errors import UserError


def small_resnet() -> ResNetModel:
    return ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))


def load_resnet(source: str) -> ResNetModel:
    return load_model(AutoModel, source)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def fill_cache(cache, name: str, model) -> None:
    """Lay a model out as the hub's client does."""
    repository = cache / f"models--{name.replace('/', '--')}"
    model.save_pretrained(repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")


def test_a_folder_gives_its_weights_in_fp32(tmp_path):
    model = small_resnet()
    model.half().save_pretrained(tmp_path / "resnet")
    loaded = load_checkpoint(str(tmp_path / "resnet"), load_resnet)
    for name, value in loaded.state_dict().items():
        if value.is_floating_point():
            assert value.dtype == torch.float32
            assert torch.equal(value, model.state_dict()[name].float())


def test_a_cached_checkpoint_needs_no_network(cache):
    model = small_resnet()
    fill_cache(cache, "someone/resnet", model)
    loaded = load_checkpoint("someone/resnet", load_resnet)
    assert torch.equal(next(loaded.parameters()), next(model.parameters()))


def test_an_incomplete_cache_is_completed_from_the_hub(cache, monkeypatch):
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **kwargs: None)
    fill_cache(cache, "someone/resnet", small_resnet())
    asked = []

    def load(source: str) -> str:
        asked.append(source)
        if Path(source).is_dir():
            raise OSError("no tokenizer.json")
        return f"weights of {source}"

    assert load_checkpoint("someone/resnet", load) == "weights of someone/resnet"
    assert asked == [str(cache / "models--someone--resnet" / "snapshots" / "abc123"), "someone/resnet"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("someone/resnet", "no network"), ("no-such-folder", "no network"), ("/no/such/folder", "Repo id")],
)
def test_without_folder_cache_and_network_one_message_says_what_to_do(cache, name, reason):
    with pytest.raises(WeightsNotFound) as error:
        load_checkpoint(name, load_resnet)
    message = str(error.value)
    for part in (name, str(cache), reason, "backbone=tiny", "HF_HOME", "folder"):
        assert part in message
    assert isinstance(error.value, UserError)
    assert isinstance(error.value, RuntimeError)


def test_a_folder_without_weights_is_named(tmp_path):
    small_resnet().config.save_pretrained(tmp_path)
    with pytest.raises(WeightsNotFound, match=r"model\.safetensors") as error:
        load_checkpoint(str(tmp_path), load_resnet)
    assert str(tmp_path) in str(error.value)


def test_pickled_weights_are_never_read(tmp_path):
    model = small_resnet()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsNotFound):
        load_checkpoint(str(tmp_path), load_resnet)


def test_a_missing_package_comes_with_its_installation():
    with pytest.raises(WeightsNotFound, match=r"not installed.*edge-glass\[demo\]"):
        load_checkpoint("package:no_such_package/model", load_resnet)


def test_a_package_without_the_folder_is_named():
    with pytest.raises(WeightsNotFound, match="'edge_glass' has no folder 'no_such_folder'"):
        load_checkpoint("package:edge_glass/no_such_folder", load_resnet)


def test_weights_missing_from_a_checkpoint_are_an_error_and_not_random(tmp_path):
    small_resnet().save_pretrained(tmp_path / "resnet")
    deeper = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic")
    deeper.save_pretrained(tmp_path / "deeper")
    shutil.copy(tmp_path / "resnet" / "model.safetensors", tmp_path / "deeper")
    with pytest.raises(ValueError, match=r"lacks \d+ weights of ResNetModel"):
        load_checkpoint(str(tmp_path / "deeper"), load_resnet)


def test_loading_is_quiet_and_leaves_logging_as_it_was(tmp_path, capfd):
    small_resnet().save_pretrained(tmp_path)
    logging.set_verbosity_info()
    try:
        capfd.readouterr()
        load_checkpoint(str(tmp_path), load_resnet)
        assert capfd.readouterr().err == ""
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()


def test_options_of_the_architecture_are_taken():
    options = {"d_model": 32, "encoder_layers": 1}
    assert checked_options("whisper", options) == options


def test_a_misspelt_option_is_refused_with_the_one_that_was_meant():
    with pytest.raises(ValueError, match=r"no option 'encoder_layer'; did you mean 'encoder_layers'\?"):
        checked_options("whisper", {"encoder_layer": 1})


def test_an_option_like_no_other_is_refused_with_all_valid_ones():
    with pytest.raises(ValueError, match=r"no option 'zzzzzz'.*hidden_sizes"):
        checked_options("resnet", {"zzzzzz": 1})


def test_an_unknown_model_type_is_refused():
    with pytest.raises(ValueError, match="no model type 'resnot'"):
        checked_options("resnot", {})
