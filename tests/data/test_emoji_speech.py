"""The shipped emoji-speech data set keeps the promises of its card."""

import hashlib
import io
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile as sf
from PIL import Image

ROOT = Path(__file__).resolve().parents[2] / "data" / "emoji_speech"
BUDGET_BYTES = 25_000_000
CONCEPTS = 1586
TRAIN_VENDORS, TEST_VENDOR = {"noto", "fluent"}, "twemoji"
TEST_VOICES, ENGINE_VOICE = {"espeak_en-us_f2", "flite_awb"}, "festival_kal"
TRAINING_SPLITS = {"train", "val"}


def rows(name: str, *columns: str) -> list[dict]:
    """Rows of one file, without the heavy column unless it is asked for."""
    return pq.read_table(ROOT / name, columns=list(columns)).to_pylist()


@pytest.fixture(scope="module")
def manifest() -> dict:
    return json.loads((ROOT / "manifest.json").read_text())


@pytest.fixture(scope="module")
def images() -> list[dict]:
    return rows("images.parquet", "sample_id", "concept_id", "group", "text", "emoji", "source", "split", "image")


@pytest.fixture(scope="module")
def speech() -> list[dict]:
    return rows("speech.parquet", "sample_id", "concept_id", "group", "text", "emoji", "source", "engine", "split")


@pytest.fixture(scope="module")
def clips() -> list[tuple[str, bytes]]:
    """A seeded sample of 500 encoded clips."""
    table = pq.read_table(ROOT / "speech.parquet", columns=["sample_id", "audio"])
    chosen = sorted(random.Random(0).sample(range(table.num_rows), 500))
    return [(row["sample_id"], row["audio"]["bytes"]) for row in table.take(chosen).to_pylist()]


def test_the_whole_folder_fits_the_budget():
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) <= BUDGET_BYTES


@pytest.mark.parametrize("name", ["images.parquet", "speech.parquet"])
def test_the_manifest_describes_the_file_on_disk(manifest, name):
    data = (ROOT / name).read_bytes()
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    for (split, source), count in Counter((r["split"], r["source"]) for r in rows(name, "split", "source")).items():
        counts[split][source] = count
    stated = manifest["files"][name]
    assert hashlib.sha256(data).hexdigest() == stated["sha256"]
    assert len(data) == stated["bytes"]
    assert counts == stated["rows_by_split_and_source"]
    assert sum(sum(sources.values()) for sources in counts.values()) == stated["rows"]


def test_concepts_are_numbered_from_zero_and_named_alike_everywhere(images, speech, manifest):
    assert {r["concept_id"] for r in images} == set(range(CONCEPTS)) == {r["concept_id"] for r in speech}
    assert manifest["concepts"] == CONCEPTS
    facts = {(r["concept_id"], r["group"], r["text"], r["emoji"]) for r in [*images, *speech]}
    assert len(facts) == CONCEPTS == len({text for _, _, text, _ in facts})


def test_sample_ids_are_unique(images, speech):
    for table in (images, speech):
        assert len({r["sample_id"] for r in table}) == len(table)


def test_every_concept_is_drawn_once_by_each_vendor(images):
    drawn = Counter((r["concept_id"], r["source"]) for r in images)
    assert set(drawn.values()) == {1}
    assert len(drawn) == CONCEPTS * len(TRAIN_VENDORS | {TEST_VENDOR})


def test_every_seen_concept_is_spoken_once_by_each_voice_and_unseen_ones_by_the_test_voices_only(speech):
    voices = defaultdict(list)
    for r in speech:
        voices[r["concept_id"]].append(r["source"])
    unseen = {r["concept_id"] for r in speech if r["split"].startswith("unseen")}
    everyone = sorted({r["source"] for r in speech})
    for concept, heard in voices.items():
        assert sorted(heard) == (sorted(TEST_VOICES | {ENGINE_VOICE}) if concept in unseen else everyone)


def test_drawings_are_split_by_vendor(images):
    for r in images:
        allowed = {"test", "unseen"} if r["source"] == TEST_VENDOR else TRAINING_SPLITS | {"unseen_train_source"}
        allowed = allowed | {"left_out"}
        assert r["split"] in allowed, r["sample_id"]


def test_recordings_are_split_by_voice_and_engine(speech):
    for r in speech:
        if r["source"] == ENGINE_VOICE:
            allowed = {"test_engine", "unseen_engine"}
        elif r["source"] in TEST_VOICES:
            allowed = {"test", "unseen"}
        else:
            allowed = TRAINING_SPLITS
        assert r["split"] in allowed | {"left_out"}, r["sample_id"]
    assert "festival" not in {r["engine"] for r in speech if r["split"] in TRAINING_SPLITS}
    assert len({r["source"] for r in speech if r["split"] == "train"}) >= 5


def test_no_unseen_concept_and_no_group_of_one_reaches_training(images, speech, manifest):
    rows_of_both = [*images, *speech]
    unseen = {r["concept_id"] for r in rows_of_both if r["split"].startswith("unseen")}
    assert 90 <= len(unseen) <= 110 and len(unseen) == manifest["unseen_concepts"]
    groups = {r["group"] for r in rows_of_both if r["concept_id"] in unseen}
    trained = [r for r in rows_of_both if r["split"] in TRAINING_SPLITS]
    assert not unseen & {r["concept_id"] for r in trained}
    assert not groups & {r["group"] for r in trained}
    assert not groups & {r["group"] for r in rows_of_both if not r["split"].startswith("unseen")}


def test_seen_twins_of_unseen_concepts_are_left_out_of_training_and_of_queries(images, speech):
    rows_of_both = [*images, *speech]
    twins = {r["concept_id"] for r in rows_of_both if r["split"] == "left_out"}
    names = {r["text"] for r in images if r["concept_id"] in twins}
    assert {"snowman without snow", "bowl with spoon"} <= names
    assert {r["split"] for r in rows_of_both if r["concept_id"] in twins} == {"left_out"}


def test_obvious_near_duplicates_share_a_group(images):
    group = {r["text"]: r["group"] for r in images}
    for twins in (
        ("firefighter", "man firefighter", "woman firefighter"),
        ("one o’clock", "one-thirty", "twelve o’clock"),
        ("full moon", "new moon", "waxing crescent moon"),
        ("red heart", "blue heart"),
        ("dog face", "dog"),
        ("keycap: 0", "keycap: 9"),
        ("grinning face", "grinning face with big eyes"),
    ):
        assert len({group[name] for name in twins}) == 1, twins
    assert group["octopus"] != group["rocket"]


def test_validation_takes_one_drawing_and_one_recording_of_200_concepts_and_leaves_the_others(images, speech):
    drawings = [r for r in images if r["split"] == "val"]
    recordings = [r for r in speech if r["split"] == "val"]
    assert Counter(r["source"] for r in drawings) == dict.fromkeys(TRAIN_VENDORS, 100)
    assert len({r["concept_id"] for r in drawings}) == len(drawings)
    assert sorted(r["concept_id"] for r in recordings) == sorted(r["concept_id"] for r in drawings)
    assert len(set(Counter(r["source"] for r in recordings).values())) == 1
    val = {r["concept_id"] for r in drawings}
    for table in (images, speech):
        assert val <= {r["concept_id"] for r in table if r["split"] == "train"}


def test_every_drawing_is_64_pixels_square_on_white_and_not_blank(images):
    for r in images:
        pixels = np.asarray(Image.open(io.BytesIO(r["image"]["bytes"])).convert("RGB"), dtype=np.int16)
        assert pixels.shape == (64, 64, 3), r["sample_id"]
        assert (pixels < 250).any(-1).mean() > 0.02, r["sample_id"]
        assert pixels.std() > 2, r["sample_id"]  # the palest is a light grey square


def test_sampled_clips_are_mono_16_khz_of_sane_length_and_level(clips):
    for sample_id, data in clips:
        wave, rate = sf.read(io.BytesIO(data))
        assert rate == 16_000 and wave.ndim == 1, sample_id
        assert 0.15 < len(wave) / rate < 4, sample_id
        assert 0.05 < np.abs(wave).max() <= 1.0, sample_id
        loudest = np.sqrt(np.mean(wave**2))
        assert -40 < 20 * np.log10(loudest) < -12, sample_id


def test_sampled_clips_start_and_end_close_to_the_speech(clips):
    for sample_id, data in clips:
        wave, rate = sf.read(io.BytesIO(data))
        power = np.convolve(wave**2, np.ones(160) / 160, "same")
        loud = np.flatnonzero(power > power.max() * 1e-3)
        assert loud[0] / rate < 0.3 and (len(wave) - loud[-1]) / rate < 0.4, sample_id


def test_load_dataset_gives_pictures_and_typed_audio(tmp_path):
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(str(ROOT), "images", split="full", cache_dir=str(tmp_path))
    assert isinstance(loaded[0]["image"], Image.Image) and loaded[0]["image"].size == (64, 64)
    assert isinstance(loaded[0]["keywords"], list)
    files = str(ROOT / "speech.parquet")
    streamed = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    assert streamed.features["audio"] == datasets.Audio(sampling_rate=16_000)
    assert streamed.features["text"] == datasets.Value("string")


def test_names_are_read_aloud_as_words():
    for row in rows("speech.parquet", "text", "spoken"):
        assert row["spoken"].isascii(), row
        assert set(row["spoken"]) <= set("abcdefghijklmnopqrstuvwxyz ',"), row
