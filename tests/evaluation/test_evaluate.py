import pytest
import torch
from torch import nn

from edge_glass.data.batch import Batch
from edge_glass.evaluation.evaluate import Embedded, ViewError, embed, evaluate_view, examples
from edge_glass.evaluation.retrieval import retrieval_metrics

CONCEPTS, SEEN = 12, 9
NOISE = {"twemoji": 0.6, "awb": 0.5, "f2": 1.0, "kal": 2.0, "": 0.0}


def embedded_of(sources, seed):
    torch.manual_seed(0)
    centres = torch.randn(CONCEPTS, 16)
    torch.manual_seed(seed)
    vectors = [centres + NOISE[source] * torch.randn_like(centres) for source in sources]
    return Embedded(
        embeddings=torch.cat(vectors),
        concept_ids=torch.arange(CONCEPTS).repeat(len(sources)),
        sources=[source for source in sources for _ in range(CONCEPTS)],
        sample_ids=[f"{source}/{concept}" for source in sources for concept in range(CONCEPTS)],
        groups=torch.arange(CONCEPTS).repeat(len(sources)) // 2,
    )


@pytest.fixture
def embedded():
    return {
        "image": embedded_of(["twemoji"], 1),
        "audio": embedded_of(["awb", "f2", "kal"], 2),
        "text": embedded_of([""], 3),
    }


def rows(embedded, modality, sources=None, concepts=range(CONCEPTS)):
    part = embedded[modality]
    kept = [sources is None or source in sources for source in part.sources]
    return torch.tensor(kept) & torch.isin(part.concept_ids, torch.tensor(list(concepts)))


def view_of(embedded, sources, concepts):
    queries = {
        "image": rows(embedded, "image", concepts=concepts),
        "audio": rows(embedded, "audio", sources, concepts),
    }
    galleries = {name: rows(embedded, name) for name in embedded}
    return queries, galleries


def between(embedded, query, query_source, answer, answer_source, concepts):
    """One sub-evaluation, put together by hand."""
    a, b = embedded[query], embedded[answer]
    asks = rows(embedded, query, {query_source}, concepts)
    ranked = rows(embedded, answer, {answer_source})
    return retrieval_metrics(
        a.embeddings[asks],
        b.embeddings[ranked],
        a.concept_ids[asks],
        b.concept_ids[ranked],
        [8],
        a.groups[asks],
        b.groups[ranked],
    )


def test_each_voice_is_ranked_among_its_own_clips_and_voices_are_averaged(embedded):
    queries, galleries = view_of(embedded, {"awb", "f2"}, range(SEEN))
    found = evaluate_view("test", embedded, queries, galleries, [8, 16]).metrics
    sources = {"image": ["twemoji"], "audio": ["awb", "f2"], "text": [""]}
    for a, b in [
        ("image", "text"),
        ("text", "image"),
        ("audio", "text"),
        ("text", "audio"),
        ("image", "audio"),
    ]:
        parts = [between(embedded, a, x, b, y, range(SEEN)) for x in sources[a] for y in sources[b]]
        for name in parts[0]:
            mean = sum(part[name] for part in parts) / len(parts)
            assert found[f"test/{a}_to_{b}/{name}"] == pytest.approx(mean), (a, b, name)
    for voice in ("awb", "f2"):
        one = between(embedded, "audio", voice, "text", "", range(SEEN))
        assert found[f"test/audio_to_text/R@1/{voice}"] == pytest.approx(one["R@1"])
        assert found[f"test/audio_to_text/mAP/{voice}"] == pytest.approx(one["mAP"])
    assert not any("kal" in name or name.endswith("@16") for name in found)


def test_a_view_tells_all_six_directions_their_sizes_and_chance(embedded):
    queries, galleries = view_of(embedded, {"awb", "f2"}, range(SEEN))
    result = evaluate_view("test", embedded, queries, galleries)
    directions = {name.split("/")[1] for name in result.metrics}
    assert len(directions) == 6
    assert result.chance["test/audio_to_image/R@1/chance"] == pytest.approx(1 / CONCEPTS)
    assert result.sizes["test/image_to_text/queries"] == SEEN
    assert result.sizes["test/image_to_audio/queries"] == 2 * SEEN  # once for each voice
    assert result.sizes["test/image_to_audio/gallery"] == CONCEPTS
    assert result.sizes["test/text_to_audio/unanswerable"] == 0


def test_names_ask_for_the_concepts_of_the_queries_only(embedded):
    unseen = range(SEEN, CONCEPTS)
    queries, galleries = view_of(embedded, {"kal"}, unseen)
    result = evaluate_view("test_unseen", embedded, queries, galleries)
    assert result.sizes["test_unseen/text_to_audio/queries"] == CONCEPTS - SEEN
    expected = between(embedded, "text", "", "audio", "kal", unseen)
    assert result.metrics["test_unseen/text_to_audio/R@1"] == pytest.approx(expected["R@1"])


def test_indices_and_masks_mean_the_same(embedded):
    queries, galleries = view_of(embedded, {"awb"}, range(SEEN))
    by_index = {name: mask.nonzero().flatten().tolist() for name, mask in queries.items()}
    masks = evaluate_view("test", embedded, queries, galleries)
    assert evaluate_view("test", embedded, by_index, galleries).metrics == masks.metrics
    with pytest.raises(ValueError, match="a mask of 3 rows was given for 12"):
        evaluate_view("test", embedded, {"image": torch.ones(3, dtype=torch.bool)}, galleries)


@pytest.mark.parametrize("kept", [("image", "text"), ("audio", "text"), ("image", "audio")])
def test_two_modalities_give_two_directions(embedded, kept):
    queries, galleries = view_of(embedded, {"awb"}, range(SEEN))
    part = {name: embedded[name] for name in kept}
    found = evaluate_view("test", part, queries, galleries).metrics
    assert {name.split("/")[1] for name in found} == {f"{kept[0]}_to_{kept[1]}", f"{kept[1]}_to_{kept[0]}"}
    whole = evaluate_view("test", embedded, queries, galleries).metrics
    assert found == {name: whole[name] for name in found}


def test_queries_without_a_right_answer_are_left_out_and_counted(embedded):
    queries, galleries = view_of(embedded, {"awb"}, range(SEEN))
    galleries["text"] = rows(embedded, "text", concepts=range(2, CONCEPTS))
    result = evaluate_view("test", embedded, queries, galleries)
    assert result.sizes["test/image_to_text/queries"] == SEEN - 2
    assert result.sizes["test/image_to_text/unanswerable"] == 2


def test_a_view_that_measures_nothing_is_refused(embedded):
    queries, galleries = view_of(embedded, {"awb"}, range(SEEN))
    with pytest.raises(ViewError, match="allows no direction"):
        evaluate_view("test", {"image": embedded["image"]}, queries, galleries)
    galleries["audio"] = rows(embedded, "audio", {"kal"})
    with pytest.raises(ViewError, match="audio 'awb' is among the queries and has no gallery row"):
        evaluate_view("test", embedded, queries, galleries)


def test_examples_show_the_nearest_and_which_are_right(embedded):
    image, audio = embedded["image"], embedded["audio"]
    ranked = rows(embedded, "audio", {"awb"})
    found = examples(image, audio, rows(embedded, "image"), ranked, count=5, neighbours=3, seed=1)
    assert len(found) == len({example.query for example in found}) == 5
    for example in found:
        scores = torch.nn.functional.cosine_similarity(image.embeddings[example.query], audio.embeddings, dim=1)
        best = scores.masked_fill(~ranked, -2).argsort(descending=True)[:3].tolist()
        assert example.answers == best
        assert example.right == [audio.concept_ids[row] == image.concept_ids[example.query] for row in best]
    assert found == examples(image, audio, rows(embedded, "image"), ranked, count=5, neighbours=3, seed=1)


class Task(nn.Module):
    """Encodes pictures by a layer that behaves differently in training, and words by their length."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))

    def encode(self, batch):
        found = {}
        if batch.image is not None:
            found["image"] = self.layer(batch.image.mean((2, 3)))
        if batch.text is not None:
            found["text"] = torch.tensor([[float(len(text)), 1.0] for text in batch.text])
        return found


def test_embedding_keeps_the_rows_in_order_and_the_task_as_it_was():
    torch.manual_seed(0)
    task = Task().train()
    pictures = torch.rand(5, 3, 8, 8)
    batches = [
        Batch(["a", "b", "c"], torch.tensor([4, 5, 6]), image=pictures[:3]),
        Batch(["d", "e"], torch.tensor([7, 4]), image=pictures[3:]),
        Batch(["f"], torch.tensor([5]), text=["fox"]),
    ]
    seen = []
    found = embed(task, batches, groups={4: "x", 5: "y", 6: "x", 7: "z"}, sources={"a": "noto"}, progress=seen.append)
    assert list(found) == ["image", "text"]
    image = found["image"]
    assert image.sample_ids == ["a", "b", "c", "d", "e"]
    assert image.concept_ids.tolist() == [4, 5, 6, 7, 4]
    assert image.groups.tolist() == [0, 1, 0, 2, 0]
    assert image.sources == ["noto", "", "", "", ""]
    assert found["text"].embeddings.tolist() == [[3, 1]]
    assert found["text"].groups.tolist() == [1]
    assert seen == [3, 2, 1]
    assert task.training
    assert not image.embeddings.requires_grad
    torch.testing.assert_close(image.embeddings, task.layer[0](pictures.mean((2, 3))).detach())


def test_embeddings_of_evaluation_can_be_used_in_training():
    # A frozen text tower keeps its outputs from one evaluation to the next training step.
    task = Task()
    kept = embed(task, [Batch(["a"], torch.tensor([0]), image=torch.rand(1, 3, 8, 8))])["image"].embeddings
    weight = torch.ones(4, 1, requires_grad=True)
    (kept @ weight).sum().backward()
    assert weight.grad is not None


def test_parts_of_different_length_are_refused():
    with pytest.raises(ValueError, match="one row each"):
        Embedded(torch.zeros(2, 3), torch.arange(2), ["a"], ["x", "y"])
