import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from edge_glass.evaluation.retrieval import nearest, retrieval_metrics


def reference(query, gallery, query_ids, gallery_ids, width):
    """The metrics by the book: one query at a time, a full sort, plain Python."""
    ranks, precisions = [], []
    for vector, concept in zip(query[:, :width], query_ids, strict=True):
        scores = [float(vector @ item / (np.linalg.norm(vector) * np.linalg.norm(item))) for item in gallery[:, :width]]
        order = sorted(range(len(gallery)), key=lambda i: -scores[i])
        places = [place for place, i in enumerate(order, start=1) if gallery_ids[i] == concept]
        ranks.append(places[0])
        precisions.append(sum(n / place for n, place in enumerate(places, start=1)) / len(places))
    recall = {f"R@{k}": np.mean([rank <= k for rank in ranks]) for k in (1, 5, 10)}
    return {**recall, "median_rank": np.median(ranks), "mAP": np.mean(precisions)}


def problem(queries=40, concepts=30, most=3, dim=24, seed=0):
    """Noisy embeddings whose concepts have one to `most` gallery items, in random order."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((concepts, dim))
    gallery_ids = random.permutation(np.repeat(np.arange(concepts), random.integers(1, most + 1, concepts)))
    query_ids = random.integers(0, concepts, queries)
    gallery = centres[gallery_ids] + 1.2 * random.standard_normal((len(gallery_ids), dim))
    query = centres[query_ids] + 1.2 * random.standard_normal((queries, dim))
    parts = (query, gallery)
    return [
        *(torch.tensor(part, dtype=torch.float32) for part in parts),
        *map(torch.tensor, (query_ids, gallery_ids)),
    ]


def test_metrics_equal_a_plain_reference_at_every_width():
    query, gallery, query_ids, gallery_ids = problem()
    found = retrieval_metrics(query, gallery, query_ids, gallery_ids, widths=[6, 12, 24])
    for width, suffix in ((24, ""), (12, "@12"), (6, "@6")):
        for name, value in reference(*(part.numpy() for part in problem()), width).items():
            assert found[name + suffix] == pytest.approx(value, abs=1e-6), name + suffix
    assert len(found) == 15
    assert 0.1 < found["R@1@6"] < found["R@1"] < 0.95  # neither trivial nor hopeless


def test_average_precision_is_that_of_scikit_learn():
    query, gallery, query_ids, gallery_ids = problem(seed=1, most=8)
    scores = torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(gallery).T
    expected = np.mean(
        [average_precision_score(gallery_ids == concept, row) for concept, row in zip(query_ids, scores, strict=True)]
    )
    found = retrieval_metrics(query, gallery, query_ids, gallery_ids)
    assert found["mAP"] == pytest.approx(expected, abs=1e-6)


def test_a_query_with_several_right_answers_counts_when_any_is_found():
    query = torch.tensor([[1.0, 0.0]])
    gallery = torch.tensor([[1.0, 0.1], [-1.0, 0.0], [1.0, 1.0]])
    found = retrieval_metrics(query, gallery, torch.tensor([7]), torch.tensor([7, 7, 8]))
    assert found["R@1"] == 1
    assert found["median_rank"] == 1
    assert found["mAP"] == pytest.approx((1 / 1 + 2 / 3) / 2)


def test_the_order_of_queries_and_gallery_does_not_matter():
    query, gallery, query_ids, gallery_ids = problem(seed=2)
    one, other = torch.randperm(len(query)), torch.randperm(len(gallery))
    before = retrieval_metrics(query, gallery, query_ids, gallery_ids, [8], query_ids // 3, gallery_ids // 3)
    after = retrieval_metrics(
        query[one],
        gallery[other],
        query_ids[one],
        gallery_ids[other],
        [8],
        query_ids[one] // 3,
        gallery_ids[other] // 3,
    )
    assert before == pytest.approx(after)


def test_the_chunk_and_the_length_of_embeddings_do_not_matter():
    query, gallery, query_ids, gallery_ids = problem(seed=3)
    whole = retrieval_metrics(query, gallery, query_ids, gallery_ids, [8])
    chunked = retrieval_metrics(query * 50, gallery / 50, query_ids, gallery_ids, [8], chunk=7)
    assert whole == pytest.approx(chunked)


def test_a_width_reads_the_leading_dimensions_only():
    query, gallery, query_ids, gallery_ids = problem(seed=4)
    narrow = retrieval_metrics(query[:, :8], gallery[:, :8], query_ids, gallery_ids)
    noise = torch.randn(len(query), 16)
    wide = retrieval_metrics(torch.cat([query[:, :8], noise], 1), gallery, query_ids, gallery_ids, [8])
    assert {name: wide[f"{name}@8"] for name in narrow} == pytest.approx(narrow)


def test_equal_embeddings_for_everything_score_nothing():
    found = retrieval_metrics(torch.ones(5, 4), torch.ones(20, 4), torch.arange(5), torch.arange(20))
    assert found["R@1"] == found["R@10"] == 0
    assert found["median_rank"] == 20


def test_group_recall_takes_any_near_duplicate_for_right():
    query = torch.eye(3)
    gallery = torch.eye(3)[[1, 0, 2]]  # the first two are exchanged
    ids, groups = torch.arange(3), torch.tensor([0, 0, 1])
    found = retrieval_metrics(query, gallery, ids, ids, [2], groups, groups)
    assert found["R@1"] == pytest.approx(1 / 3)
    assert found["group_R@1"] == 1
    assert "group_R@1@2" in found


def test_what_cannot_be_ranked_is_refused_by_name():
    query, gallery, query_ids, gallery_ids = problem()
    with pytest.raises(ValueError, match=r"no right answer in the gallery \(concept ids \[99\]"):
        retrieval_metrics(query, gallery, torch.full_like(query_ids, 99), gallery_ids)
    with pytest.raises(ValueError, match=r"widths \[48\] are not in 1..24"):
        retrieval_metrics(query, gallery, query_ids, gallery_ids, [12, 48])
    with pytest.raises(ValueError, match=r"gallery: 1 of .* not finite"):
        broken = gallery.clone()
        broken[2, 0] = torch.nan
        retrieval_metrics(query, broken, query_ids, gallery_ids)
    with pytest.raises(ValueError, match=r"\[queries, dim\]"):
        retrieval_metrics(query[:, :3], gallery, query_ids, gallery_ids)
    with pytest.raises(ValueError, match="query: 0 embeddings"):
        retrieval_metrics(query[:0], gallery, query_ids[:0], gallery_ids)


def test_the_nearest_come_best_first_and_no_more_than_there_are():
    rows, scores = nearest(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 1.0]]), k=5)
    assert rows.tolist() == [[1, 2, 0]]
    assert scores[0].tolist() == pytest.approx([1, 0.5**0.5, 0], abs=1e-6)
