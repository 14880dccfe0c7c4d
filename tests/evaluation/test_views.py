import pytest
import torch
from omegaconf import OmegaConf

from edge_glass.data.loader import Collate
from edge_glass.data.rows import DataError, read_tables
from edge_glass.data.samples import Decoding
from edge_glass.evaluation.views import Views
from tests import mini

VAL = {
    "queries": {"image": {"split": ["val"]}, "audio": {"split": ["val"]}},
    "gallery": {"image": {"split": ["val"]}, "audio": {"split": ["val"]}},
}
TEST = {
    "queries": {"image": {"split": ["test"]}, "audio": {"split": ["test"]}},
    "gallery": {"image": {"source": ["brush"]}, "audio": {"source": ["high", "mid"]}},
}


class Oracle:
    """Embeds each row as its concept, so that every answer is right."""

    training = False

    def __init__(self, modalities=("image", "audio", "text")):
        self.modalities = modalities

    def encode(self, batch):
        (modality,) = batch.modalities()
        assert modality in self.modalities
        return {modality: torch.nn.functional.one_hot(batch.concept_ids, 100).float()}

    def train(self, mode=True):
        return self


@pytest.fixture(scope="module")
def tables(mini_data):
    return read_tables(mini_data / "images.parquet", mini_data / "speech.parquet")


def views_of(tables, views, **options) -> Views:
    collate = Collate([0.5] * 3, [0.5] * 3)
    return Views(tables, views, Decoding(image_size=8, seconds=0.5), collate, [100, 50], **options)


def recalls(result, view):
    """Direction -> R@1 at full width."""
    return {n.split("/")[1]: v for n, v in result.metrics.items() if n.startswith(f"{view}/") and n.endswith("/R@1")}


def test_a_task_that_knows_every_concept_is_always_right(tables):
    result = views_of(tables, {"val": VAL, "test": TEST}).evaluate(Oracle(), "cpu")
    for view in ("val", "test"):
        assert recalls(result, view) == dict.fromkeys(recalls(result, view), 1.0)
        assert len(recalls(result, view)) == 6


def test_only_the_rows_of_a_view_ask_and_are_ranked(tables):
    views = views_of(tables, {"test": TEST})
    embedded = views.embed(Oracle(), "cpu")
    queries, galleries = views.rows_of("test", embedded)

    def chosen(parts, name):
        return {embedded[name].sample_ids[row] for row in parts[name].nonzero().flatten()}

    assert chosen(queries, "image") == {f"brush/{i}" for i in range(24)}
    assert chosen(queries, "audio") == {f"high/{i}" for i in range(24)}
    assert chosen(galleries, "audio") == {f"{voice}/{i}" for voice in ("high", "mid") for i in range(24)}
    assert "text" not in queries


def test_rows_that_no_view_needs_are_not_decoded(tables):
    embedded = views_of(tables, {"val": VAL}).embed(Oracle(), "cpu")
    assert set(embedded["image"].sample_ids) == {f"pen/{i}" for i in range(0, 24, 6)}
    assert set(embedded["audio"].sample_ids) == {f"mid/{i}" for i in range(24)}


def test_the_names_that_are_ranked_are_those_of_the_ranked_concepts_unless_the_view_says_more(tables):
    pictures = {"queries": {"image": {"split": ["val"]}}, "gallery": {"image": {"split": ["val"]}}}
    more = {**pictures, "gallery": {**pictures["gallery"], "text": {"split": ["train", "val"]}}}
    only_images = {"image": tables["image"]}
    for view, names in ((pictures, 4), (more, 24)):
        result = views_of(only_images, {"val": view}).evaluate(Oracle(), "cpu")
        assert result.sizes["val/image_to_text/gallery"] == names
        assert result.chance["val/image_to_text/R@1/chance"] == pytest.approx(1 / names)
        assert result.sizes["val/text_to_image/queries"] == 4


def test_each_distinct_caption_of_a_concept_is_one_name(tmp_path):
    rows = mini.image_rows()
    for row in rows[:3]:
        row["text"] = "another name"  # of three concepts; the other vendor keeps theirs
    tables = read_tables(mini.write_parquet(tmp_path / "images.parquet", rows), None)
    view = {"queries": {"image": {"source": "pen"}}, "gallery": {"image": {"source": "pen"}}}
    embedded = views_of(tables, {"all": view}).embed(Oracle(), "cpu")
    assert len(embedded["text"]) == 24 + 3
    assert embedded["text"].concept_ids.bincount().tolist() == [2] * 3 + [1] * 21


def test_voices_are_ranked_one_by_one(tables):
    result = views_of(tables, {"all": {"queries": {"audio": {}}, "gallery": {"audio": {}}}}).evaluate(Oracle(), "cpu")
    assert result.sizes["all/text_to_audio/gallery"] == 24
    assert {f"all/audio_to_text/R@1/{voice}" for voice in mini.VOICES} <= set(result.metrics)


def test_a_modality_without_a_tower_is_not_embedded(tables):
    towers = ["image", "audio"]
    result = views_of(tables, {"test": TEST}, modalities=towers).evaluate(Oracle(towers), "cpu")
    assert set(recalls(result, "test")) == {"image_to_audio", "audio_to_image"}


def test_near_duplicates_count_where_every_table_knows_them(tables):
    with_groups = views_of(tables, {"test": TEST}).evaluate(Oracle(), "cpu")
    assert with_groups.metrics["test/image_to_text/group_R@1"] == 1.0
    speech = tables["audio"]
    less = {**tables, "audio": type(speech)(speech.table.drop_columns(["group"]), speech.folder, speech.files)}
    assert not [name for name in views_of(less, {"test": TEST}).evaluate(Oracle(), "cpu").metrics if "group" in name]


def test_a_condition_that_no_row_meets_is_named_with_what_there_is(tables):
    nobody = {**TEST, "gallery": {**TEST["gallery"], "audio": {"source": ["nobody"]}}}
    with pytest.raises(DataError, match=r"nobody.*'high', 'low', 'mid'"):
        views_of(tables, {"test": nobody})


def test_every_view_of_the_embedded_data_set_has_rows_and_answers_for_all_its_queries():
    dataset = OmegaConf.to_container(mini.composed().dataset, resolve=True)
    tables = read_tables(dataset["image"], dataset["audio"])
    for view in dataset["views"].values():
        for name, rows in tables.items():
            asking = rows.where(view["queries"][name])
            ranked = rows.where(view["gallery"][name])
            assert set(asking.column("concept_id")) <= set(ranked.column("concept_id"))
            assert set(asking.column("source")) <= set(ranked.column("source"))


def test_no_test_view_of_the_embedded_data_set_asks_with_a_source_of_the_training_rows():
    dataset = OmegaConf.to_container(mini.composed().dataset, resolve=True)
    tables = read_tables(dataset["image"], dataset["audio"])
    for view, parts in dataset["views"].items():
        for name, rows in tables.items():
            training = set(rows.where(dataset["where"]).column("source"))
            asking = set(rows.where(parts["queries"][name]).column("source"))
            assert asking <= training if view == dataset["validation_view"] else not asking & training
