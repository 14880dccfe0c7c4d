"""What a run needs to know of whatever it trains and judges."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import DictConfig

from edge_glass.experiments.parts import TrainingBatches
from edge_glass.models.counts import ParameterRow
from edge_glass.tasks.task import Task


class Validation(Protocol):
    """The figures by which a run is watched while it trains.

    Attributes:
        skipped: rows that could not be decoded, sample id -> reason.
    """

    @property
    def skipped(self) -> Mapping[str, str]: ...

    def __call__(self, task: Any) -> dict[str, float]:
        """Figure -> value, of a task on its device."""


class Results(Protocol):
    """The last word on a run.

    Attributes:
        skipped: rows that could not be decoded, sample id -> reason.
    """

    @property
    def skipped(self) -> Mapping[str, str]: ...

    def summary(self) -> dict[str, Any]:
        """The part of summary.json that this is; `metrics`, figure -> value, is part of it."""

    def show(self, run_dir: Path, summary: Mapping[str, Any]) -> None:
        """Draw the figures, write report.md and print the table."""


class Experiment(ABC):
    """Data, a task on its device, and how the task is judged.

    Attributes:
        config: checked and resolved.
        task: what is trained.
        device: where it is.
    """

    config: DictConfig
    task: Task
    device: torch.device

    @abstractmethod
    def prepare(self) -> None:
        """Compute what is computed once, before the first batch; every rank calls it."""

    @abstractmethod
    def training_batches(self, samples: int) -> TrainingBatches:
        """The training batches of this rank, of `samples` samples each."""

    @abstractmethod
    def validation(self) -> Validation | None:
        """What watches the run, if anything does."""

    @abstractmethod
    def results(self, run_dir: Path, validation: Mapping[str, float]) -> Results:
        """Judge the task on everything but what watched it.

        Args:
            run_dir: the run's folder.
            validation: the last validation figures.
        """

    @abstractmethod
    def data_hash(self) -> str:
        """What the data are known by."""

    @abstractmethod
    def row_count(self) -> int:
        """Rows of data, for training and evaluation."""

    @abstractmethod
    def parameters(self) -> list[ParameterRow]:
        """Parameter counts of each part, and of the whole."""
