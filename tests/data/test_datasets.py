import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from edge_glass.data import samples
from edge_glass.data.datasets import AudioTextDataset, ImageTextDataset, TriModalDataset
from edge_glass.data.decode import decode_image
from edge_glass.data.rows import DataError, read_tables
from edge_glass.data.samples import Decoding, MediaReader
from tests import mini


def decoding() -> Decoding:
    """One of its own for each data set: what it has decoded it keeps, by sample id."""
    return Decoding(image_size=16, seconds=1.0)


def tables(folder, images=None, speech=None, **options):
    paths = [
        None if rows is None else mini.write_parquet(folder / f"{name}.parquet", rows)
        for name, rows in (("image", images), ("audio", speech))
    ]
    return read_tables(*paths, **options)


def epoch_of(dataset, epoch=0):
    return [dataset[epoch, place] for place in range(len(dataset))]


def concept_of(sample_part: str) -> int:
    return int(sample_part.split("/")[1])


def triplet_rows(count=6):
    return [
        {
            "sample_id": f"t/{i}",
            "text": mini.names()[i],
            "image": {"bytes": mini.png(mini.drawing(i)), "path": None},
            "audio": {"bytes": mini.wav(mini.tone(i)), "path": None},
        }
        for i in range(count)
    ]


def test_a_sample_is_a_drawing_a_clip_and_a_name_of_one_concept(tmp_path):
    dataset = TriModalDataset(tables(tmp_path, mini.image_rows(), mini.speech_rows()), decoding())
    for sample in epoch_of(dataset):
        drawn, spoken = sample.sample_id.split("+")
        assert concept_of(drawn) == concept_of(spoken) == sample.concept_id
        assert sample.text == mini.names()[sample.concept_id]
        assert sample.image.shape == (3, 16, 16) and sample.image.dtype == torch.uint8
        assert sample.audio.shape == (4000,)
        assert not sample.skipped


def test_every_row_of_the_larger_side_comes_once_an_epoch_with_one_drawn_from_the_other(tmp_path):
    dataset = TriModalDataset(tables(tmp_path, mini.image_rows(), mini.speech_rows()), decoding())
    assert len(dataset) == len(mini.speech_rows())  # three voices, two vendors
    drawn, spoken = zip(*(sample.sample_id.split("+") for sample in epoch_of(dataset)), strict=True)
    assert set(Counter(spoken).values()) == {1}
    assert {name.split("/")[0] for name in drawn} == set(mini.VENDORS)
    drawn_later = [sample.sample_id.split("+")[0] for sample in epoch_of(dataset, epoch=1)]
    assert list(drawn) != drawn_later


def test_true_triplets_stay_together(tmp_path):
    rows = mini.write_parquet(tmp_path / "rows.parquet", [r | {"text": "the same"} for r in triplet_rows()])
    dataset = TriModalDataset(read_tables(rows, rows, "sample_id"), decoding())
    assert len(dataset) == 6
    for epoch in range(3):
        for sample in epoch_of(dataset, epoch):
            drawn, spoken = sample.sample_id.split("+")
            assert drawn == spoken


def test_sets_without_triplets_are_paired_through_text(tmp_path):
    images = [{"text": text, "image": {"bytes": mini.png(mini.drawing(0))}} for text in ("Cat", "dog", "cat", "bird")]
    speech = [{"text": text, "audio": {"bytes": mini.wav(mini.tone(0))}} for text in ("dog", "CAT", "fish")]
    dataset = TriModalDataset(tables(tmp_path, images, speech, pair_by="text"), decoding())
    pairs = Counter(sample.sample_id for sample in epoch_of(dataset))
    assert pairs == {"row-0+row-1": 1, "row-2+row-1": 1, "row-1+row-0": 1}


def test_sets_that_share_no_concept_are_refused(tmp_path):
    images = [r | {"concept_id": r["concept_id"] + 100} for r in mini.image_rows()]
    with pytest.raises(DataError, match=r"no concept has a row in each.*24 concepts.*dataset\.pair_by"):
        TriModalDataset(tables(tmp_path, images, mini.speech_rows()), decoding())


def test_image_text_and_audio_text_sets_give_each_row_once(tmp_path):
    both = tables(tmp_path, mini.image_rows(), mini.speech_rows())
    for kind, present, absent, rows in (
        (ImageTextDataset, "image", "audio", mini.image_rows()),
        (AudioTextDataset, "audio", "image", mini.speech_rows()),
    ):
        samples = epoch_of(kind(both, decoding()))
        assert sorted(s.sample_id for s in samples) == sorted(row["sample_id"] for row in rows)
        assert all(getattr(s, present) is not None and getattr(s, absent) is None for s in samples)
        with pytest.raises(DataError, match=f"needs {present} rows"):
            kind({absent: both[absent]}, decoding())


def test_captions_are_keywords_as_often_as_asked(tmp_path):
    both = tables(tmp_path, mini.image_rows())
    for share in (0.0, 0.3, 1.0):
        dataset = ImageTextDataset(both, decoding(), keyword_share=share)
        samples = [sample for epoch in range(10) for sample in epoch_of(dataset, epoch)]
        keywords = [sample for sample in samples if sample.text != mini.names()[sample.concept_id]]
        assert len(keywords) / len(samples) == pytest.approx(share, abs=0.07)
        assert all(sample.text in mini.names()[sample.concept_id].split() for sample in keywords)
    with pytest.raises(DataError, match=r"0\.\.1, not 2"):
        ImageTextDataset(both, decoding(), keyword_share=2.0)


def test_a_sample_follows_from_seed_epoch_and_place_alone(tmp_path):
    both = tables(tmp_path, mini.image_rows(), mini.speech_rows())
    first = TriModalDataset(both, decoding(), keyword_share=0.5, seed=3)
    again = TriModalDataset(both, decoding(), keyword_share=0.5, seed=3)
    epoch_of(again, epoch=7)  # what was read before does not matter
    for place in range(len(first)):
        a, b = first[2, place], again[2, place]
        assert (a.sample_id, a.text) == (b.sample_id, b.text)
        assert a.generator.random() == b.generator.random()
    other = TriModalDataset(both, decoding(), keyword_share=0.5, seed=4)
    assert [s.sample_id for s in epoch_of(first)] != [s.sample_id for s in epoch_of(other)]


@pytest.fixture
def broken(tmp_path):
    """Image rows of which every eighth cannot be decoded."""
    rows = mini.image_rows()
    for number, row in enumerate(rows):
        if number % 8 == 3:
            row["image"]["bytes"] = b"<html>404</html>" if number % 16 == 3 else row["image"]["bytes"][:60]
    return rows, tables(tmp_path, rows)


def test_a_broken_row_is_replaced_and_named_and_no_other_sample_changes(broken, tmp_path):
    rows, damaged = broken
    (tmp_path / "whole").mkdir()
    whole = ImageTextDataset(tables(tmp_path / "whole", mini.image_rows()), decoding())
    dataset = ImageTextDataset(damaged, decoding())
    assert len(dataset) == len(whole)
    bad = {row["sample_id"] for number, row in enumerate(rows) if number % 8 == 3}
    met = {}
    for place in range(len(whole)):
        expected, sample = whole[0, place], dataset[0, place]
        assert sample.sample_id not in bad
        assert sample.text == mini.names()[sample.concept_id]
        if expected.sample_id in bad:
            assert sample.skipped[0].sample_id == expected.sample_id
            met |= {row.sample_id: row.reason for row in sample.skipped}
        else:
            assert sample.sample_id == expected.sample_id and not sample.skipped
    assert set(met) == bad
    assert all(reason.startswith("image: ") for reason in met.values())


def test_missing_files_are_broken_rows(tmp_path):
    rows = [{"sample_id": f"s{i}", "text": f"t{i}", "image_path": f"{i}.png"} for i in range(4)]
    folder = mini.write_jsonl(tmp_path / "rows", rows)
    for i in (0, 1, 3):
        (folder / f"{i}.png").write_bytes(mini.png(mini.drawing(i)))
    sample = ImageTextDataset(read_tables(folder, None), decoding())[0, 2]
    assert [row.sample_id for row in sample.skipped] == ["s2"] * len(sample.skipped)
    assert "2.png" in sample.skipped[0].reason


def test_a_set_of_broken_rows_stops_with_the_list(tmp_path):
    rows = [{"sample_id": f"s{i}", "text": "t", "image": {"bytes": b"nothing", "path": None}} for i in range(5)]
    with pytest.raises(DataError, match=r"cannot be decoded:\n  s\d: image: "):
        ImageTextDataset(tables(tmp_path, rows), decoding())[0, 0]


def test_each_row_is_decoded_once_until_the_memory_is_full(tmp_path, monkeypatch):
    rows = tables(tmp_path, mini.image_rows())["image"]
    side = 300  # 264 KiB a picture: three to a MiB
    memory = Decoding(image_size=side, keep_mb=1)
    decoded = []
    monkeypatch.setattr(samples, "decode_image", lambda data, size: decoded.append(data) or decode_image(data, size))
    training, validation = MediaReader(rows, "image", memory), MediaReader(rows.where({}), "image", memory)
    for reader in (training, validation):
        for row in range(5):
            assert torch.equal(reader.read(row), decode_image(rows.media("image", row), side))
    assert len(decoded) == 5 + 2
    forgetful = MediaReader(rows, "image", Decoding(image_size=8, keep_mb=0))
    for _ in range(2):
        forgetful.read(0)
    assert len(decoded) == 7 + 2


def test_a_worker_gets_no_copy_of_what_was_decoded(tmp_path):
    dataset = ImageTextDataset(tables(tmp_path, mini.image_rows()), Decoding(image_size=64))
    before = len(pickle.dumps(dataset))
    samples = epoch_of(dataset)
    after = pickle.dumps(dataset)
    assert len(after) == before
    assert torch.equal(pickle.loads(after)[0, 1].image, samples[1].image)


def test_negative_captions_are_of_concepts_that_the_batch_does_not_show(tmp_path):
    dataset = TriModalDataset(tables(tmp_path, mini.image_rows(), mini.speech_rows()), decoding())
    concepts = sorted({concept for concept, _ in dataset.places})
    negatives = dataset.negative_captions(1000, batch=4)
    shown = concepts[:3]
    texts, ids = negatives.draw(shown, np.random.default_rng(0))
    assert len(texts) == len(ids) == len(concepts) - 4  # as many as there always are, whatever a batch shows
    assert not set(ids.tolist()) & set(shown) and len(set(ids.tolist())) == len(ids)
    assert all(text == mini.names()[concept] for text, concept in zip(texts, ids.tolist(), strict=True))
    assert negatives.draw(shown, np.random.default_rng(0))[0] == texts
    assert negatives.draw(shown, np.random.default_rng(1))[0] != texts
    assert dataset.negative_captions(1000, batch=len(concepts)) is None
    assert dataset.negative_captions(0, batch=4) is None
