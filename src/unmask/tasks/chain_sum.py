"""Chain sums: additions and subtractions of several numbers, worked from left to right, so that each line needs the one before.

Problems come from reasoning-gym; those with a partial sum below zero are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from unmask.errors import UserError
from unmask.tasks import answers
from unmask.tasks.base import PROMPTS, TASKS, Grade, Problem, Task, draw_metadata
from unmask.tasks.quantities import number


@TASKS.register("chain_sum")
@dataclass(frozen=True)
class ChainSum(Task):
    name = "chain_sum"
    prompt_template = PROMPTS["chain_sum"]

    min_terms: int = 3
    max_terms: int = 6
    min_digits: int = 2
    max_digits: int = 2
    """Bounds on the digits of a term."""

    def __post_init__(self) -> None:
        if not 2 <= self.min_terms <= self.max_terms <= 20:
            raise UserError("min_terms and max_terms of task chain_sum do not fit: choose 2 <= min <= max <= 20")
        if not 1 <= self.min_digits <= self.max_digits <= 9:
            raise UserError("min_digits and max_digits of task chain_sum do not fit: choose 1 <= min <= max <= 9")

    def draw(self, seed: int) -> Iterator[Problem | None]:
        bounds = {key: getattr(self, key) for key in ("min_terms", "max_terms", "min_digits", "max_digits")}
        for found in draw_metadata("chain_sum", seed, **bounds):
            yield self.problem(found["expression"].replace(" ", "")) if found else None

    def problem(self, expression: str) -> Problem | None:
        """The problem of ``47+85-12``; None where a partial sum is negative."""
        first, *rest = re.findall(r"[+-]?\d+", expression)
        value, steps = int(first), []
        for term in rest:
            steps.append(f"{value}{term}={value + int(term)}")
            value += int(term)
            if value < 0:
                return None
        asks = {"paper": "{}", "compact": "compute {}", "sentence": "What is {}?"}
        response = f"<reasoning>{' '.join(steps)}</reasoning><answer>{value}</answer>"
        worked = None if self.style == "paper" else response
        return Problem(f"chain_sum {expression}", asks[self.style].format(expression), {"value": value}, worked)

    def grade(self, problem: Problem, completion: str) -> Grade:
        marked = answers.final(completion, numeric=True)
        value = marked and number(marked[0], last=not marked[1])
        return Grade.of(value == problem.truth["value"], None if value is None else str(value))
