"""Puzzles that stay until they are solved, and thoughts that are carried from step to step."""

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from edge_glass.data.puzzles import PuzzleBatch, PuzzleDataset, Sudoku, collate_puzzles, make
from edge_glass.decoders.trm import TinyRecursiveModel
from edge_glass.tasks.puzzle import PuzzleTask

GAME = Sudoku(4)
PUZZLES = make(GAME, 24)


def make_task(**options) -> PuzzleTask:
    torch.manual_seed(0)
    settings = {"width": 16, "heads": 2, "latent_steps": 2, "cycles": 1, "supervision": 3, "exploration": 0.0}
    model = TinyRecursiveModel(GAME.vocabulary, **{**settings, **options})
    return PuzzleTask(model, torch.from_numpy(GAME.places))


def batch(start: int, count: int = 4) -> PuzzleBatch:
    dataset = PuzzleDataset(GAME, PUZZLES, vary=False)
    return collate_puzzles([dataset[0, place] for place in range(start, start + count)])


def test_a_puzzle_stays_until_its_last_step_and_then_the_next_takes_its_place():
    task = make_task()
    first, second, third = batch(0), batch(4), batch(8)
    task(first)
    task(second)
    assert torch.equal(task.carry.questions, first.questions) and task.carry.steps.tolist() == [2] * 4
    task(second)
    assert task.carry.halted.all()  # three steps were the most
    task(third)
    assert torch.equal(task.carry.questions, third.questions) and task.carry.steps.tolist() == [1] * 4


def test_a_puzzle_that_the_head_calls_solved_leaves_alone():
    task = make_task()
    task(batch(0))
    task.carry.halted = torch.tensor([False, True, False, False])
    task(batch(4))
    expected = [batch(0).questions[0], batch(4).questions[1], batch(0).questions[2], batch(0).questions[3]]
    assert torch.equal(task.carry.questions, torch.stack(expected))
    assert torch.equal(task.carry.answers[1], batch(4).answers[1]) and task.carry.steps.tolist() == [2, 1, 2, 2]


def test_a_step_takes_up_the_thought_of_the_one_before_without_its_history():
    task, puzzles = make_task(), batch(0)
    task(puzzles)
    loss, _ = task(puzzles)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in task.named_parameters() if parameter.grad is not None}
    task.zero_grad()
    question, sight = task.question(puzzles.questions), task.sight(puzzles.questions)
    with torch.no_grad():
        before = task.model.recursion(question, task.model.recursion.begin(question), sight)
    thought = task.model.recursion(question, before, sight)
    logits = task.model.logits(thought.answer)
    done = task.model.done(thought, torch.ones_like(puzzles.answers))
    right = (logits.argmax(-1) == puzzles.answers).all(1).float()
    expected = cross_entropy(logits.flatten(0, 1), puzzles.answers.flatten())
    expected = expected + 0.5 * binary_cross_entropy_with_logits(done, right)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in task.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)


def test_a_run_that_goes_on_thinks_about_the_same_puzzles():
    whole, parts = make_task(), make_task()
    optimizers = [torch.optim.SGD(task.parameters(), lr=0.1) for task in (whole, parts)]

    def step(task, optimizer, start):
        loss, _ = task(batch(start))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss)

    expected = [step(whole, optimizers[0], 4 * i) for i in range(5)]
    found = [step(parts, optimizers[1], 4 * i) for i in range(2)]
    resumed = make_task()
    resumed.load_state_dict(parts.state_dict())
    resumed.restore_state_of_rank(parts.state_of_rank())
    optimizer = torch.optim.SGD(resumed.parameters(), lr=0.1)
    found += [step(resumed, optimizer, 4 * i) for i in range(2, 5)]
    assert found == expected
    assert make_task().state_of_rank() == {}


def test_solving_gives_the_answer_after_each_step_and_leaves_training_alone():
    task, puzzles = make_task(), batch(0)
    task(puzzles)
    carry = task.carry
    answers, sure = task.solve(puzzles.questions, steps=5)
    assert task.carry is carry and task.training
    assert answers.shape == (5, 4, 16) and sure.shape == (5, 4)
    fewer, _ = task.solve(puzzles.questions)
    assert torch.equal(fewer, answers[:3])
    one_by_one = torch.cat([task.solve(puzzles.questions[i : i + 1], 5)[0] for i in range(4)], dim=1)
    assert torch.equal(one_by_one, answers)


def test_a_step_that_came_to_nothing_leaves_no_thought_behind():
    task = make_task()
    task(batch(0))
    task.carry.thought.answer[:] = torch.nan
    task.forget_step()
    loss, _ = task(batch(4))
    assert loss.isfinite() and torch.equal(task.carry.questions, batch(4).questions)


def test_every_cell_matters_to_every_other():
    task = make_task().eval()
    puzzles = batch(0)
    changed = puzzles.questions.clone()
    changed[:, -1] = changed[:, -1] % 4 + 1
    logits = []
    for cells in (puzzles.questions, changed):
        question = task.question(cells)
        thought = task.model.recursion(question, task.model.recursion.begin(question), task.sight(cells))
        logits.append(task.model.logits(thought.answer))
    assert (logits[0] - logits[1]).abs().amax(2).min() > 1e-4
    with pytest.raises(ValueError, match="causal=true"):
        make_task(causal=True)


@pytest.mark.parametrize("options", [{"exploration": 0.5}, {"recursive": False, "supervision": 1}])
def test_a_few_puzzles_can_be_learned_by_heart(options):
    task, puzzles = make_task(width=32, **options), batch(0, 8)
    optimizer = torch.optim.Adam(task.parameters(), lr=0.002)
    for _ in range(200):
        loss, figures = task(puzzles)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    answers, _ = task.solve(puzzles.questions)
    assert (
        np.mean([GAME.solves(q.numpy(), a.numpy()) for q, a in zip(puzzles.questions, answers[-1], strict=True)]) > 0.8
    )
    assert figures["solved"] > 0.8


def test_a_batch_splits_and_knows_its_names():
    _, second = batch(0).split(2)
    assert second.sample_ids == ["puzzle-2", "puzzle-3"] and torch.equal(second.questions, batch(2, 2).questions)
    with pytest.raises(ValueError, match="does not divide into 3"):
        batch(0).split(3)
