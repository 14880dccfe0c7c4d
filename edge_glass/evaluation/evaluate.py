"""Embed a data set once, then measure retrieval on any number of views of it."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from edge_glass.data.batch import Batch
from edge_glass.errors import UserError
from edge_glass.evaluation.baselines import chance
from edge_glass.evaluation.names import DIRECTIONS, METRICS, MODALITIES, MetricName
from edge_glass.evaluation.retrieval import nearest, retrieval_metrics

Rows = Tensor | Sequence[int] | Sequence[bool]


class ViewError(UserError):
    """A view that cannot be measured as it was asked for."""


class Encodes(Protocol):
    """What `embed` needs of a task or a model."""

    training: bool

    def encode(self, batch: Batch) -> dict[str, Tensor]: ...
    def train(self, mode: bool = True) -> object: ...


@dataclass
class Embedded:
    """The embeddings of one modality's rows and what each row is.

    Attributes:
        embeddings: `[rows, dim]` float32 on the CPU, not normalised.
        concept_ids: `[rows]` int64; equal ids are right answers of each other.
        sources: the voice or vendor of each row, `""` where there is none.
        sample_ids: the rows' names.
        groups: `[rows]` int64 near-duplicate groups, or None.
    """

    embeddings: Tensor
    concept_ids: Tensor
    sources: list[str]
    sample_ids: list[str]
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        lengths = {name: len(part) for name, part in vars(self).items() if part is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the parts of Embedded must have one row each for every sample; got {lengths}")

    def __len__(self) -> int:
        return len(self.sample_ids)

    def take(self, rows: Tensor) -> "Embedded":
        """The given rows (int64 indices), in that order."""
        index = rows.tolist()
        return Embedded(
            self.embeddings[rows],
            self.concept_ids[rows],
            [self.sources[row] for row in index],
            [self.sample_ids[row] for row in index],
            None if self.groups is None else self.groups[rows],
        )


@dataclass
class ViewResult:
    """The figures of one view.

    Attributes:
        metrics: `{view}/{query}_to_{answer}/{metric}[@width]`, the mean over voices, and at full width
            `{view}/{query}_to_{answer}/{metric}/{voice}` for each of them.
        chance: `{view}/{query}_to_{answer}/R@k/chance`.
        sizes: `{view}/{query}_to_{answer}/queries` (asked in all, over the voices), `.../gallery` (items
            ranked for each, the mean over voices) and `.../unanswerable` (queries left out, as no gallery
            item shares their concept).
    """

    metrics: dict[str, float] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass
class Example:
    """One query and what was found for it.

    Attributes:
        query: row of the query in its `Embedded`.
        answers: rows of the nearest gallery items in theirs, best first.
        right: whether each of them shares the query's concept.
    """

    query: int
    answers: list[int]
    right: list[bool]


def embed(
    task: Encodes,
    batches: Iterable[Batch],
    device: torch.device | str = "cpu",
    groups: Mapping[int, Hashable] | None = None,
    sources: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Embedded]:
    """Embeddings of every row of a loader, per modality, computed in evaluation mode without gradient.

    Args:
        task: has `encode(batch) -> {modality: [batch, dim]}`; its training mode is restored afterwards.
        batches: any mix of modalities; a modality's rows come in the order they were met.
        device: where the task's weights are.
        groups: near-duplicate group of each concept id.
        sources: voice or vendor of each sample id.
        progress: called with the number of samples after each batch.

    Returns:
        Modality -> Embedded, for the modalities met that the task encodes.
    """
    vectors: dict[str, list[Tensor]] = {}
    ids: dict[str, list[Tensor]] = {}
    samples: dict[str, list[str]] = {}
    was_training = task.training
    task.train(False)
    try:
        # Not inference_mode: a tower that keeps its outputs would keep tensors that training cannot use.
        with torch.no_grad():
            for batch in batches:
                for modality, embeddings in task.encode(batch.to(device)).items():
                    vectors.setdefault(modality, []).append(embeddings.float().cpu())
                    ids.setdefault(modality, []).append(batch.concept_ids.cpu())
                    samples.setdefault(modality, []).extend(batch.sample_ids)
                if progress is not None:
                    progress(len(batch))
    finally:
        task.train(was_training)
    numbers = {group: number for number, group in enumerate(dict.fromkeys((groups or {}).values()))}
    result = {}
    for modality in (name for name in MODALITIES if name in vectors):
        concepts = torch.cat(ids[modality])
        result[modality] = Embedded(
            embeddings=torch.cat(vectors[modality]),
            concept_ids=concepts,
            sources=[(sources or {}).get(sample, "") for sample in samples[modality]],
            sample_ids=samples[modality],
            groups=None if groups is None else torch.tensor([numbers[groups[c]] for c in concepts.tolist()]),
        )
    return result


def evaluate_view(
    view: str,
    embedded: Mapping[str, Embedded],
    queries: Mapping[str, Rows],
    galleries: Mapping[str, Rows],
    widths: Sequence[int] = (),
    chunk: int = 1024,
) -> ViewResult:
    """Retrieval in every direction that a view's queries and galleries allow.

    Drawings of one vendor and clips of one voice are ranked among their own source only: a direction is
    evaluated once for each source of its queries and of its gallery, and the figures are averaged over them,
    each voice with the same weight. The names that ask are those of the concepts among the queries of the
    modality that is searched (unless `queries` itself gives rows of `text`).

    Args:
        view: name, the first part of every metric's name.
        embedded: modality -> embeddings; modalities that are missing here are left out.
        queries: modality -> rows that ask, as indices or as a mask over that modality's rows.
        galleries: modality -> rows that are ranked.
        widths: leading dimensions to evaluate beside the full width.
        chunk: queries ranked at a time.

    Returns:
        Metrics, chance and sizes; see `ViewResult`.

    Raises:
        ViewError: a source asks but has no gallery, or the view allows no direction at all.
    """
    asking = {name: _rows(queries[name], embedded[name]) for name in MODALITIES if name in queries and name in embedded}
    ranked = {name: _rows(rows, embedded[name]) for name, rows in galleries.items() if name in embedded}
    result = ViewResult()
    for query, answer in DIRECTIONS:
        names_ask = query == "text" in embedded and answer in asking
        if answer in ranked and (query in asking or names_ask):
            _evaluate_direction(result, view, query, answer, embedded, asking, ranked, widths, chunk)
    if not result.metrics:
        raise ViewError(
            f"view {view!r} allows no direction: queries of {list(queries)}, galleries of {list(galleries)}, "
            f"embeddings of {list(embedded)}; a direction needs queries of one modality and a gallery of "
            "another that share concepts"
        )
    return result


def _evaluate_direction(
    result: ViewResult,
    view: str,
    query: str,
    answer: str,
    embedded: Mapping[str, Embedded],
    asking: Mapping[str, Tensor],
    ranked: Mapping[str, Tensor],
    widths: Sequence[int],
    chunk: int,
) -> None:
    """Adds one direction's figures to `result`, averaged over its sources."""
    asked, answers = embedded[query], embedded[answer]
    by_source: dict[str, list[dict[str, float]]] = {}  # voice (or vendor) -> figures of each sub-evaluation
    by_chance: list[dict[str, float]] = []
    queries, unanswerable, items = 0, 0, []
    sources = _by_source(answers, asking.get(answer, ranked[answer]), answer)
    for answer_source, own in sources.items():
        gallery_rows = _by_source(answers, ranked[answer], answer).get(answer_source)
        if gallery_rows is None:
            raise ViewError(f"view {view!r}: {answer} {answer_source!r} is among the queries and has no gallery row")
        gallery = answers.take(gallery_rows)
        if query in asking:
            asking_parts = _by_source(asked, asking[query], query)
        else:  # the names of the concepts that this source's own queries have
            asking_parts = {"": torch.isin(asked.concept_ids, answers.concept_ids[own]).nonzero().flatten()}
        for query_source, rows in asking_parts.items():
            answerable = rows[torch.isin(asked.concept_ids[rows], gallery.concept_ids)]
            queries += len(answerable)
            unanswerable += len(rows) - len(answerable)
            items.append(len(gallery))
            if len(answerable) == 0:
                continue
            part = asked.take(answerable)
            metrics = retrieval_metrics(
                part.embeddings,
                gallery.embeddings,
                part.concept_ids,
                gallery.concept_ids,
                widths,
                part.groups,
                gallery.groups,
                chunk,
            )
            source = answer_source if answer == "audio" else query_source or answer_source
            by_source.setdefault(source, []).append(metrics)
            by_chance.append(chance(part.concept_ids, gallery.concept_ids))
    if not by_source:
        return
    prefix = f"{view}/{query}_to_{answer}"
    means = {source: _mean(parts) for source, parts in by_source.items()}
    result.metrics |= {f"{prefix}/{name}": value for name, value in _mean(list(means.values())).items()}
    for source, metrics in means.items():
        for metric in METRICS:
            if source and metric in metrics:
                result.metrics[str(MetricName(view, query, answer, metric, of=source))] = metrics[metric]
    result.chance |= {f"{prefix}/{name}/chance": value for name, value in _mean(by_chance).items()}
    result.sizes |= {f"{prefix}/queries": queries, f"{prefix}/gallery": round(sum(items) / len(items))}
    result.sizes |= {f"{prefix}/unanswerable": unanswerable}


def examples(
    query: Embedded,
    gallery: Embedded,
    query_rows: Rows,
    gallery_rows: Rows,
    count: int = 4,
    neighbours: int = 5,
    seed: int = 0,
) -> list[Example]:
    """Queries drawn at random (not picked for looks) with their nearest gallery items, for the figure.

    Args:
        query: rows of the asking modality.
        gallery: rows of the answering modality.
        query_rows: rows that may ask, as indices or as a mask.
        gallery_rows: rows that are ranked.
        count: queries to draw.
        neighbours: answers to each.
        seed: of the draw.
    """
    asking, ranked = _rows(query_rows, query), _rows(gallery_rows, gallery)
    order = torch.randperm(len(asking), generator=torch.Generator().manual_seed(seed))
    chosen = asking[order[:count]]
    places, _ = nearest(query.embeddings[chosen], gallery.embeddings[ranked], neighbours)
    found = []
    for row, place in zip(chosen.tolist(), places, strict=True):
        answers = ranked[place]
        right = gallery.concept_ids[answers] == query.concept_ids[row]
        found.append(Example(row, answers.tolist(), right.tolist()))
    return found


def _rows(rows: Rows, of: Embedded) -> Tensor:
    """Indices from indices or from a mask."""
    given = torch.as_tensor(rows)
    if given.dtype != torch.bool:
        return given.long()
    if len(given) != len(of):
        raise ValueError(f"a mask of {len(given)} rows was given for {len(of)} embeddings")
    return given.nonzero().flatten()


def _by_source(of: Embedded, rows: Tensor, modality: str) -> dict[str, Tensor]:
    """Vendor or voice -> its rows; names have no source and stay together."""
    if modality == "text":
        return {"": rows}
    found: dict[str, list[int]] = {}
    for row in rows.tolist():
        found.setdefault(of.sources[row], []).append(row)
    return {source: torch.tensor(found[source]) for source in sorted(found)}


def _mean(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
