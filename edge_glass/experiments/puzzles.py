"""Puzzles made by script, and a model that solves them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor

from edge_glass.config import ConfigError
from edge_glass.data.puzzles import PuzzleDataset, Puzzles, collate_puzzles, make, split
from edge_glass.experiments.experiment import Experiment
from edge_glass.experiments.parts import TrainingBatches, build, choose_device, plain
from edge_glass.models.counts import ParameterRow, parameter_table
from edge_glass.reports.figures import accuracy_by_step, puzzle_gallery
from edge_glass.reports.report import FIGURES, write_report
from edge_glass.reports.tables import terminal_table
from edge_glass.signatures import check_targets
from edge_glass.tasks.puzzle import PuzzleTask

SHOWN = 6  # puzzles in the picture
FURTHER = 4  # times as many supervision steps as in training are tried in the end
BATCH = 512  # puzzles solved at a time


class PuzzleExperiment(Experiment):
    """A solver on puzzles of one game; test puzzles are no guise of those that were trained on.

    Args:
        config: checked and resolved.

    Raises:
        UserError: puzzles that cannot be made, or arguments that a class does not take.
    """

    task: PuzzleTask

    def __init__(self, config: DictConfig):
        self.config = config
        self.device = choose_device(config.training.device)
        puzzles = config.dataset.puzzles
        check_targets(plain(config), foreign=True)
        try:
            self.game = build(puzzles.game)
            held = puzzles.val + puzzles.test
            train, held_out = split(self.game, make(self.game, puzzles.train + held, config.seed), held)
            self.train, self.val, self.test = train, held_out[: puzzles.val], held_out[puzzles.val :]
            torch.manual_seed(config.seed)
            model = build(config.decoder.model, vocabulary=self.game.vocabulary)
        except hydra.errors.InstantiationException as error:
            raise ConfigError(f"{error.__cause__ or error}") from error
        self.task = PuzzleTask(model, torch.from_numpy(self.game.places)).to(self.device)

    def prepare(self) -> None:
        """Nothing: there are no towers."""

    def training_batches(self, samples: int) -> TrainingBatches:
        dataset = PuzzleDataset(self.game, self.train, self.config.dataset.puzzles.vary, self.config.seed)
        pin_memory = self.device.type == "cuda"
        return TrainingBatches(dataset, collate_puzzles, samples, self.config, pin_memory)

    def validation(self) -> "PuzzleValidation":
        return PuzzleValidation(self.val, self.device)

    def results(self, run_dir: Path, validation: Mapping[str, float]) -> "PuzzleResults":
        steps = FURTHER * self.task.model.supervision
        answers, sure = _solved(self.task, self.test, self.device, steps)
        figures = _figures("test", answers, sure, self.test, self.task.model.supervision)
        right = (answers == torch.from_numpy(self.test.answers)).all(2).float().mean(1)
        curve = {step: float(value) for step, value in enumerate(right, 1)}
        shown = [
            (self.test.questions[i], answers[self.task.model.supervision - 1, i].numpy(), self.test.answers[i])
            for i in range(min(SHOWN, len(self.test)))
        ]
        return PuzzleResults({**figures, **validation}, curve, self.task.model.supervision, self.game, shown)

    def data_hash(self) -> str:
        digest = hashlib.sha256()
        for part in (self.train, self.val, self.test):
            digest.update(part.questions.tobytes() + part.answers.tobytes())
        return digest.hexdigest()[:16]

    def row_count(self) -> int:
        return len(self.train) + len(self.val) + len(self.test)

    def parameters(self) -> list[ParameterRow]:
        model = self.task.model
        parts = {"net": model.recursion, "words": model.words, "head": model.head, "halt": model.halt}
        return parameter_table({**parts, "places": self.task.where}, self.task)


class PuzzleValidation:
    """Puzzles that watch the training.

    Args:
        puzzles: of the game.
        device: of the task.
    """

    skipped: Mapping[str, str] = {}  # every puzzle can be read

    def __init__(self, puzzles: Puzzles, device: torch.device):
        self.puzzles, self.device = puzzles, device

    def __call__(self, task: Any) -> dict[str, float]:
        answers, sure = _solved(task, self.puzzles, self.device, task.model.supervision)
        return _figures("val", answers, sure, self.puzzles, task.model.supervision)


@dataclass
class PuzzleResults:
    """How many test puzzles were solved.

    Attributes:
        metrics: of the test and the last validation.
        curve: supervision step -> share of the test puzzles whose answer is right after it.
        trained: supervision steps in training.
        game: the rules.
        shown: question, answer, solution of a few.
        skipped: none.
    """

    metrics: dict[str, float]
    curve: dict[int, float]
    trained: int
    game: Any
    shown: list[tuple]
    skipped: dict[str, str] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The part of summary.json that this is."""
        return {"metrics": self.metrics, "exact_match_by_step": self.curve}

    def show(self, run_dir: Path, summary: Mapping[str, Any]) -> None:
        """Draw the figures, write report.md and print the table."""
        accuracy_by_step(self.curve, self.trained, run_dir / FIGURES / "accuracy_by_step.png")
        puzzle_gallery(self.shown, self.game.side, run_dir / FIGURES / "puzzles.png")
        report = write_report(run_dir)
        print(f"\n{terminal_table(summary)}\nreport: {report}", flush=True)


def _solved(task: PuzzleTask, puzzles: Puzzles, device: torch.device, steps: int) -> tuple[Tensor, Tensor]:
    """Answers `[steps, puzzles, cells]` and the halting head's logits `[steps, puzzles]`, on the CPU."""
    parts = [
        task.solve(torch.from_numpy(puzzles.questions[start : start + BATCH]).to(device), steps)
        for start in range(0, len(puzzles), BATCH)
    ]
    return torch.cat([a.cpu() for a, _ in parts], dim=1), torch.cat([s.cpu() for _, s in parts], dim=1)


def _figures(view: str, answers: Tensor, sure: Tensor, puzzles: Puzzles, steps: int) -> dict[str, float]:
    """Shares of puzzles and cells that are right after the last step of training, and where the head would halt."""
    right = answers == torch.from_numpy(puzzles.answers)  # [steps, puzzles, cells]
    solved = right.all(2)
    halts = (sure[:steps] > 0).float()
    halts[-1] = 1.0
    first = halts.argmax(0)  # the first step at which the head is sure
    return {
        f"{view}/exact_match": float(solved[steps - 1].float().mean()),
        f"{view}/cell_accuracy": float(right[steps - 1].float().mean()),
        f"{view}/exact_match_when_halting": float(solved.gather(0, first[None]).float().mean()),
        f"{view}/steps_when_halting": float(first.float().mean() + 1),
    }
