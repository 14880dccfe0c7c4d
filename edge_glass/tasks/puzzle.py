"""Puzzles: a Tiny Recursive Model that refines its answer step by step, trained on each step."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from edge_glass.data.puzzles import PuzzleBatch
from edge_glass.decoders.recursion import Sight, Thought
from edge_glass.decoders.trm import HALTING_WEIGHT, TinyRecursiveModel
from edge_glass.tasks.task import Losses, Task


@dataclass
class Carry:
    """The puzzles that are being thought about, and how far.

    Attributes:
        questions: `[batch, cells]` int64.
        answers: likewise.
        thought: of each, without history.
        steps: `[batch]` int64, supervision steps done.
        halted: `[batch]` bool, done with: a fresh puzzle takes the place.
    """

    questions: Tensor
    answers: Tensor
    thought: Thought
    steps: Tensor
    halted: Tensor


class PuzzleTask(Task):
    """Each training step is one supervision step for every puzzle at hand (section 3 of the paper, and its code).

    A puzzle stays, its thought being carried over, until the halting head thinks that it is solved or it has had all
    its supervision steps; then the next puzzle of the batch takes its place, and the others of that batch are left
    out. The loss is the mean over puzzles of the cross-entropy of their cells and, with half its weight, of the halting
    head's.

    Args:
        model: not causal.
        places: `[kinds, cells]` int64: where each cell is (row, column, box); each kind of place has learned vectors,
            which are added to the cell's value.

    Raises:
        ValueError: a causal model, whose first cell would see no other.
    """

    places: Tensor

    def __init__(self, model: TinyRecursiveModel, places: Tensor):
        super().__init__()
        if model.recursion.causal:
            raise ValueError("causal=true: a cell would see only those before it; a puzzle's cells all see each other")
        self.model = model
        self.register_buffer("places", places, persistent=False)
        width = model.recursion.width
        self.where = nn.ModuleList(nn.Embedding(int(kind.max()) + 1, width) for kind in places)
        for table in self.where:
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=0.5)  # all kinds together weigh about as much as the value
        self.carry: Carry | None = None

    def forward(self, batch: PuzzleBatch, terms: float | None = None) -> Losses:
        """The loss of a supervision step and figures for the log; in training it moves the carry on.

        Args:
            batch: puzzles for the places that are free.
            terms: see `Task`.
        """
        carry = self._filled(batch)
        thought = self.model.recursion(self.question(carry.questions), carry.thought, self.sight(carry.questions))
        logits = self.model.logits(thought.answer)
        nll = cross_entropy(logits.flatten(0, 1), carry.answers.flatten(), reduction="none").view_as(carry.answers)
        solved = (logits.argmax(-1) == carry.answers).all(1)
        done = self.model.done(thought, torch.ones_like(carry.answers))
        halting = binary_cross_entropy_with_logits(done, solved.float(), reduction="none")
        count = len(batch) if terms is None else terms
        steps = carry.steps + 1
        halted = self.model.halted(done.detach(), steps)
        if self.training:
            self.carry = Carry(carry.questions, carry.answers, thought.detach(), steps, halted)
        figures = {
            "loss/cells": nll.mean(1).sum().detach() / count,
            "loss/halting": halting.sum().detach() / count,
            "solved": solved.float().mean(),
            "halted": halted.float().mean(),
            "thinking/steps": steps.float().mean(),
        }
        return (nll.mean(1) + HALTING_WEIGHT * halting).sum() / count, figures

    def question(self, cells: Tensor) -> Tensor:
        """What the model is asked, `[batch, cells, width]`."""
        where = [table(kind) for table, kind in zip(self.where, self.places, strict=True)]
        return self.model.words(cells) + torch.stack(where).sum(0)

    def sight(self, cells: Tensor) -> Sight:
        """Every cell sees every other."""
        sight = self.model.recursion.sight(torch.ones_like(cells[:1], dtype=torch.bool))
        return Sight(sight.cosines, sight.sines)

    @torch.no_grad()
    def solve(self, cells: Tensor, steps: int | None = None) -> tuple[Tensor, Tensor]:
        """The answers after each supervision step, in evaluation mode.

        Args:
            cells: questions, `[batch, cells]`.
            steps: supervision steps; None: as many as in training.

        Returns:
            Answers `[steps, batch, cells]`, and how sure the halting head is of each, logits `[steps, batch]`.
        """
        was_training = self.training
        self.eval()
        try:
            question, sight = self.question(cells), self.sight(cells)
            thought = self.model.recursion.begin(question)
            answers, sure = [], []
            for _ in range(steps or self.model.supervision):
                thought = self.model.recursion(question, thought, sight)
                answers.append(self.model.logits(thought.answer).argmax(-1))
                sure.append(self.model.done(thought, torch.ones_like(cells)))
        finally:
            self.train(was_training)
        return torch.stack(answers), torch.stack(sure)

    def forget_step(self) -> None:
        """Begin with fresh puzzles: a thought that is no number would never be one again."""
        self.carry = None

    def state_of_rank(self) -> dict[str, Any]:
        """The carry: with it, a run that goes on thinks about the puzzles that it was thinking about."""
        carry = self.carry
        if carry is None:
            return {}
        parts = {name: part for name, part in vars(carry).items() if isinstance(part, Tensor)} | vars(carry.thought)
        return {name: part.cpu().clone() for name, part in parts.items()}

    def restore_state_of_rank(self, state: dict[str, Any]) -> None:
        """Take up the carry that `state_of_rank` gave."""
        if state:
            moved = {name: part.to(self.places.device) for name, part in state.items()}
            thought = Thought(moved.pop("answer"), moved.pop("latent"))
            self.carry = Carry(**moved, thought=thought)

    def _filled(self, batch: PuzzleBatch) -> Carry:
        """The carry with fresh puzzles in the places of those that are done with."""
        fresh = self.model.recursion.begin(self.question(batch.questions).detach())
        zeros = torch.zeros(len(batch), dtype=torch.int64, device=batch.questions.device)
        carry = self.carry
        if not self.training or carry is None or len(carry.steps) != len(batch):
            return Carry(batch.questions, batch.answers, fresh, zeros, zeros.bool())
        halted = carry.halted

        def renewed(old: Tensor, new: Tensor) -> Tensor:
            return torch.where(halted.view(-1, *[1] * (old.ndim - 1)), new, old)

        thought = Thought(renewed(carry.thought.answer, fresh.answer), renewed(carry.thought.latent, fresh.latent))
        questions, answers = renewed(carry.questions, batch.questions), renewed(carry.answers, batch.answers)
        return Carry(questions, answers, thought, renewed(carry.steps, zeros), halted)
