"""The views of a data set: which rows ask, which are ranked, and the figures of a task on them."""

from collections.abc import Collection, Hashable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from edge_glass.data.batch import MODALITIES, SkippedRow
from edge_glass.data.loader import Collate, EvaluationBatches
from edge_glass.data.rows import DataError, Rows
from edge_glass.data.samples import Decoding
from edge_glass.evaluation.evaluate import Embedded, Encodes, ViewResult, embed, evaluate_view

Conditions = Mapping[str, Any]  # column -> value or values
View = Mapping[str, Mapping[str, Conditions]]  # "queries" / "gallery" -> modality -> conditions


class Views:
    """Evaluates tasks on named views of a data set's tables; what was decoded is kept for the next time.

    Each distinct caption of a concept is one row of the text gallery. A view's text gallery holds the captions of the
    images and clips in its other galleries, or of the rows that its own conditions on `text` choose.

    Args:
        tables: `image` and/or `audio` -> rows with unified concept ids.
        views: name -> `queries` and `gallery`, each modality -> conditions on its columns.
        decoding: what the towers need.
        collate: normalisation.
        widths: nested widths, the full one included or not.
        modalities: those that the tasks to evaluate have towers for.
        batch_size: rows embedded at a time.

    Raises:
        DataError: a condition that no row meets.
    """

    def __init__(
        self,
        tables: Mapping[str, Rows],
        views: Mapping[str, View],
        decoding: Decoding,
        collate: Collate,
        widths: list[int],
        modalities: Collection[str] = MODALITIES,
        batch_size: int = 256,
    ):
        self.views = views
        self.widths = sorted(widths)[:-1]
        self.tables = {**tables, "text": _captions(tables)}
        self.groups = _groups(tables)
        self.sources = {
            sample: str(source)
            for rows in tables.values()
            if "source" in rows.columns
            for sample, source in zip(rows.column("sample_id"), rows.column("source"), strict=True)
        }
        self.batches = {
            name: EvaluationBatches(rows, name, decoding, collate, batch_size)
            for name, rows in ((name, self._needed(name)) for name in self.tables)
            if rows is not None and name in modalities
        }
        self.skipped: dict[str, SkippedRow] = {}

    def embed(self, task: Encodes, device: torch.device | str) -> dict[str, Embedded]:
        """Embeddings of every row that any view needs, of the modalities that the task encodes."""
        found: dict[str, Embedded] = {}
        for batches in self.batches.values():
            found |= embed(task, batches, device, self.groups, self.sources)
            self.skipped |= {row.sample_id: row for row in batches.skipped}
        return found

    def evaluate(self, task: Encodes, device: torch.device | str) -> ViewResult:
        """The figures of all views together."""
        return self.measure(self.embed(task, device))

    def measure(self, embedded: Mapping[str, Embedded]) -> ViewResult:
        """The figures of all views, from embeddings."""
        result = ViewResult()
        for name in self.views:
            queries, galleries = self.rows_of(name, embedded)
            part = evaluate_view(name, embedded, queries, galleries, self.widths)
            result.metrics |= part.metrics
            result.chance |= part.chance
            result.sizes |= part.sizes
        return result

    def rows_of(self, view: str, embedded: Mapping[str, Embedded]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The embedded rows that ask and those that are ranked, by modality."""
        parts = self.views[view]
        queries = {
            name: self._mask(name, conditions, embedded[name])
            for name, conditions in parts["queries"].items()
            if name in embedded and name != "text"
        }
        galleries = {
            name: self._mask(name, conditions, embedded[name])
            for name, conditions in parts["gallery"].items()
            if name in embedded and name != "text"
        }
        if "text" in embedded:
            galleries["text"] = self._text_gallery(parts["gallery"], embedded)
        return queries, galleries

    def _text_gallery(self, gallery: Mapping[str, Conditions], embedded: Mapping[str, Embedded]) -> Tensor:
        if "text" in gallery:
            concepts = [ids for rows in self.tables.values() for ids in _concepts_where(rows, gallery["text"])]
        else:
            concepts = [
                concept
                for name, conditions in gallery.items()
                for concept in self.tables[name].where(dict(conditions)).column("concept_id")
            ]
        return torch.isin(embedded["text"].concept_ids, torch.tensor(sorted(set(concepts))))

    def _mask(self, modality: str, conditions: Conditions, embedded: Embedded) -> Tensor:
        wanted = set(self.tables[modality].where(dict(conditions)).column("sample_id"))
        return torch.tensor([sample in wanted for sample in embedded.sample_ids])

    def _needed(self, modality: str) -> Rows | None:
        """The rows that any view asks with or ranks."""
        if modality == "text":
            return self.tables["text"]
        wanted: set[str] = set()
        for view in self.views.values():
            for role in ("queries", "gallery"):
                if modality in view[role]:
                    wanted |= set(self.tables[modality].where(dict(view[role][modality])).column("sample_id"))
        return self.tables[modality].where({"sample_id": wanted}) if wanted else None


def _captions(tables: Mapping[str, Rows]) -> Rows:
    """One row for each distinct caption of each concept."""
    pairs = dict.fromkeys(
        pair for rows in tables.values() for pair in zip(rows.column("concept_id"), rows.column("text"), strict=True)
    )
    table = pa.table(
        {
            "sample_id": [f"text/{number}" for number in range(len(pairs))],
            "concept_id": pa.array([concept for concept, _ in pairs], pa.int64()),
            "text": [text for _, text in pairs],
        }
    )
    return Rows(table, Path())


def _groups(tables: Mapping[str, Rows]) -> dict[int, Hashable] | None:
    """Concept id -> near-duplicate group, where every table says so."""
    if not all("group" in rows.columns for rows in tables.values()):
        return None
    return {
        concept: group
        for rows in tables.values()
        for concept, group in zip(rows.column("concept_id"), rows.column("group"), strict=True)
    }


def _concepts_where(rows: Rows, conditions: Conditions) -> list[int]:
    """Concept ids of the rows that meet the conditions; none where the table has no such column or value."""
    if not all(name in rows.columns for name in conditions):
        return []
    try:
        return rows.where(dict(conditions)).column("concept_id")
    except DataError:
        return []
