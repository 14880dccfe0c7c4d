"""Small puzzles made by script from a seed, each with exactly one solution: Sudoku of side 4, 6 or 9, and mazes.

A puzzle is a question and an answer of equally many cells, row by row, each cell a number of a small vocabulary.
Nothing is downloaded. `make` draws puzzles that differ under every symmetry used for variation, so `split` can promise
that no test puzzle is trained on, in whatever guise.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from edge_glass.data.batch import SkippedRow
from edge_glass.data.rows import DataError
from edge_glass.data.samples import Index

Cells = NDArray[np.int64]  # [cells], or [puzzles, cells]
BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # side of a Sudoku -> rows and columns of its boxes
EMPTY = 0  # a Sudoku's cell to fill in
WALL, FREE, START, GOAL, PATH = range(5)  # a maze's cells; PATH in answers only
TRIES = 200  # grids drawn for one puzzle before giving up


@dataclass
class Puzzles:
    """Questions with their answers.

    Attributes:
        questions: `[puzzles, cells]` int64.
        answers: likewise.
    """

    questions: Cells
    answers: Cells

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, places: slice | NDArray) -> "Puzzles":
        return Puzzles(self.questions[places], self.answers[places])


class Game(Protocol):
    """The rules of one kind of puzzle.

    Attributes:
        side: of the square grid.
        vocabulary: how many different values a cell takes.
        places: `[kinds, cells]` int64, where each cell is: its row, its column, and in a Sudoku its box.
    """

    side: int
    vocabulary: int

    @property
    def places(self) -> Cells: ...

    def draw(self, generator: np.random.Generator) -> tuple[Cells, Cells]:
        """A random question and its answer, `[cells]` each."""
        ...

    def vary(self, question: Cells, answer: Cells, generator: np.random.Generator) -> tuple[Cells, Cells]:
        """The same puzzle in another guise: a random symmetry of the game applied to question and answer."""
        ...

    def fingerprints(self, puzzles: Puzzles) -> NDArray[np.uint64]:
        """A number for each puzzle, `[puzzles]`, that no symmetry changes: guises of one puzzle share theirs."""
        ...

    def solves(self, question: Cells, answer: Cells) -> bool:
        """Whether an answer, not necessarily the known one, is right by the rules."""
        ...


class Sudoku:
    """Every row, column and box holds each digit once. Cells: 0 for empty, then the digits.

    Args:
        side: 4, 6 or 9, with boxes of 2 x 2, 2 x 3 and 3 x 3.
        clues: digits given; None takes digits away until each that is left is needed.

    Raises:
        DataError: another side, or a number of clues outside the grid.
    """

    def __init__(self, side: int = 6, clues: int | None = None):
        if side not in BOXES:
            raise DataError(f"side={side}: a Sudoku has one of the sides {sorted(BOXES)}")
        if clues is not None and not 1 <= clues <= side**2:
            raise DataError(
                f"clues={clues}: a {side} x {side} Sudoku has 1 to {side**2}, or null for as few as it needs"
            )
        self.side, self.clues, self.vocabulary = side, clues, side + 1
        height, width = BOXES[side]
        rows, columns = np.divmod(np.arange(side**2), side)
        self._square = height == width
        self._bands, self._stacks = (side // height, height), (side // width, width)  # how many, lines in each
        self._units = [rows, columns, rows // height * (side // width) + columns // width]
        self._groups = [*self._units, rows // height, columns // width]  # of cells, for fingerprints
        self.units_of = list(zip(*(unit.tolist() for unit in self._units), strict=True))  # row, column, box of a cell
        self.cells_of = [np.flatnonzero(unit == place).tolist() for unit in self._units for place in range(side)]

    @property
    def places(self) -> Cells:
        """`[3, cells]`: the row, column and box of each cell."""
        return np.stack(self._units)

    def draw(self, generator: np.random.Generator) -> tuple[Cells, Cells]:
        """A random question and its answer, `[cells]` each.

        Digits are taken from a full grid in random order; one whose absence would allow a second solution stays.

        Raises:
            DataError: no grid of many can do with so few clues.
        """
        fewest = self.side**2
        for _ in range(TRIES):
            answer = _Grid(self, [EMPTY] * self.side**2)
            answer.fill(generator)
            question = _Grid(self, answer.digits)
            left = self.side**2
            for cell in generator.permutation(self.side**2).tolist():
                if left == self.clues:
                    break
                left -= question.take(cell)
            if self.clues is None or left == self.clues:
                return np.array(question.digits), np.array(answer.digits)
            fewest = min(fewest, left)
        raise DataError(
            f"clues={self.clues}: of {TRIES} grids of side {self.side} none can do with so few, the best has {fewest}: "
            "ask for more, or for null"
        )

    def vary(self, question: Cells, answer: Cells, generator: np.random.Generator) -> tuple[Cells, Cells]:
        """Digits exchanged, lines exchanged within bands and bands among each other, and where boxes are square rows
        for columns."""
        cells = np.arange(self.side**2).reshape(self.side, self.side)
        cells = cells[_shuffled_lines(*self._bands, generator)][:, _shuffled_lines(*self._stacks, generator)]
        if self._square and generator.random() < 0.5:
            cells = cells.T
        digits = np.concatenate([[EMPTY], 1 + generator.permutation(self.side)])
        return digits[question[cells.ravel()]], digits[answer[cells.ravel()]]

    def fingerprints(self, puzzles: Puzzles) -> NDArray[np.uint64]:
        """Four rounds of colour refinement: a cell's colour, at first whether it is given, takes in the colours of all
        cells of its row, column, box, band, stack and digit, whichever order they come in."""
        salts = [1, 1, 2, 3, 3, 4] if self._square else [1, 5, 2, 3, 6, 4]  # alike where a transposition swaps groups
        groups = [np.broadcast_to(group, puzzles.answers.shape) for group in self._groups]
        groups.append(puzzles.answers - 1)
        colours = (puzzles.questions != EMPTY).astype(np.uint64)
        for _ in range(4):
            mixed = _mix(colours)
            for group, salt in zip(groups, salts, strict=True):
                members = group[:, :, None] == np.arange(self.side)
                sums = (mixed[:, :, None] * members).sum(axis=1)
                colours = colours + _mix(np.take_along_axis(sums, group, axis=1) + np.uint64(salt))
        return _mix(colours).sum(axis=1)

    def solves(self, question: Cells, answer: Cells) -> bool:
        """Whether an answer keeps the clues and has every digit once in each row, column and box.

        Raises:
            ValueError: a grid of another size.
        """
        _check_size(self.side, question, answer)
        if np.any((question != EMPTY) & (question != answer)):
            return False
        every = set(range(1, self.side + 1))
        return all(set(answer[unit == place].tolist()) == every for unit in self._units for place in range(self.side))


class _Grid:
    """A Sudoku being filled or emptied; for each row, column and box a bit mask of the digits it still lacks."""

    def __init__(self, game: Sudoku, digits: list[int]):
        self.game, self.digits = game, list(digits)
        self.rows, self.columns, self.boxes = ([(1 << game.side) - 1] * game.side for _ in range(3))
        for cell, digit in enumerate(digits):
            if digit:
                self._flip(cell, 1 << digit - 1)

    def fill(self, generator: np.random.Generator | None = None) -> bool:
        """Complete the grid, digits tried in rising or in random order; False, and unchanged, if that cannot be."""
        cell, fitting = self._tightest()
        if cell is None:
            return True
        for digit in self._order(fitting, generator):
            self.digits[cell] = digit
            self._flip(cell, 1 << digit - 1)
            if self.fill(generator):
                return True
            self._flip(cell, 1 << digit - 1)
        self.digits[cell] = EMPTY
        return False

    def take(self, cell: int) -> bool:
        """Take a digit away unless that would allow a second solution; whether it was taken."""
        digit = self.digits[cell]
        self.digits[cell] = EMPTY
        self._flip(cell, 1 << digit - 1)
        for other in self._order(self._fitting(cell) & ~(1 << digit - 1), None):
            trial = _Grid(self.game, [*self.digits[:cell], other, *self.digits[cell + 1 :]])
            if trial.fill():
                self.digits[cell] = digit
                self._flip(cell, 1 << digit - 1)
                return False
        return True

    def _tightest(self) -> tuple[int | None, int]:
        """The empty cell that fewest digits fit, None in a full grid, and the mask of the digits to try there.

        A digit that fits in only one cell of a row, column or box is the only one to try in that cell; where one fits
        nowhere, there is nothing to try.
        """
        tightest, fewest, fitting = None, self.game.side + 1, 0
        fits = {}
        for cell, digit in enumerate(self.digits):
            if not digit:
                fits[cell] = fit = self._fitting(cell)
                if fit.bit_count() < fewest:
                    tightest, fewest, fitting = cell, fit.bit_count(), fit
                    if fewest < 2:
                        return tightest, fitting
        for unit, lacking in zip(self.game.cells_of, self.rows + self.columns + self.boxes, strict=True):
            once = twice = 0
            for cell in unit:
                if cell in fits:
                    twice |= once & fits[cell]
                    once |= fits[cell]
            if once != lacking:
                return tightest, 0
            once &= ~twice
            if once:
                bit = once & -once
                return next(cell for cell in unit if fits.get(cell, 0) & bit), bit
        return tightest, fitting

    def _fitting(self, cell: int) -> int:
        row, column, box = self.game.units_of[cell]
        return self.rows[row] & self.columns[column] & self.boxes[box]

    def _flip(self, cell: int, bit: int) -> None:
        row, column, box = self.game.units_of[cell]
        self.rows[row] ^= bit
        self.columns[column] ^= bit
        self.boxes[box] ^= bit

    def _order(self, mask: int, generator: np.random.Generator | None) -> list[int]:
        digits = [digit for digit in range(1, self.game.side + 1) if mask >> digit - 1 & 1]
        return digits if generator is None else generator.permutation(digits).tolist()


class Maze:
    """The shortest way from start to goal on a square grid. Cells: wall, free, start, goal, and in answers the path.

    Corridors join rooms at even rows and columns; the grid has no outer wall.

    Args:
        side: odd, at least 5.
        moves: the fewest moves from start to goal, for paths long enough to be hard; None for twice the side.
        loops: the share of the walls between neighbouring rooms that a perfect maze, which has one way between any two
            rooms, would keep and that are opened here. The shortest path stays the only one of its length.

    Raises:
        DataError: a side, a share or a number of moves that cannot be.
    """

    vocabulary = 5

    def __init__(self, side: int = 9, moves: int | None = None, loops: float = 0.0):
        if side < 5 or side % 2 == 0:
            raise DataError(f"side={side}: the side of a maze is odd and at least 5")
        if not 0 <= loops <= 1:
            raise DataError(f"loops={loops}: give a share in 0..1")
        most = 2 * ((side + 1) // 2) ** 2 - 2  # through all rooms, one after another
        self.side, self.loops, self.moves = side, loops, 2 * side if moves is None else moves
        if not 1 <= self.moves <= most:
            raise DataError(f"moves={moves}: a path in a maze of side {side} has 1 to {most} moves")
        square = np.arange(side**2).reshape(side, side)
        self._guises = np.stack(
            [np.rot90(turned, turns).ravel() for turned in (square, square.T) for turns in range(4)]
        )  # [8, cells]
        self._neighbours = [
            [
                (row + down) * side + column + right
                for down, right in ((0, 1), (1, 0), (0, -1), (-1, 0))
                if 0 <= row + down < side and 0 <= column + right < side
            ]
            for row in range(side)
            for column in range(side)
        ]

    @property
    def places(self) -> Cells:
        """`[2, cells]`: the row and column of each cell."""
        return np.stack(np.divmod(np.arange(self.side**2), self.side))

    def draw(self, generator: np.random.Generator) -> tuple[Cells, Cells]:
        """A random question and its answer, `[cells]` each.

        Raises:
            DataError: no maze of many has a path as long as asked for.
        """
        longest = 0
        for _ in range(TRIES):
            cells = self._dig(generator)
            for start in generator.permutation(np.flatnonzero(cells == FREE)).tolist():
                distance, ways = self._walk(cells, start)
                longest = max(longest, int(distance.max()))
                goals = np.flatnonzero((distance >= self.moves) & (ways == 1))
                if len(goals):
                    return self._pose(cells, start, int(generator.choice(goals)), distance)
        raise DataError(
            f"moves={self.moves}: {TRIES} mazes of side {self.side} with loops={self.loops} had no single shortest "
            f"path that long; the longest had {longest} moves"
        )

    def vary(self, question: Cells, answer: Cells, generator: np.random.Generator) -> tuple[Cells, Cells]:
        """One of the eight turns and reflections of the square."""
        cells = self._guises[generator.integers(8)]
        return question[cells], answer[cells]

    def fingerprints(self, puzzles: Puzzles) -> NDArray[np.uint64]:
        """The least of the hashes of the eight guises."""
        place = _mix(np.arange(self.side**2).astype(np.uint64) * np.uint64(self.vocabulary))
        hashes = [_mix(place + puzzles.questions[:, cells].astype(np.uint64)).sum(axis=1) for cells in self._guises]
        return np.min(hashes, axis=0)

    def solves(self, question: Cells, answer: Cells) -> bool:
        """Whether an answer changes only free cells, to a shortest path from start to goal.

        Raises:
            ValueError: a grid of another size.
        """
        _check_size(self.side, question, answer)
        way = answer == PATH
        if np.any((question != answer) & ~((question == FREE) & way)):
            return False
        start, goal = (int(np.flatnonzero(question == end)[0]) for end in (START, GOAL))
        shortest = self._walk(question, start)[0][goal]
        along = self._walk(np.where(way | (question == START) | (question == GOAL), FREE, WALL), start)[0][goal]
        return bool(along == shortest == way.sum() + 1)

    def _dig(self, generator: np.random.Generator) -> Cells:
        """Walls and free cells: a walk from room to room that turns back only at dead ends, then the loops."""
        cells = np.full((self.side, self.side), WALL)
        cells[0, 0] = FREE
        trail = [(0, 0)]
        while trail:
            row, column = trail[-1]
            steps = [
                (down, right)
                for down, right in ((0, 1), (1, 0), (0, -1), (-1, 0))
                if 0 <= row + 2 * down < self.side
                and 0 <= column + 2 * right < self.side
                and cells[row + 2 * down, column + 2 * right] == WALL
            ]
            if not steps:
                trail.pop()
                continue
            down, right = steps[generator.integers(len(steps))]
            cells[row + down, column + right] = cells[row + 2 * down, column + 2 * right] = FREE
            trail.append((row + 2 * down, column + 2 * right))
        rows, columns = np.nonzero(cells == WALL)
        doors = np.flatnonzero((rows + columns) % 2)  # the other walls stand between four rooms
        opened = generator.permutation(doors)[: round(self.loops * len(doors))]
        cells[rows[opened], columns[opened]] = FREE
        return cells.ravel()

    def _walk(self, cells: Cells, start: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Moves from `start` to each cell, -1 where no way leads, and the number of shortest ways, `[cells]` both."""
        free = (cells != WALL).tolist()
        distance, ways = [-1] * len(free), [0] * len(free)
        distance[start], ways[start] = 0, 1
        queue = deque([start])
        while queue:
            cell = queue.popleft()
            for neighbour in self._neighbours[cell]:
                if free[neighbour]:
                    if distance[neighbour] < 0:
                        distance[neighbour] = distance[cell] + 1
                        queue.append(neighbour)
                    if distance[neighbour] == distance[cell] + 1:
                        ways[neighbour] += ways[cell]
        return np.array(distance), np.array(ways)

    def _pose(self, cells: Cells, start: int, goal: int, distance: NDArray[np.int64]) -> tuple[Cells, Cells]:
        question = cells.copy()
        question[start], question[goal] = START, GOAL
        answer = question.copy()
        cell = goal
        while distance[cell] > 1:
            cell = next(near for near in self._neighbours[cell] if distance[near] == distance[cell] - 1)
            answer[cell] = PATH
        return question, answer


def make(game: Game, count: int, seed: int = 0) -> Puzzles:
    """Different puzzles, none of which a symmetry turns into another; the first of many are those of few.

    Args:
        game: the rules.
        count: how many.
        seed: of everything random.

    Raises:
        DataError: the game has not so many different puzzles, as far as chance finds them.
    """
    found: dict[int, tuple[Cells, Cells]] = {}
    drawn = 0
    while len(found) < count:
        if drawn > 20 * count + 1000:
            raise DataError(
                f"{count} puzzles that differ under every symmetry were asked for; {drawn} draws of side {game.side} "
                f"gave {len(found)}: ask for fewer, or for a larger side"
            )
        batch = [
            game.draw(np.random.default_rng((seed, place)))
            for place in range(drawn, drawn + max(16, count - len(found)))
        ]
        drawn += len(batch)
        questions, answers = (np.stack(part) for part in zip(*batch, strict=True))
        for name, puzzle in zip(game.fingerprints(Puzzles(questions, answers)).tolist(), batch, strict=True):
            found.setdefault(name, puzzle)
    questions, answers = (np.stack(part) for part in zip(*list(found.values())[:count], strict=True))
    return Puzzles(questions, answers)


def split(game: Game, puzzles: Puzzles, test: int) -> tuple[Puzzles, Puzzles]:
    """Puzzles to train on and puzzles to test on; what shares its fingerprint with a test puzzle is trained on never.

    Args:
        game: the rules.
        puzzles: of any origin, repeats allowed.
        test: how many of them to test on: the first.

    Raises:
        DataError: nothing is left to train or to test on.
    """
    if not 1 <= test < len(puzzles):
        raise DataError(f"test={test}: of {len(puzzles)} puzzles 1 to {len(puzzles) - 1} can be tested on")
    names = game.fingerprints(puzzles)
    train = puzzles[np.flatnonzero(~np.isin(names, names[:test]))]
    if not len(train):
        raise DataError(f"each of {len(puzzles)} puzzles is a guise of one of the {test} to test on")
    return train, puzzles[:test]


@dataclass
class PuzzleSample:
    """One puzzle, as the model reads it.

    Attributes:
        question: `[cells]` int64.
        answer: likewise.
        sample_id: what it is called.
    """

    question: Tensor
    answer: Tensor
    sample_id: str


@dataclass
class PuzzleBatch:
    """Puzzles as the model reads them.

    Attributes:
        questions: `[batch, cells]` int64.
        answers: likewise.
        sample_ids: what they are called.
        skipped: none ever.
    """

    questions: Tensor
    answers: Tensor
    sample_ids: list[str]
    skipped: list[SkippedRow] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.questions)

    def to(self, device) -> "PuzzleBatch":
        """The same puzzles on another device."""
        questions, answers = self.questions.to(device), self.answers.to(device)
        return PuzzleBatch(questions, answers, self.sample_ids)

    def split(self, parts: int) -> list["PuzzleBatch"]:
        """Equal, contiguous micro-batches.

        Raises:
            ValueError: the batch does not divide into `parts`.
        """
        if parts < 1 or len(self) % parts:
            raise ValueError(f"a batch of {len(self)} puzzles does not divide into {parts} micro-batches")
        size = len(self) // parts
        slices = [slice(start, start + size) for start in range(0, len(self), size)]
        return [PuzzleBatch(self.questions[s], self.answers[s], self.sample_ids[s]) for s in slices]


def collate_puzzles(samples: list[PuzzleSample]) -> PuzzleBatch:
    """Samples as a batch."""
    return PuzzleBatch(
        torch.stack([sample.question for sample in samples]),
        torch.stack([sample.answer for sample in samples]),
        [sample.sample_id for sample in samples],
    )


class PuzzleDataset(Dataset[PuzzleSample]):
    """Puzzles to train on, each in another guise in every epoch.

    Args:
        game: the rules.
        puzzles: of that game.
        vary: whether to apply a random symmetry.
        seed: of the symmetries: what a sample looks like follows from seed, epoch and place alone.
    """

    def __init__(self, game: Game, puzzles: Puzzles, vary: bool = True, seed: int = 0):
        self.game, self.puzzles, self.vary, self.seed = game, puzzles, vary, seed

    def __len__(self) -> int:
        return len(self.puzzles)

    def __getitem__(self, index: Index) -> PuzzleSample:
        epoch, place = index
        question, answer = self.puzzles.questions[place], self.puzzles.answers[place]
        if self.vary:
            question, answer = self.game.vary(question, answer, np.random.default_rng((self.seed, epoch, place)))
        return PuzzleSample(torch.from_numpy(question.copy()), torch.from_numpy(answer.copy()), f"puzzle-{place}")


def _check_size(side: int, question: Cells, answer: Cells) -> None:
    if question.shape != (side**2,) or answer.shape != (side**2,):
        raise ValueError(
            f"question {question.shape} and answer {answer.shape}: one puzzle of side {side} has {(side**2,)} each"
        )


def _shuffled_lines(bands: int, lines: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Rows, or columns, shuffled within each band and band by band."""
    return np.concatenate([band * lines + generator.permutation(lines) for band in generator.permutation(bands)])


def _mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Numbers without any trace of their order: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
