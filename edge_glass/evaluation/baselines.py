"""What a reader compares the model with: chance, and nearest neighbours on raw pixels and raw spectra."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from edge_glass.data.batch import AudioClips
from edge_glass.encoders.audio import HOP_SAMPLES, SAMPLING_RATE, LogMel
from edge_glass.evaluation.names import RECALL_AT
from edge_glass.evaluation.retrieval import retrieval_metrics
from edge_glass.models.pooling import segment_shares

WINDOW, HOP = 400, 160  # 25 ms and 10 ms


def chance(query_ids: Tensor, gallery_ids: Tensor) -> dict[str, float]:
    """The recall that a random ranking of the gallery is expected to give.

    A query with P right answers among G items misses all of them in its first k with probability
    C(G-P, k) / C(G, k).

    Args:
        query_ids: `[queries]` int concept ids.
        gallery_ids: `[items]` int concept ids.

    Returns:
        `R@1`, `R@5`, `R@10`.
    """
    items = len(gallery_ids)
    right = (query_ids[:, None] == gallery_ids).sum(1)  # [queries]
    found = {}
    for k in RECALL_AT:
        k_of_all = min(k, items)
        misses = [
            math.comb(items - answers, k_of_all) / math.comb(items, k_of_all) * queries
            for answers, queries in Counter(right.tolist()).items()
        ]
        found[f"R@{k}"] = 1 - sum(misses) / len(query_ids)
    return found


def pixel_features(pictures: Tensor, size: int = 32) -> Tensor:
    """Pictures as flat vectors of their own colours.

    Args:
        pictures: `[pictures, 3, height, width]` uint8.
        size: side that the pictures are brought to.

    Returns:
        `[pictures, 3 * size * size]` float32 in 0..1.
    """
    small = F.interpolate(pictures.float() / 255, size=(size, size), mode="bilinear", antialias=True)
    return small.flatten(1)


def speech_features(
    waveforms: Sequence[Tensor], segments: int = 10, bands: int = 40, seconds: float = 3.0, batch: int = 256
) -> Tensor:
    """Clips as the mean log-mel spectra of equal stretches of time, loudness removed.

    Args:
        waveforms: `[samples]` float clips at 16 kHz, of any length.
        segments: stretches a clip is cut into.
        bands: mel bands.
        seconds: what comes after is cut.
        batch: clips at a time.

    Returns:
        `[clips, bands * segments]`.
    """
    mel = LogMel(bands, int(seconds * SAMPLING_RATE) // HOP_SAMPLES)
    features = []
    for start in range(0, len(waveforms), batch):
        part = [waveform.float() for waveform in waveforms[start : start + batch]]
        lengths = torch.tensor([len(waveform) for waveform in part])
        spectra = mel(AudioClips(pad_sequence(part, batch_first=True), lengths))  # [clips, bands, frames]
        heard = torch.arange(mel.frames) < (lengths / HOP_SAMPLES).ceil().clamp(1, mel.frames)[:, None]
        means = segment_shares(heard, segments) @ spectra.transpose(1, 2)  # [clips, segments, bands]
        features.append((means - means.mean(dim=(1, 2), keepdim=True)).flatten(1))
    return torch.cat(features)


def nearest_neighbour(
    train: Tensor, train_ids: Tensor, test: Tensor, test_ids: Tensor, sources: Sequence[str] | None = None
) -> dict[str, float]:
    """How often the nearest training item, untrained, shows the test item's concept.

    Items are compared by cosine after the training mean is taken away.

    Args:
        train: `[items, dim]` features, see `pixel_features` and `speech_features`.
        train_ids: `[items]` int concept ids.
        test: `[queries, dim]` features.
        test_ids: `[queries]` int concept ids, each of them in `train_ids`.
        sources: the voice or vendor of each query; the result is then the mean over sources.

    Returns:
        `R@1`, and `R@1/{source}` for each source.
    """
    mean = train.mean(0)
    names = ["all"] * len(test) if sources is None else list(sources)
    found = {}
    for source in sorted(set(names)):
        rows = torch.tensor([name == source for name in names])
        metrics = retrieval_metrics(test[rows] - mean, train - mean, test_ids[rows], train_ids)
        found[source] = metrics["R@1"]
    result = {"R@1": sum(found.values()) / len(found)}
    return result if sources is None else result | {f"R@1/{source}": value for source, value in found.items()}
