from itertools import islice

import numpy as np
import pytest
import torch

from edge_glass.data.augment import ImageAugment
from edge_glass.data.batch import Batch, SkippedRow
from edge_glass.data.datasets import Decoding, Sample, TriModalDataset
from edge_glass.data.loader import Collate, EpochBatches, EvaluationBatches, training_loader
from edge_glass.data.rows import DataError, read_tables
from tests import mini

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


def decoding() -> Decoding:
    """One of its own for each data set: what it has decoded it keeps, by sample id."""
    return Decoding(image_size=16, seconds=1.0)


def taken(count, *arguments, **options):
    return list(islice(EpochBatches(*arguments, **options), count))


def flat(batches):
    return [index for batch in batches for index in batch]


@pytest.fixture(scope="module")
def tables(mini_data):
    return read_tables(mini_data / "images.parquet", mini_data / "speech.parquet")


def collate(augmented=True) -> Collate:
    return Collate(MEAN, STD, ImageAugment(degrees=30.0, flip=0.5, erase=0.5) if augmented else None)


def batches_of(tables, count, batch_size, workers=0, first=0, **place) -> list[Batch]:
    dataset = TriModalDataset(tables, decoding(), keyword_share=0.5, seed=1)
    order = EpochBatches(len(dataset), batch_size, 1, first=first, **place)
    return list(islice(training_loader(dataset, collate(), order, workers), count))


def assert_same(first: Batch, second: Batch):
    assert first.sample_ids == second.sample_ids
    assert first.text == second.text
    assert torch.equal(first.concept_ids, second.concept_ids)
    torch.testing.assert_close(first.image, second.image)
    assert torch.equal(first.audio.waveform, second.audio.waveform)
    assert torch.equal(first.audio.lengths, second.audio.lengths)


def test_every_row_comes_once_an_epoch_in_an_order_of_its_own():
    first, second = taken(5, 20, 4), taken(10, 20, 4)[5:]
    assert sorted(flat(first)) == [(0, place) for place in range(20)]
    assert sorted(flat(second)) == [(1, place) for place in range(20)]
    assert [place for _, place in flat(first)] != [place for _, place in flat(second)]
    assert flat(first) != flat(taken(5, 20, 4, seed=1))
    assert flat(first) == flat(taken(5, 20, 4))


def test_rows_that_fill_no_batch_sit_out_an_epoch_and_others_the_next():
    left_out = []
    for epoch in range(6):
        batches = taken(3 * (epoch + 1), 10, 3)[3 * epoch :]
        assert all(len(batch) == 3 for batch in batches)
        left_out.append({(epoch, place) for place in range(10)} - set(flat(batches)))
    assert all(len(places) == 1 for places in left_out)
    assert len({place for places in left_out for _, place in places}) > 1


@pytest.mark.parametrize("first", [1, 4, 5, 7, 23])
def test_a_resumed_order_goes_on_where_the_first_stopped(first):
    assert taken(6, 20, 4, first=first) == taken(first + 6, 20, 4)[first:]


def test_the_ranks_share_out_the_batches_of_one_process():
    whole = taken(8, 50, 8)
    parts = [taken(8, 50, 2, rank=rank, world_size=4) for rank in range(4)]
    assert [flat(shares) for shares in zip(*parts, strict=True)] == whole


def test_a_set_smaller_than_a_global_batch_is_refused():
    with pytest.raises(DataError, match=r"7 rows do not fill one global batch of 8; lower optimization\.batch_size"):
        EpochBatches(7, 4, world_size=2)


def test_batches_are_the_same_with_and_without_workers(tables):
    for alone, helped in zip(batches_of(tables, 10, 8), batches_of(tables, 10, 8, workers=2), strict=True):
        assert_same(alone, helped)


def test_two_ranks_of_four_see_the_samples_of_one_of_eight(tables):
    whole = batches_of(tables, 3, 8)
    ranks = [batches_of(tables, 3, 4, rank=rank, world_size=2) for rank in range(2)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        for part, expected in zip(parts, batch.split(2), strict=True):
            assert_same(part, expected)


def test_a_resumed_run_meets_the_batches_that_it_would_have_met(tables):
    for later, expected in zip(batches_of(tables, 3, 8, first=11), batches_of(tables, 14, 8)[11:], strict=True):
        assert_same(later, expected)


def sample(place, samples=None, **parts) -> Sample:
    audio = None if samples is None else torch.full((samples,), float(place))
    return Sample(f"s{place}", place % 2, np.random.default_rng(place), audio=audio, **parts)


def test_clips_are_filled_up_with_silence_and_keep_their_lengths():
    batch = collate()([sample(1, 3), sample(2, 5), sample(3, 1)])
    assert batch.audio.lengths.tolist() == [3, 5, 1]
    assert batch.audio.waveform.tolist() == [[1, 1, 1, 0, 0], [2, 2, 2, 2, 2], [3, 0, 0, 0, 0]]
    assert batch.modalities() == ["audio"]
    assert batch.sample_ids == ["s1", "s2", "s3"] and batch.concept_ids.tolist() == [1, 0, 1]


def test_pixels_are_normalised_for_the_tower():
    grey = torch.full((3, 4, 4), 51, dtype=torch.uint8)
    batch = collate(augmented=False)([sample(0, image=grey, text="a"), sample(1, image=grey, text="b")])
    assert batch.image.shape == (2, 3, 4, 4) and batch.image.dtype == torch.float32
    expected = [(0.2 - mean) / std for mean, std in zip(MEAN, STD, strict=True)]
    torch.testing.assert_close(batch.image[1, :, 2, 3], torch.tensor(expected))
    assert batch.text == ["a", "b"] and batch.modalities() == ["image", "text"]


def test_rows_that_were_skipped_are_reported_once_in_the_batch_and_its_first_part():
    skipped = [SkippedRow("bad", "image: torn")]
    batch = collate()([sample(0, 2, text="a"), sample(1, 2, text="b", skipped=skipped)])
    assert batch.skipped == skipped
    assert [part.skipped for part in batch.split(2)] == [skipped, []]


def test_a_batch_splits_into_equal_parts_or_says_that_it_cannot():
    batch = collate()([sample(i, i + 1, text=str(i)) for i in range(6)])
    parts = batch.split(3)
    assert [part.sample_ids for part in parts] == [["s0", "s1"], ["s2", "s3"], ["s4", "s5"]]
    assert [part.text for part in parts] == [["0", "1"], ["2", "3"], ["4", "5"]]
    assert torch.equal(torch.cat([part.audio.waveform for part in parts]), batch.audio.waveform)
    with pytest.raises(ValueError, match="6 samples does not divide into 4"):
        batch.split(4)


@pytest.mark.parametrize("modality", ["image", "audio", "text"])
def test_evaluation_reads_every_row_once_in_order_without_augmentation(tables, modality):
    rows = tables["image" if modality == "text" else modality]
    batches = list(EvaluationBatches(rows, modality, decoding(), collate(), batch_size=10))
    assert [sample for batch in batches for sample in batch.sample_ids] == rows.column("sample_id")
    assert torch.cat([batch.concept_ids for batch in batches]).tolist() == rows.column("concept_id")
    assert all(batch.modalities() == [modality] for batch in batches)
    again = list(EvaluationBatches(rows, modality, decoding(), collate(augmented=False), batch_size=10))
    for first, second in zip(batches, again, strict=True):
        if modality == "image":
            assert torch.equal(first.image, second.image)
        elif modality == "audio":
            assert torch.equal(first.audio.waveform, second.audio.waveform)
        else:
            assert first.text == second.text


def test_evaluation_leaves_broken_rows_out_and_names_them(tmp_path):
    rows = mini.image_rows()[:9]
    for number in (0, 4, 5, 6, 7):
        rows[number]["image"]["bytes"] = b"torn"
    table = read_tables(mini.write_parquet(tmp_path / "rows.parquet", rows), None)["image"]
    batches = EvaluationBatches(table, "image", decoding(), collate(), batch_size=4)
    for _ in range(2):  # counted anew each time
        found = [sample for batch in batches for sample in batch.sample_ids]
        assert found == ["pen/1", "pen/2", "pen/3", "pen/8"]
        assert [row.sample_id for row in batches.skipped] == ["pen/0", "pen/4", "pen/5", "pen/6", "pen/7"]


def test_negative_captions_come_with_each_batch_and_are_shared_out_among_its_parts():
    class Captions:
        def draw(self, shown, generator):
            return ["x", "y", "z"], torch.tensor([7, 8, 9])

    with_negatives = Collate(MEAN, STD, negative_captions=Captions())
    batch = with_negatives([sample(place, 2, text=str(place)) for place in range(4)])
    assert batch.inputs("text") == ["0", "1", "2", "3", "x", "y", "z"] and batch.text == ["0", "1", "2", "3"]
    assert batch.ids()["text"].tolist() == [0, 1, 0, 1, 7, 8, 9] and batch.ids()["audio"].tolist() == [0, 1, 0, 1]
    parts = batch.split(2)
    assert [part.inputs("text") for part in parts] == [["0", "1", "x"], ["2", "3", "y", "z"]]
    assert [part.ids()["text"].tolist() for part in parts] == [[0, 1, 7], [0, 1, 8, 9]]
