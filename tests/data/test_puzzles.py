import pickle
import time
from itertools import combinations

import numpy as np
import pytest
import torch

from edge_glass.data.puzzles import FREE, GOAL, PATH, START, WALL, Maze, PuzzleDataset, Puzzles, Sudoku, make, split
from edge_glass.data.rows import DataError

GAMES = [
    pytest.param(Sudoku(4), id="sudoku 4"),
    pytest.param(Sudoku(6), id="sudoku 6"),
    pytest.param(Sudoku(6, clues=14), id="sudoku 6, 14 clues"),
    pytest.param(Sudoku(9, clues=40), id="sudoku 9"),
    pytest.param(Maze(7), id="maze 7"),
    pytest.param(Maze(9, moves=12, loops=0.3), id="maze 9 with loops"),
]
games = pytest.mark.parametrize("game", GAMES)


def guises(game, puzzles: Puzzles, seed=1) -> Puzzles:
    """Each puzzle after a random symmetry."""
    generator = np.random.default_rng(seed)
    pairs = zip(puzzles.questions, puzzles.answers, strict=True)
    questions, answers = zip(*(game.vary(question, answer, generator) for question, answer in pairs), strict=True)
    return Puzzles(np.stack(questions), np.stack(answers))


def fillings(question: np.ndarray, side: int) -> list[np.ndarray]:
    """All answers to a Sudoku, by plain trial in cell order."""
    rules = Sudoku(side)
    box = np.array([unit[2] for unit in rules.units_of])
    row, column = np.divmod(np.arange(side**2), side)
    seen = [(row == row[c]) | (column == column[c]) | (box == box[c]) for c in range(side**2)]
    found, grid = [], question.copy()

    def fill(cell: int) -> None:
        if cell == side**2:
            found.append(grid.copy())
        elif question[cell]:
            fill(cell + 1)
        else:
            for digit in range(1, side + 1):
                if digit not in grid[seen[cell]]:
                    grid[cell] = digit
                    fill(cell + 1)
            grid[cell] = 0

    fill(0)
    return found


def drawing(text: str) -> np.ndarray:
    signs = {"#": WALL, ".": FREE, "S": START, "G": GOAL, "*": PATH}
    return np.array([signs[sign] for sign in "".join(text.split())])


@games
def test_the_known_answer_solves_and_the_question_itself_does_not(game):
    puzzles = make(game, 10)
    for question, answer in zip(puzzles.questions, puzzles.answers, strict=True):
        assert game.solves(question, answer)
        assert not game.solves(question, question)


@games
def test_cells_are_numbers_of_the_vocabulary(game):
    puzzles = make(game, 10)
    for cells in (puzzles.questions, puzzles.answers):
        assert cells.shape == (10, game.side**2)
        assert cells.dtype == np.int64
        assert cells.min() >= 0
        assert cells.max() < game.vocabulary


@games
def test_a_seed_gives_the_same_puzzles_and_the_first_of_many_are_those_of_few(game):
    many, few, other = make(game, 20, seed=3), make(game, 5, seed=3), make(game, 5, seed=4)
    assert np.array_equal(many.questions[:5], few.questions)
    assert np.array_equal(many.answers[:5], few.answers)
    assert not np.array_equal(few.questions, other.questions)


@pytest.mark.parametrize(("side", "clues"), [(4, None), (4, 7), (6, None), (6, 13)])
def test_a_sudoku_has_exactly_one_solution(side, clues):
    puzzles = make(Sudoku(side, clues), 6)
    for question, answer in zip(puzzles.questions, puzzles.answers, strict=True):
        found = fillings(question, side)
        assert len(found) == 1
        assert np.array_equal(found[0], answer)


def test_a_minimal_sudoku_needs_every_clue():
    for question in make(Sudoku(6), 4).questions:
        for cell in np.flatnonzero(question):
            without = question.copy()
            without[cell] = 0
            assert len(fillings(without, 6)) > 1


def test_a_sudoku_has_as_many_clues_as_asked_for():
    for clues in (11, 20):
        assert ((make(Sudoku(6, clues), 8).questions > 0).sum(axis=1) == clues).all()


def test_two_thousand_sudokus_of_side_six_take_seconds():
    start = time.process_time()
    make(Sudoku(6), 200)
    assert time.process_time() - start < 15 / 10


@games
def test_a_guise_is_solved_by_the_guise_of_the_answer(game):
    puzzles = make(game, 10)
    varied = guises(game, puzzles)
    assert not np.array_equal(varied.questions, puzzles.questions)
    for question, answer in zip(varied.questions, varied.answers, strict=True):
        assert game.solves(question, answer)


@games
def test_guises_share_a_fingerprint_and_different_puzzles_do_not(game):
    puzzles = make(game, 25)
    names = game.fingerprints(puzzles)
    for seed in range(5):
        assert np.array_equal(game.fingerprints(guises(game, puzzles, seed)), names)
    assert len(set(names.tolist())) == 25


@pytest.mark.parametrize(("side", "transposed"), [(4, True), (6, False), (9, True)])
def test_rows_become_columns_only_where_boxes_are_square(side, transposed):
    grid = np.ones((side, side), dtype=np.int64)
    grid[0] = 2  # one row stands out
    generator = np.random.default_rng(0)
    varied = [Sudoku(side).vary(grid.ravel(), grid.ravel(), generator)[0].reshape(side, side) for _ in range(30)]
    stays_a_row = [len(set(cells[:, 0].tolist())) == 2 for cells in varied]
    assert any(stays_a_row)
    assert all(stays_a_row) is not transposed


def test_fingerprints_tell_apart_the_36_minimal_sudokus_of_side_four():
    game = Sudoku(4)
    questions, answers = zip(*(game.draw(np.random.default_rng(seed)) for seed in range(1000)), strict=True)
    puzzles = Puzzles(np.stack(questions), np.stack(answers))
    clues = (puzzles.questions > 0).sum(axis=1)
    classes = {count: len(set(game.fingerprints(puzzles[clues == count]).tolist())) for count in (4, 5, 6)}
    assert classes == {4: 13, 5: 22, 6: 1}  # http://sudopedia.enjoysudoku.com/Shi_Doku.html


def test_a_maze_has_one_shortest_path_and_it_is_long_enough():
    game = Maze(9, moves=14, loops=0.2)
    puzzles = make(game, 20)
    for question, answer in zip(puzzles.questions, puzzles.answers, strict=True):
        path = np.flatnonzero(answer == PATH)
        assert len(path) + 1 >= 14
        for cell in path:  # blocked anywhere, the way gets longer or is gone
            blocked, detour = question.copy(), answer.copy()
            blocked[cell] = detour[cell] = WALL
            distance = game._walk(blocked, int(np.flatnonzero(blocked == START)[0]))[0]
            assert not 0 <= distance[np.flatnonzero(blocked == GOAL)[0]] <= len(path) + 1


def test_a_perfect_maze_joins_all_rooms_and_has_no_loop():
    for question in make(Maze(11), 5).questions:
        free = (question != WALL).reshape(11, 11)
        assert free[::2, ::2].all()
        assert not free[1::2, 1::2].any()
        assert free.sum() == 36 + 35  # rooms, and the doors of a tree


def test_loops_open_more_doors():
    assert (make(Maze(9, loops=0.5, moves=4), 5).questions != WALL).sum(axis=1).min() > 25 + 24


def test_a_maze_is_solved_by_a_shortest_path_only():
    question = drawing("S...# .###. ..... .###. ....G")
    game = Maze(5, moves=4)
    assert game.solves(question, drawing("S...# *###. *.... *###. ****G"))
    assert game.solves(question, drawing("S...# *###. ***** .###* ....G"))  # there are two of the same length
    for wrong in (
        "S***# *###. *.... *###. ****G",  # more than the path
        "S...# *###. *.... *###. *.**G",  # a gap
        "S...# *###. *.... *#*#. ****G",  # through a wall
        "S...# *###. *.... *###. .***G",  # a corner cut
        "*...# *###. *.... *###. ****G",  # the start is gone
    ):
        assert not game.solves(question, drawing(wrong))


def test_a_sudoku_answer_that_breaks_a_rule_or_a_clue_does_not_solve():
    game = Sudoku(4, clues=8)
    question, answer = game.draw(np.random.default_rng(0))
    swapped = np.array([0, 2, 1, 3, 4])[answer]  # by the rules, but against the clues
    assert not game.solves(question, swapped)
    assert game.solves(np.zeros_like(question), swapped)
    twice = answer.copy()
    twice[0] = answer[1]
    assert not game.solves(np.zeros_like(question), twice)


@games
def test_no_test_puzzle_is_trained_on_in_any_guise(game):
    puzzles = make(game, 24)
    varied = [guises(game, puzzles, seed) for seed in (5, 6)]
    mixed = Puzzles(
        np.concatenate([puzzles.questions, *(part.questions for part in varied)]),
        np.concatenate([puzzles.answers, *(part.answers for part in varied)]),
    )
    train, test = split(game, mixed, test=10)
    assert np.array_equal(test.questions, puzzles.questions[:10])
    assert not set(game.fingerprints(train).tolist()) & set(game.fingerprints(test).tolist())
    assert len(train) == 3 * 14  # and nothing else is lost


def test_the_cells_of_a_sample_follow_from_seed_epoch_and_place():
    game = Sudoku(6)
    puzzles = make(game, 6)
    dataset, again = (PuzzleDataset(game, puzzles, seed=2) for _ in range(2))
    other = PuzzleDataset(game, puzzles, seed=3)
    for place in range(len(dataset)):
        assert torch.equal(dataset[1, place].question, again[1, place].question)
    views = [dataset[0, 0].question, dataset[1, 0].question, dataset[0, 1].question, other[0, 0].question]
    assert not any(torch.equal(one, two) for one, two in combinations(views, 2))


def test_without_variation_samples_are_the_puzzles_and_changing_one_changes_no_puzzle():
    puzzles = make(Maze(7), 4)
    dataset = PuzzleDataset(Maze(7), puzzles, vary=False)
    sample = dataset[0, 2]
    assert sample.question.dtype == torch.int64
    assert sample.question.tolist() == puzzles.questions[2].tolist()
    assert sample.answer.tolist() == puzzles.answers[2].tolist()
    sample.question.zero_()
    assert puzzles.questions[2].any()


def test_a_data_set_reaches_worker_processes():
    dataset = PuzzleDataset(Sudoku(4), make(Sudoku(4), 4))
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[0, 1].answer, dataset[0, 1].answer)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: Sudoku(5), r"side=5: a Sudoku has one of the sides \[4, 6, 9\]"),
        (lambda: Sudoku(6, clues=0), r"clues=0: a 6 x 6 Sudoku has 1 to 36"),
        (lambda: Maze(8), r"side=8: the side of a maze is odd and at least 5"),
        (lambda: Maze(9, loops=1.5), r"loops=1.5: give a share in 0..1"),
        (lambda: Maze(5, moves=17), r"moves=17: a path in a maze of side 5 has 1 to 16 moves"),
        (
            lambda: make(Sudoku(4, clues=3), 1),
            r"clues=3: of 200 grids of side 4 none can do with so few, the best has 4",
        ),
        (lambda: make(Maze(7, loops=1.0, moves=20), 1), r"moves=20: 200 mazes of side 7 with loops=1.0 had no single"),
        (
            lambda: make(Sudoku(4), 40),
            r"40 puzzles that differ under every symmetry were asked for; \d+ draws of side 4",
        ),
        (lambda: split(Maze(5), make(Maze(5), 3), 3), r"test=3: of 3 puzzles 1 to 2 can be tested on"),
        (
            lambda: split(Maze(5), make(Maze(5), 1)[np.zeros(4, dtype=int)], 1),
            r"each of 4 puzzles is a guise of one of the 1 to test on",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(ask, message):
    with pytest.raises(DataError, match=message):
        ask()


def test_a_grid_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"question \(16,\) and answer \(36,\): one puzzle of side 6 has \(36,\) each"):
        Sudoku(6).solves(np.zeros(16, dtype=int), np.zeros(36, dtype=int))
