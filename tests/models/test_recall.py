"""Embeddings as mixtures of known captions."""

import pytest
import torch
from torch.nn.functional import normalize

from edge_glass.models.recall import CaptionRecall

MEMORY = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))


def test_a_large_scale_recalls_the_nearest_caption():
    queries = MEMORY[[3, 7]] * 5 + 0.1
    torch.testing.assert_close(CaptionRecall(MEMORY, 1e4)(queries), normalize(MEMORY[[3, 7]], dim=1))


def test_a_small_scale_recalls_the_mean_of_all():
    recalled = CaptionRecall(MEMORY, 1e-6)(torch.randn(2, 8))
    torch.testing.assert_close(recalled, normalize(MEMORY, dim=1).mean(0).expand(2, 8), atol=1e-5, rtol=0)


def test_the_length_of_an_embedding_and_the_order_of_the_memory_do_not_matter():
    queries = torch.randn(4, 8)
    recalled = CaptionRecall(MEMORY, 20.0)(queries)
    torch.testing.assert_close(CaptionRecall(3 * MEMORY.flip(0), 20.0)(0.2 * queries), recalled)


def test_two_mixtures_of_orthogonal_captions_agree_as_often_as_they_mean_the_same():
    a, b = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 1.0]])
    recall = CaptionRecall(torch.eye(3), 10.0)
    mean_a, mean_b = (torch.softmax(10 * normalize(x, dim=1), dim=1) for x in (a, b))
    torch.testing.assert_close((recall(a) * recall(b)).sum(), (mean_a * mean_b).sum())


def test_a_scale_must_be_positive():
    with pytest.raises(ValueError, match="must be positive"):
        CaptionRecall(MEMORY, 0.0)
