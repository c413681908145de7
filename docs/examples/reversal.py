"""A task of one's own: reverse a string. ``unmask eval --task docs.examples.reversal:Reversal,length=6 --decoder ass``."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from string import ascii_lowercase

from unmask.tasks import Grade, Judge, Problem, Task


@dataclass(frozen=True)
class Reversal(Task):
    name = "reversal"

    length: int = 5
    """Letters of a string; every field is a parameter of the task."""

    @property
    def prefill(self) -> str:
        """What the assistant's turn starts with: nothing."""
        return ""

    def draw(self, seed: int) -> Iterator[Problem]:
        """Problems without end: id, user's turn, what the grader needs, worked response. The id fixes the split."""
        rng = random.Random(seed)
        while True:
            word = "".join(rng.choices(ascii_lowercase, k=self.length))
            yield Problem(word, f"reverse {word}", {"answer": word[::-1]}, word[::-1])

    def grade(self, problem: Problem, completion: str) -> Grade:
        return Grade.of(completion.strip() == problem.truth["answer"], completion.strip())

    def rewards(self) -> dict[str, tuple[Judge, float]]:
        """By name, each with its weight."""
        return {"letters": (self.letters, 1.0)}

    def letters(self, problem: Problem, completion: str) -> float:
        """The share of the letters that stand where they belong."""
        answer = problem.truth["answer"]
        return sum(a == b for a, b in zip(answer, completion.strip(), strict=False)) / len(answer)
