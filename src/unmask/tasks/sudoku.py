"""4×4 Sudoku with one solution. Score: cell accuracy over the empty cells, pooled over puzzles; and puzzles solved whole.

Puzzles come from reasoning-gym. Of the 288 solved grids the 29 with the smallest hash belong to the split ``heldout`` alone;
among the rest a puzzle's own hash fixes its split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Any

from unmask.errors import UserError
from unmask.tasks import answers, released
from unmask.tasks.base import PROMPTS, TASKS, Grade, Judge, Problem, Task, bucket, draw_metadata
from unmask.tasks.notation import plain

_LABELS = re.compile(
    r"(?<![0-9])[0-9]{1,2} ?(?:x|\\times|by) ?[0-9]+|(?i:row|r|column|col|line) ?[0-9]\b|(?m:^[ \t]*[0-9][.):](?=\s*[0-9|]))"
)
_WORDS = re.compile(r"[a-zA-Z]{2,}")


@TASKS.register("sudoku")
@dataclass(frozen=True)
class Sudoku(Task):
    name = "sudoku"
    prompt_template = PROMPTS["sudoku"]
    score_name = "cell accuracy"
    splits = ("train", "validation", "test", "heldout")

    min_empty: int = 6
    max_empty: int = 11
    """Bounds on the empty cells; a puzzle keeps more clues where fewer would leave two solutions."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_empty <= self.max_empty <= 12:
            raise UserError("min_empty and max_empty of task sudoku do not fit: choose 1 <= min <= max <= 12")

    def draw(self, seed: int) -> Iterator[Problem | None]:
        for found in draw_metadata("mini_sudoku", seed, min_empty=self.min_empty, max_empty=self.max_empty):
            grids = [found[key] for key in ("puzzle", "solution")] if found else []
            yield self.problem(*("".join(str(c) for row in grid for c in row) for grid in grids)) if found else None

    def home_split(self, problem: Problem) -> str:
        return "heldout" if problem.truth["solution"] in heldout_grids() else super().home_split(problem)

    def problem(self, puzzle: str, solution: str) -> Problem:
        if not re.fullmatch("(?=.*0)[0-4]{16}", puzzle) or not re.fullmatch("[1-4]{16}", solution):
            raise ValueError(f"puzzle {puzzle!r} and solution {solution!r} are not 16 digits each")
        question, response = f"Solve the following Sudoku puzzle: {puzzle}", None
        if self.style != "paper":
            gaps = [f"{'abcd'[i // 4]}{i % 4 + 1}={solution[i]}" for i in range(16) if puzzle[i] == "0"]
            question = f"{'solve' if self.style == 'compact' else 'Fill in'} {_labelled(puzzle)}"
            response = f"<reasoning>{' '.join(gaps)}</reasoning><answer>{_labelled(solution)}</answer>"
        return Problem(f"sudoku {puzzle}", question, {"puzzle": puzzle, "solution": solution}, response)

    def parse(self, row: dict[str, Any]) -> Problem:
        """Of ``Puzzle`` and ``Solution``, 16 digits each."""
        return self.problem(row["Puzzle"], row["Solution"])

    def completion_truth(self, row: dict[str, Any]) -> Problem:
        puzzle = re.search("[0-4]{16}", row["question"])
        return self.problem(puzzle[0] if puzzle else "", row["ground_truth"])

    def extract(self, completion: str) -> str:
        """16 characters: the cells in the last answer tags, else in an answer left open, else the last run of 16 or box."""
        if self.extraction == "published":
            return released.grid(completion)
        text = answers.cut_at_end(completion)
        tag = answers.tagged(text)
        if tag is None:
            tag = answers.tagged(text + "</answer>")
        if tag is None:
            tag = cells(text, whole=True) or (answers.final(text, numeric=True) or ("",))[0]
        return cells(tag).ljust(16, "0")[:16]

    def grade(self, problem: Problem, completion: str) -> Grade:
        answer, solution = self.extract(completion), problem.truth["solution"]
        empty = [i for i, c in enumerate(problem.truth["puzzle"]) if c == "0"]
        right = sum(answer[i] == solution[i] for i in empty)
        return Grade(answer == solution, float(right), float(len(empty)), answer)

    def released_rewards(self) -> dict[str, tuple[Judge, float]]:
        return {"sudoku": (released.sudoku, 1.0)}


def cells(text: str, whole: bool = False) -> str:
    """The digits of the grid in an answer: its last run of 16, else its last part without words that holds 16, else its rows.

    Sizes (``4x4``), labels (``Row 1:``, ``1.``) and other numbers in prose are no cells. ``whole``: only a run of 16 counts.
    """
    text = plain(text)
    runs = re.findall(r"(?<![0-9])[0-9]{16}(?![0-9])", text)
    if runs or whole:
        return runs[-1] if runs else ""
    parts = ["".join(re.findall("[0-9]", part)) for part in _WORDS.split(_LABELS.sub("  ", text))]
    full = [part for part in parts if len(part) >= 16]
    return full[-1] if full else "".join([part for part in parts if len(part) >= 4] or parts)


def _labelled(grid: str) -> str:
    """``a2.31 b…``: rows carry labels, so that a cell can be addressed wherever it is in the text."""
    return " ".join("abcd"[r] + grid[4 * r : 4 * r + 4].replace("0", ".") for r in range(4))


def solved_grids() -> list[str]:
    """All 288 solved 4×4 grids, as strings of 16 digits."""
    rows = ["".join(p) for p in permutations("1234")]
    halves = [a + b for a in rows for b in rows if not set(a[:2]) & set(b[:2])]
    return [a + b for a in halves for b in halves if all(len({a[i], a[i + 4], b[i], b[i + 4]}) == 4 for i in range(4))]


@cache
def heldout_grids() -> frozenset[str]:
    """The grids that no other split may use, a tenth of all."""
    return frozenset(sorted(solved_grids(), key=lambda g: (bucket(g, 2**32), g))[:29])
