"""Features of frozen towers: computed once, the same as without, and never another tower's or row's."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edge_glass.config import ConfigError, to_experiment
from edge_glass.data import features
from edge_glass.data.features import FeatureError, FeatureStore
from edge_glass.encoders.tokens import Encoder
from edge_glass.runs import read_metrics
from tests import mini


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """The data sets of these tests have several blocks."""
    monkeypatch.setattr(features, "BLOCK_ROWS", 10)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return mini.write_frozen_towers(tmp_path_factory.mktemp("frozen"))


@pytest.fixture
def encoded(monkeypatch):
    """Counts the rows that image and audio encoders are given."""
    counts = {"rows": 0}
    forward = Encoder.forward

    def counted(self, inputs):
        counts["rows"] += 0 if isinstance(inputs, list) else len(inputs)
        return forward(self, inputs)

    monkeypatch.setattr(Encoder, "forward", counted)
    return counts


@pytest.fixture
def train(tmp_path, mini_data, text_tower, towers, no_pictures):
    """Trains a run of a given name with frozen towers; its training rows and its last figures."""

    def run(name: str, *more: str, data: Path = mini_data, backbones: Path = towers):
        settings = [*mini.overrides(data, text_tower), *mini.frozen(backbones), f"cache.dir={tmp_path}/cache"]
        mini.run(to_experiment(mini.composed(*settings, *more)), tmp_path / name)
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        rows = [row for row in read_metrics(tmp_path / name) if row["kind"] == "train"]
        return rows, summary

    return run


def folders(tmp_path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").glob("*")}


RESAMPLED = ("resampler@encoder.image.resampler=perceiver", "encoder.image.resampler.latents=3")
HEADS = ("encoder.image.resampler.heads=2",)


@pytest.mark.parametrize(
    "more",
    [
        (),
        (*RESAMPLED, *HEADS),
        (*mini.DECODER, "fusion.takes=[tokens,embedding]"),
        ("optimization.accumulation=2", "training.workers=1"),
    ],
    ids=["pooled", "tokens for a resampler", "tokens for a decoder", "accumulated, with a worker"],
)
def test_a_run_from_stored_features_is_the_run_without(tmp_path, train, more):
    plain, judged = train("plain", *more, "cache.enabled=false")
    cached, judged_again = train("cached", *more, "cache.enabled=true", "cache.dtype=fp32")
    assert folders(tmp_path)
    for before, after in zip(plain, cached, strict=True):
        losses = {key: value for key, value in before.items() if key.startswith("loss")}
        assert losses == pytest.approx({key: after[key] for key in losses}, abs=1e-5)
    assert judged["metrics"] == pytest.approx(judged_again["metrics"], abs=1e-4)


def test_each_row_is_encoded_once_for_all_epochs_and_runs(train, encoded):
    train("first", "training.max_steps=12")
    rows = 24 * 2 + 24 * 3  # drawings and recordings
    probes = 2 * 10
    assert encoded["rows"] == rows + probes
    train("second", "seed=1", "encoder.widths=[16]", "training.max_steps=12")
    assert encoded["rows"] == rows + probes  # another job of a sweep


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_narrow_types_change_little(train, dtype):
    plain, _ = train("plain", "cache.enabled=false", "training.max_steps=3")
    cached, _ = train("cached", f"cache.dtype={dtype}", "training.max_steps=3")
    assert [row["loss"] for row in plain] == pytest.approx([row["loss"] for row in cached], rel=0.02)


def test_another_tower_or_another_row_has_features_of_its_own(tmp_path, train, towers, mini_data, encoded):
    train("first", "training.max_steps=1")
    before = folders(tmp_path)
    changed = shutil.copytree(towers, tmp_path / "towers")
    weights = load_file(changed / "image" / "model.safetensors")
    weights = {name: tensor * 1.5 for name, tensor in weights.items()}
    save_file(weights, changed / "image" / "model.safetensors", {"format": "pt"})
    train("other tower", "training.max_steps=1", backbones=changed)
    after = folders(tmp_path)
    assert len(after - before) == 1 and next(iter(after - before)).startswith("image-")
    data = shutil.copytree(mini_data, tmp_path / "data")
    rows = mini.image_rows()
    rows[0]["image"]["bytes"] = mini.png(mini.drawing(5))
    mini.write_parquet(data / "images.parquet", rows)
    train("other row", "training.max_steps=1", data=data)
    assert {name.split("-")[0] for name in folders(tmp_path) - after} == {"image"}
    before = folders(tmp_path)
    train("other context", "training.max_steps=1", "+backbone.audio.context=short")
    assert {name.split("-")[0] for name in folders(tmp_path) - before} == {"audio"}


def test_what_a_killed_build_left_is_completed_not_done_again(tmp_path, train, encoded):
    train("first", "training.max_steps=1")
    of_all = encoded["rows"]
    (image,) = (tmp_path / "cache").glob("image-*")
    files = sorted(image.glob("*.npy"))
    assert len(files) == 5
    files[1].unlink()
    (image / f".{files[1].name}.half").write_bytes(b"half a file")
    train("second", "training.max_steps=1")
    assert encoded["rows"] - of_all == 10 + 10  # one block, and the probe that tells how long it takes


def test_a_block_that_another_job_computes_is_left_to_it(tmp_path):
    ours, theirs = (FeatureStore(tmp_path / "store", [str(n) for n in range(15)]) for _ in range(2))
    with theirs.claim(0) as first, ours.claim(0) as second, ours.claim(1) as third:
        assert (first, second, third) == (True, False, True)
        theirs.write(0, [[torch.full((1, 2), float(n))] for n in range(10)], {})
    with ours.claim(0) as again:
        assert not again  # it is there now
    assert ours.missing() == [1]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_features_come_back_in_any_order_and_of_any_length(tmp_path, dtype):
    store = FeatureStore(tmp_path, [f"row {n}" for n in range(25)], variants=2, dtype=dtype)
    values = [[torch.full((1 + row % 3, 4), float(row + 100 * variant)) for variant in (0, 1)] for row in range(25)]
    for block in store.missing():
        rows = store.rows_of(block)
        store.write(block, [values[row] for row in rows], {})
    places = [store.place("row 24"), store.place("row 3") + 1, store.place("row 11"), store.place("row 3") + 1]
    found = store.gather(places)
    wanted = [values[24][0], values[3][1], values[11][0], values[3][1]]
    assert found.mask.sum(1).tolist() == [len(part) for part in wanted]
    for row, part in enumerate(wanted):
        assert torch.equal(found.values[row][found.mask[row]].float(), part)


def test_broken_rows_are_counted_as_without(tmp_path, train, mini_data):
    data = shutil.copytree(mini_data, tmp_path / "data")
    rows = mini.image_rows()
    rows[3]["image"]["bytes"] = b"no picture"
    mini.write_parquet(data / "images.parquet", rows)
    settings = ["dataset.max_bad_share=1.0", "training.max_steps=12", "cache.dtype=fp32"]
    plain, without = train("plain", *settings, "cache.enabled=false", data=data)
    cached, with_cache = train("cached", *settings, data=data)
    assert without["skipped_rows"] == with_cache["skipped_rows"] and without["skipped_rows"]["count"] == 1
    assert [row["loss"] for row in plain] == pytest.approx([row["loss"] for row in cached], abs=1e-5)


AUGMENTED = "dataset.image_augment={_target_: edge_glass.data.augment.ImageAugment}"


def test_pictures_that_vary_are_stored_in_variants_only_if_asked_for(tmp_path, train, encoded):
    train("plain", AUGMENTED, "training.max_steps=1")
    assert {name.split("-")[0] for name in folders(tmp_path)} == {"audio"}
    encoded["rows"] = 0
    varied, _ = train("varied", AUGMENTED, "cache.enabled=true", "cache.views=3", "training.max_steps=12")
    assert encoded["rows"] == (24 * 2 + 10) * (1 + 3)
    again, _ = train("again", AUGMENTED, "cache.enabled=true", "cache.views=3", "training.max_steps=12")
    unvaried, _ = train("unvaried", "training.max_steps=12")
    losses, losses_again, losses_unvaried = ([row["loss"] for row in run] for run in (varied, again, unvaried))
    assert losses == losses_again != losses_unvaried


def test_a_store_that_is_too_large_or_that_no_tower_needs_is_refused(tmp_path, train, mini_data, text_tower):
    with pytest.raises(ConfigError, match=r"cache\.max_bytes=100: the image features of 48 rows need"):
        train("large", "cache.max_bytes=100")
    trained = [*mini.overrides(mini_data, text_tower), "cache.enabled=true"]
    with pytest.raises(ConfigError, match=r"cache\.enabled=true: no tower's features can be stored"):
        mini.run(to_experiment(mini.composed(*trained)), tmp_path / "trained")
    with pytest.raises(ConfigError, match=r"cache\.dtype='int8': give fp16, bf16 or fp32"):
        train("typed", "cache.dtype=int8")


def test_a_feature_that_does_not_fit_its_type_is_not_stored_as_infinity(tmp_path):
    store = FeatureStore(tmp_path, ["row"], dtype="fp16")
    with pytest.raises(FeatureError, match=r"cache\.dtype=fp16: a feature of up to 1e\+05 does not fit"):
        store.write(0, [[torch.full((1, 2), 1e5)]], {})
    assert store.missing() == [0]
