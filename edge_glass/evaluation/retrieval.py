"""How well the nearest neighbours of one modality's embeddings name the right items of another."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_glass.evaluation.names import RECALL_AT


def retrieval_metrics(
    query: Tensor,
    gallery: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    widths: Sequence[int] = (),
    query_groups: Tensor | None = None,
    gallery_groups: Tensor | None = None,
    chunk: int = 1024,
) -> dict[str, float]:
    """Recall, median rank and mean average precision of ranking a gallery by cosine similarity.

    Every gallery item that shares the query's concept id is a right answer. `R@k` is the share of queries
    with at least one right answer among their k nearest; `median_rank` is the median, over queries, of the
    rank of the best right answer; `mAP` is the mean over queries of the average precision over all right
    answers, AP = (1/P) sum_p precision at the rank of right answer p (Manning et al. 2008, section 8.4).
    `group_R@1` counts a query as right when its nearest neighbour is any member of its near-duplicate group.

    Ties go against the query: a wrong item that scores the same as a right one ranks before it, so that a
    model that gives every input the same embedding scores 0, not 1.

    Args:
        query: `[queries, dim]` embeddings, of any length; each width is normalised here.
        gallery: `[items, dim]` embeddings.
        query_ids: `[queries]` int concept ids.
        gallery_ids: `[items]` int concept ids.
        widths: leading dimensions to evaluate beside the full width.
        query_groups: `[queries]` int near-duplicate groups.
        gallery_groups: `[items]` int near-duplicate groups.
        chunk: queries ranked at a time; memory grows with chunk x items.

    Returns:
        `R@1`, `R@5`, `R@10`, `median_rank`, `mAP` (and `group_R@1` when groups are given) at full width, and
        `R@1@128` and so on for each narrower width.

    Raises:
        ValueError: shapes do not fit, a width is not in 1..dim, an embedding is not finite, or a query has no
            right answer in the gallery.
    """
    dim = query.shape[-1]
    _check(query, gallery, query_ids, gallery_ids, widths)
    with_groups = query_groups is not None and gallery_groups is not None
    metrics: dict[str, float] = {}
    for width in [dim, *sorted({*widths} - {dim}, reverse=True)]:
        queries = F.normalize(query[:, :width].float(), dim=1)
        items = F.normalize(gallery[:, :width].float(), dim=1)
        ranks, precisions, group_hits = [], [], []
        for rows in torch.arange(len(queries), device=query.device).split(chunk):
            scores = queries[rows] @ items.T  # [chunk, items]
            rank, precision = _rank(scores, query_ids[rows, None] == gallery_ids)
            ranks.append(rank)
            precisions.append(precision)
            if query_groups is not None and gallery_groups is not None:
                group_rank, _ = _rank(scores, query_groups[rows, None] == gallery_groups, at_most=1)
                group_hits.append(group_rank == 1)
        best = torch.cat(ranks).double()
        found = {f"R@{k}": (best <= k).double().mean() for k in RECALL_AT}
        found |= {"median_rank": best.quantile(0.5), "mAP": torch.cat(precisions).mean()}
        if with_groups:
            found["group_R@1"] = torch.cat(group_hits).double().mean()
        suffix = "" if width == dim else f"@{width}"
        metrics |= {f"{name}{suffix}": float(value) for name, value in found.items()}
    return metrics


def nearest(query: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest gallery rows of each query and their cosine similarities.

    Args:
        query: `[queries, dim]`.
        gallery: `[items, dim]`.
        k: how many; all of a smaller gallery.

    Returns:
        rows `[queries, k]`, best first, and similarities `[queries, k]`.
    """
    scores = F.normalize(query.float(), dim=1) @ F.normalize(gallery.float(), dim=1).T
    best = scores.topk(min(k, len(gallery)), dim=1)
    return best.indices, best.values


def _rank(scores: Tensor, right: Tensor, at_most: int | None = None) -> tuple[Tensor, Tensor]:
    """Rank of the best right answer and average precision over the right answers of each query.

    The k-th best right answer has rank k + (wrong answers that score at least as high): no sort of the
    gallery.

    Args:
        scores: `[queries, items]`.
        right: `[queries, items]` bool, at least one True a row.
        at_most: right answers to look at, best first; None is all.

    Returns:
        `[queries]` int ranks from 1, `[queries]` average precisions.
    """
    count = int(right.sum(1).max())
    count = count if at_most is None else min(count, at_most)
    answers = scores.masked_fill(~right, -torch.inf).topk(count, dim=1).values  # [queries, count], best first
    wrong = scores.masked_fill(right, -torch.inf)
    place = torch.arange(1, count + 1, device=scores.device)
    ahead = torch.stack([(wrong >= answers[:, k, None]).sum(1) for k in range(count)], dim=1)
    ranks = ahead + place  # [queries, count]
    real = answers > -torch.inf  # a query with fewer right answers than the most has -inf there
    precision = (place / ranks).double().masked_fill(~real, 0).sum(1) / real.sum(1)
    return ranks[:, 0], precision


def _check(query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor, widths: Sequence[int]) -> None:
    if query.ndim != 2 or gallery.ndim != 2 or query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"query and gallery must be [queries, dim] and [items, dim]; got {list(query.shape)} and "
            f"{list(gallery.shape)}"
        )
    for name, embeddings, ids in (("query", query, query_ids), ("gallery", gallery, gallery_ids)):
        if len(embeddings) == 0 or len(ids) != len(embeddings):
            raise ValueError(
                f"{name}: {len(embeddings)} embeddings with {len(ids)} concept ids; one id for each of at "
                "least one embedding is needed"
            )
        bad = (~embeddings.isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{name}: {len(bad)} of {len(ids)} embeddings are not finite (first rows {bad[:5]}); "
                "did training diverge?"
            )
    outside = [width for width in widths if not 1 <= width <= query.shape[1]]
    if outside:
        raise ValueError(f"widths {outside} are not in 1..{query.shape[1]}, the embedding's width")
    lost = query_ids[~torch.isin(query_ids, gallery_ids)]
    if len(lost):
        raise ValueError(
            f"{len(lost)} of {len(query_ids)} queries have no right answer in the gallery (concept ids "
            f"{lost.unique().tolist()[:5]} ...); leave them out or widen the gallery"
        )
