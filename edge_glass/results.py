"""The last word on a run: figures on the test views, baselines beside them, tables and pictures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from edge_glass.data.decode import Undecodable
from edge_glass.data.rows import Rows
from edge_glass.data.samples import MediaReader
from edge_glass.evaluation.answers import Answer
from edge_glass.evaluation.baselines import nearest_neighbour, pixel_features, speech_features
from edge_glass.evaluation.evaluate import Embedded, ViewResult, examples
from edge_glass.evaluation.text import plain
from edge_glass.evaluation.views import Views
from edge_glass.reports.figures import Card, Found, Said, answer_gallery, retrieval_gallery
from edge_glass.reports.report import FIGURES, write_report
from edge_glass.reports.tables import terminal_table
from edge_glass.tasks.alignment import AlignmentTask

if TYPE_CHECKING:
    from edge_glass.experiments.multimodal import MultimodalExperiment

WORDS = {"image": "drawing", "audio": "speech", "text": "name"}
BASELINES = {"image": "nearest_pixels", "audio": "nearest_log_mel"}
SPOKEN = 8  # answers of each set of media in the picture
GALLERY_DIRECTIONS = (
    ("image", "text"),
    ("audio", "text"),
    ("image", "audio"),
    ("audio", "image"),
)


@dataclass
class RunResults:
    """What `evaluate_run` found.

    Attributes:
        views: retrieval figures of the test views.
        metrics: those, the figures of the answers, and the validation figures of the end of training.
        baselines: chance and nearest neighbours.
        skipped: rows that could not be decoded, sample id -> reason.
        gallery: heading -> queries with their answers, for the picture.
        spoken: heading -> media with what a decoder said of them, for the picture.
    """

    views: ViewResult
    metrics: dict[str, float]
    baselines: dict[str, float]
    skipped: dict[str, str]
    gallery: dict[str, list[Found]] = field(default_factory=dict)
    spoken: dict[str, list[Said]] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The part of summary.json that this is."""
        return {"metrics": self.metrics, "baselines": self.baselines, "sizes": self.views.sizes}

    def show(self, run_dir: Path, summary: Mapping[str, Any]) -> None:
        """Draw the figures, write report.md and print the table."""
        if self.gallery:
            retrieval_gallery(self.gallery, run_dir / FIGURES / "retrieval_gallery.png")
        if self.spoken:
            answer_gallery(self.spoken, run_dir / FIGURES / "answers.png")
        report = write_report(run_dir)
        print(f"\n{terminal_table(summary)}\nreport: {report}", flush=True)


def evaluate_run(experiment: "MultimodalExperiment", run_dir: Path, validation: Mapping[str, float]) -> RunResults:
    """Evaluate a trained experiment on every view of its data set but the validation one.

    Args:
        experiment: with the weights to judge.
        run_dir: the run's folder.
        validation: the last validation figures.
    """
    dataset = experiment.config.dataset
    names = [name for name in dataset.views if name != dataset.validation_view] or list(dataset.views)
    views = experiment.views(names)
    result, baselines, gallery = ViewResult(), {}, {}
    if experiment.is_aligned:
        embedded = views.embed(experiment.task, experiment.device)
        result = views.measure(embedded)
        baselines = {**result.chance, **_nearest(experiment, views, names[0], embedded)}
        gallery = _gallery(views, names[0], embedded)
    interview = experiment.interview(views)
    answers = {} if interview is None else interview.answers(experiment.task, experiment.device)
    said = {} if interview is None else interview.figures(answers)
    return RunResults(
        views=result,
        metrics={**result.metrics, **said, **validation},
        baselines=baselines,
        skipped={sample: row.reason for sample, row in views.skipped.items()},
        gallery=gallery,
        spoken=_spoken(views, names[0], answers),
    )


def validation_figures(views: Views, task: AlignmentTask, device: torch.device) -> dict[str, float]:
    """The figures of a validation view, and `{view}/mean/R@1`: that at full width, the mean over its directions."""
    figures = views.evaluate(task, device).metrics
    (view,) = views.views
    recalls = [value for name, value in figures.items() if name.endswith("/R@1")]
    return figures | {f"{view}/mean/R@1": sum(recalls) / len(recalls)}


def _nearest(
    experiment: "MultimodalExperiment", views: Views, view: str, embedded: Mapping[str, Embedded]
) -> dict[str, float]:
    """What the nearest training drawing or clip, untrained, would have answered in the first test view."""
    queries, _ = views.rows_of(view, embedded)
    found = {}
    for modality, rows in experiment.training_rows().items():
        if modality not in queries:
            continue
        asked = embedded[modality].take(queries[modality].nonzero().flatten())
        test_rows = experiment.tables[modality].where({"sample_id": asked.sample_ids})
        train, train_ids, _ = _raw_features(rows, modality, experiment)
        test, test_ids, samples = _raw_features(test_rows, modality, experiment)
        known = torch.isin(test_ids, train_ids)
        if not known.any():
            continue
        sources = [views.sources.get(sample, "") for sample, keep in zip(samples, known.tolist(), strict=True) if keep]
        figures = nearest_neighbour(train, train_ids, test[known], test_ids[known], sources)
        for name, value in figures.items():
            metric, *source = name.split("/", 1)
            if source != [""]:
                found["/".join([view, f"{modality}_to_text", metric, BASELINES[modality], *source])] = value
    return found


def _raw_features(rows: Rows, modality: str, experiment: "MultimodalExperiment") -> tuple[Tensor, Tensor, list[str]]:
    """Features of the readable rows before any training, their concept ids, their sample ids."""
    reader = MediaReader(rows, modality, experiment.decoding)
    concepts = rows.column("concept_id")
    media, ids, samples = [], [], []
    for row in range(len(rows)):
        try:
            media.append(reader.decoded(row))
        except Undecodable:
            continue  # counted where the row was trained or embedded
        ids.append(concepts[row])
        samples.append(reader.sample_ids[row])
    features = pixel_features(torch.stack(media)) if modality == "image" else speech_features(media)
    return features, torch.tensor(ids), samples


def _gallery(views: Views, view: str, embedded: Mapping[str, Embedded]) -> dict[str, list[Found]]:
    """A few queries in each direction with their nearest answers, as pictures, sounds and words."""
    queries, galleries = views.rows_of(view, embedded)
    shown = {}
    for query, answer in GALLERY_DIRECTIONS:
        if query not in embedded or answer not in galleries:
            continue
        asking = queries.get(query)
        if asking is None:  # text: the names of concepts that the answering modality asks about
            concepts = embedded[answer].concept_ids[queries[answer]]
            asking = torch.isin(embedded[query].concept_ids, concepts)
        ranked = galleries[answer]
        if answer == "audio":  # one voice, as in the figures
            first = views.sources.get(embedded[answer].sample_ids[int(ranked.nonzero()[0])], "")
            ranked = ranked & torch.tensor([source == first for source in embedded[answer].sources])
        found = examples(embedded[query], embedded[answer], asking, ranked, count=3)
        shown[f"{WORDS[query]} → {WORDS[answer]}"] = [
            Found(
                _card(views, embedded, query, example.query),
                [_card(views, embedded, answer, row) for row in example.answers],
                example.right,
            )
            for example in found
        ]
    return shown


def _spoken(views: Views, view: str, answers: Mapping[tuple[str, str], list[Answer]]) -> dict[str, list[Said]]:
    """A few answers about each set of media, drawn at random (not picked for looks)."""
    shown = {}
    for (of, media), found in answers.items():
        if of != view:
            continue
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:SPOKEN].tolist()
        shown[" and ".join(WORDS[name] for name in media.split("_"))] = [
            Said(
                [_card_of(views, modality, place) for modality, place in answer.places.items()],
                answer.said,
                answer.references[0],
                plain(answer.said) in map(plain, answer.references),
            )
            for answer in (found[row] for row in order)
        ]
    return shown


def _card(views: Views, embedded: Mapping[str, Embedded], modality: str, row: int) -> Card:
    sample = embedded[modality].sample_ids[row]
    return _card_of(views, modality, views.batches[modality].places[sample])


def _card_of(views: Views, modality: str, place: int) -> Card:
    batches = views.batches[modality]
    name = batches.captions[place]
    if batches.reader is None:
        return Card(name)
    media: np.ndarray = batches.reader.decoded(place).numpy()
    return Card(name, picture=media) if modality == "image" else Card(name, waveform=media)
