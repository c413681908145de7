"""4×4 Sudoku with one solution. Score: cell accuracy over the empty cells, pooled over puzzles; and puzzles solved whole.

Puzzles come from reasoning-gym. There are only 288 solved grids: the 29 (a tenth) with the smallest hash are held out from
every other split and form the split ``heldout``; among the rest a puzzle's own hash fixes its split.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count, permutations
from typing import Any, ClassVar

from unmask.errors import UserError
from unmask.io.files import read_text
from unmask.tasks import answers, released
from unmask.tasks.base import Grade, Problem, Reward, Task, bucket, split_of, stream_seed, take_unique
from unmask.tasks.notation import plain

INSTRUCTION = """\
Solve the 4x4 Sudoku below. It is written row by row as 16 digits, and 0 is an empty cell. Each row, each column and each \
2x2 box must hold the digits 1 to 4 exactly once.
Think between <reasoning> and </reasoning>, then write the 16 digits of the solved grid between <answer> and </answer>.

{question}"""

# Where the released evaluation looks, in its order: a fenced grid, the answer up to its end, after it, before it, anywhere.
_END = r"<\|eot_id\|>|<\|endoftext\|>"
_PUBLISHED = (
    ("<answer>", r"\A<answer>.*?```([\d\s]+)```"),
    ("<answer>", rf"\A<answer>(.*?)(?:{_END}|</answer>)"),
    ("</answer>", rf"\A</answer>(.*?)(?:{_END}|$)"),
    ("", r"(\d{16})\s*</answer>"),
    ("", r"\b(\d{16})\b"),
)
_LABELS = re.compile(
    r"(?<![0-9])[0-9]{1,2} ?(?:x|\\times|by) ?[0-9]+|(?i:row|r|column|col|line) ?[0-9]\b|(?m:^[ \t]*[0-9][.):](?=\s*[0-9|]))"
)
_WORDS = re.compile(r"[a-zA-Z]{2,}")


@dataclass(frozen=True)
class Sudoku(Task):
    name: ClassVar[str] = "sudoku"
    score_name: ClassVar[str] = "cell accuracy"
    splits: ClassVar[tuple[str, ...]] = ("train", "validation", "test", "heldout")

    min_empty: int = 6
    max_empty: int = 11
    """Bounds on the empty cells; a puzzle keeps more clues where fewer would leave two solutions."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_empty <= self.max_empty <= 12:
            raise UserError(
                f"min_empty={self.min_empty}, max_empty={self.max_empty} of task sudoku: give 1 <= min <= max <= 12"
            )

    def generate(self, split: str, limit: int | None, seed: int) -> list[Problem]:
        if limit is None:
            raise UserError("task sudoku generates puzzles without end: give a limit")
        import reasoning_gym  # slow: only where problems are made

        source = reasoning_gym.create_dataset(
            "mini_sudoku", size=2**31, seed=stream_seed(seed), min_empty=self.min_empty, max_empty=self.max_empty
        )
        drawn = (self._drawn(source[index]["metadata"], split) for index in count())
        return take_unique(drawn, limit, f"{split} puzzles found for {self.config()}: ask for fewer")

    def _drawn(self, metadata: dict[str, Any], split: str) -> tuple[str, Problem] | None:
        """A puzzle of this split with what tells it from others."""
        puzzle, solution = _flat(metadata["puzzle"]), _flat(metadata["solution"])
        problem = self.problem(puzzle, solution)
        home = "heldout" if solution in heldout_grids() else split_of(problem.id)
        return (problem.id, problem) if home == split else None

    def problem(self, puzzle: str, solution: str) -> Problem:
        truth = {"puzzle": puzzle, "solution": solution}
        if self.style == "compact":
            return Problem(f"sudoku {puzzle}", f"solve {_labelled(puzzle)}", truth, worked_solution(puzzle, solution))
        return Problem(f"sudoku {puzzle}", f"Solve the following Sudoku puzzle: {puzzle}", truth)

    def load(self, path: str) -> Iterator[Problem]:
        for number, row in enumerate(csv.DictReader(read_text(path).splitlines()), 2):
            puzzle, solution = row.get("Puzzle") or "", row.get("Solution") or ""
            if not re.fullmatch("(?=.*0)[0-4]{16}", puzzle) or not re.fullmatch("[1-4]{16}", solution):
                raise UserError(f"{path}:{number} is not a row Puzzle,Solution of 16 digits each")
            yield self.problem(puzzle, solution)

    def instruction(self, problem: Problem) -> str:
        return problem.question if self.style == "compact" else INSTRUCTION.format(question=problem.question)

    def extract(self, completion: str) -> str:
        """16 characters, ``0`` where the answer is too short.

        Default: the cells in the last answer tags, else in an answer left open, else the last run of 16, else the last box.
        """
        if self.extraction == "published":
            for start, pattern in _PUBLISHED:
                if start not in completion:
                    continue
                # From the first tag on only, so that hostile text costs linear time.
                found = re.search(pattern, completion[completion.find(start) :], re.DOTALL)
                if found and found[1].strip():
                    return re.sub(r"\s", "", found[1]).ljust(16, "0")[:16]
            return "0" * 16
        text = answers.cut_at_end(completion)
        tag = answers.tagged(text)
        if tag is None and "<answer>" in text:
            tag = text.rsplit("<answer>", 1)[1]
        marked = answers.final(text, numeric=True) if tag is None else None
        digits = cells(text, whole=True) if tag is None else cells(tag)
        return (digits or cells(marked[0] if marked else "")).ljust(16, "0")[:16]

    def grade(self, problem: Problem, completion: str) -> Grade:
        answer = self.extract(completion)
        puzzle, solution = problem.truth["puzzle"], problem.truth["solution"]
        empty = [i for i, c in enumerate(puzzle) if c == "0"]
        right = sum(answer[i] == solution[i] for i in empty)
        return Grade(answer == solution, float(right), float(len(empty)), answer)

    def rewards(self) -> dict[str, tuple[Reward, float]]:
        return {"sudoku": (self.reward, 1.0)}

    def reward(
        self, prompts: list[str], completions: list[str], problem: list[Problem], **_: Any
    ) -> list[float | None]:
        """The fraction of the empty cells that are right."""
        grades = [self.grade(p, c) for p, c in zip(problem, completions, strict=True)]
        return [g.points / g.possible for g in grades]

    def released_rewards(self) -> dict[str, tuple[Reward, float]]:
        return {"sudoku": (released.sudoku, 1.0)}

    def completion_truth(self, row: dict[str, Any]) -> Problem:
        puzzle = re.search("[0-4]{16}", row["question"])
        if puzzle is None or "0" not in puzzle[0]:
            raise ValueError(f"no puzzle of 16 digits with gaps in the question {row['question']!r}")
        if not re.fullmatch("[1-4]{16}", row["ground_truth"]):
            raise ValueError(f"ground_truth {row['ground_truth']!r} is not a grid of 16 digits")
        return self.problem(puzzle[0], row["ground_truth"])


def cells(text: str, whole: bool = False) -> str:
    """The digits of the grid in an answer: its last run of 16, else its last part without words that holds 16, else its rows.

    Sizes (``4x4``), labels (``Row 1:``, ``1.``) and other numbers in prose are no cells.

    Args:
        whole: only a run of 16 counts.
    """
    text = plain(text)
    runs = re.findall(r"(?<![0-9])[0-9]{16}(?![0-9])", text)
    if runs or whole:
        return runs[-1] if runs else ""
    parts = ["".join(re.findall("[0-9]", part)) for part in _WORDS.split(_LABELS.sub("  ", text))]
    full = [part for part in parts if len(part) >= 16]
    rows = [part for part in parts if len(part) >= 4]
    return full[-1] if full else "".join(rows or parts)


def _flat(board: list[list[int]]) -> str:
    return "".join(str(cell) for row in board for cell in row)


def _labelled(grid: str) -> str:
    """``a2.31 b…``: rows carry labels, so that a cell can be addressed wherever it stands in the text."""
    return " ".join("abcd"[r] + grid[4 * r : 4 * r + 4].replace("0", ".") for r in range(4))


def worked_solution(puzzle: str, solution: str) -> str:
    """The compact solution: each gap as ``a2=4`` in reading order, then the whole grid with row labels."""
    gaps = [f"{'abcd'[i // 4]}{i % 4 + 1}={solution[i]}" for i in range(16) if puzzle[i] == "0"]
    return f"<reasoning>{' '.join(gaps)}</reasoning><answer>{_labelled(solution)}</answer>"


def solved_grids() -> list[str]:
    """All 288 solved 4×4 grids, as strings of 16 digits."""
    rows = ["".join(p) for p in permutations("1234")]
    grids = []
    for a in rows:
        for b in (r for r in rows if not set(r[:2]) & set(a[:2])):
            for c in (r for r in rows if all(r[i] not in (a[i], b[i]) for i in range(4))):
                for d in (r for r in rows if all(r[i] not in (a[i], b[i], c[i]) for i in range(4))):
                    if not set(c[:2]) & set(d[:2]):
                        grids.append(a + b + c + d)
    return grids


@cache
def heldout_grids() -> frozenset[str]:
    """The 29 grids (a tenth of 288) that no other split may use."""
    return frozenset(sorted(solved_grids(), key=lambda g: (bucket(g, 2**32), g))[:29])
