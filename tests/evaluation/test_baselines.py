import pytest
import torch

from edge_glass.evaluation.baselines import (
    chance,
    nearest_neighbour,
    pixel_features,
    speech_features,
)
from edge_glass.evaluation.retrieval import retrieval_metrics


def test_chance_is_what_random_rankings_give_on_average():
    torch.manual_seed(0)
    gallery_ids, query_ids = torch.tensor([0, 0, 0, 1, 1, *range(2, 25)]), torch.tensor([0, 1, 2, 3])
    runs = [
        retrieval_metrics(torch.randn(4, 8), torch.randn(len(gallery_ids), 8), query_ids, gallery_ids)
        for _ in range(500)
    ]
    for name, expected in chance(query_ids, gallery_ids).items():
        assert sum(run[name] for run in runs) / len(runs) == pytest.approx(expected, abs=0.03)


def test_chance_with_one_right_answer_is_k_in_the_gallery_and_never_above_one():
    found = chance(torch.arange(6), torch.arange(8))
    assert found == pytest.approx({"R@1": 1 / 8, "R@5": 5 / 8, "R@10": 1})


def test_the_nearest_training_drawing_names_the_test_drawing():
    torch.manual_seed(0)
    drawn = torch.randint(0, 256, (12, 3, 8, 8)).repeat_interleave(8, 2).repeat_interleave(8, 3)
    noisy = (drawn + torch.randint(-40, 40, drawn.shape)).clamp(0, 255).to(torch.uint8)
    train, test = pixel_features(drawn.to(torch.uint8)), pixel_features(noisy)
    assert train.shape == (12, 3 * 32 * 32)
    assert nearest_neighbour(train, torch.arange(12), test, torch.arange(12)) == {"R@1": 1}
    wrong = nearest_neighbour(train, torch.arange(12), test.roll(1, 0), torch.arange(12))
    assert wrong == {"R@1": 0}


def test_voices_weigh_the_same_however_many_clips_they_have():
    train, ids = torch.eye(4), torch.arange(4)
    test = torch.eye(4)[[0, 1, 2, 0]]  # the last is wrong
    found = nearest_neighbour(train, ids, test, torch.arange(4), ["a", "a", "a", "b"])
    assert found == {"R@1": 0.5, "R@1/a": 1, "R@1/b": 0}


def test_speech_features_do_not_hear_loudness_and_hear_order():
    time = torch.arange(8_000) / 16_000
    low, high = torch.sin(2 * torch.pi * 300 * time), torch.sin(2 * torch.pi * 2500 * time)
    rising, falling = torch.cat([low, high]), torch.cat([high, low])
    a, louder, b = speech_features([0.1 * rising, 0.5 * rising, 0.1 * falling])
    assert torch.nn.functional.cosine_similarity(a, louder, dim=0) > 0.98
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) < 0.7
