"""Countdown: reach a target with + - * / and every given number exactly once.

Problems come from reasoning-gym. The sorted numbers and the target fix a problem's split. The compact style has a worked
solution: a search, written out, that tries every pair of numbers and stops at the first result that leads to the target.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import combinations
from typing import Any

from unmask.errors import UserError
from unmask.tasks import answers, released
from unmask.tasks.base import PROMPTS, TASKS, Grade, Judge, Problem, Task, draw_metadata


@TASKS.register("countdown")
@dataclass(frozen=True)
class Countdown(Task):
    name = "countdown"
    prompt_template = PROMPTS["countdown"]

    numbers: int = 3
    """How many numbers a problem gives (the paper: 3)."""
    max_value: int = 100
    max_target: int = 100
    operators: str = "+-*/"

    def __post_init__(self) -> None:
        if not 2 <= self.numbers <= 6:
            raise UserError(f"numbers of task countdown is {self.numbers}: choose 2 to 6")
        if not self.operators or set(self.operators) - set("+-*/"):
            raise UserError(f"operators of task countdown is {self.operators!r}: choose some of + - * /")
        if self.max_value < 5 or self.max_target < 10:
            raise UserError("max_value and max_target of task countdown are too small: choose at least 5 and 10")

    def draw(self, seed: int) -> Iterator[Problem | None]:
        """Problems of reasoning-gym; the compact style leaves out those whose solution its search cannot write."""
        bounds = {"max_value": self.max_value, "max_target": self.max_target, "operators": tuple(self.operators)}
        bounds |= dict.fromkeys(("min_value", "min_target"), 1) | dict.fromkeys(
            ("min_numbers", "max_numbers"), self.numbers
        )
        for found in draw_metadata("countdown", seed, **bounds):
            problem = found and self.problem(tuple(found["numbers"]), found["target"])
            yield problem if problem and (self.style == "paper" or problem.response) else None

    def dedup_key(self, problem: Problem, split: str) -> str:
        """For training, the same numbers in another order are another problem (of the same split)."""
        return problem.question if split == "train" else problem.id

    def problem(self, numbers: tuple[int, ...], target: int) -> Problem:
        identity = f"countdown {sorted(numbers)} {target}"
        truth = {"numbers": list(numbers), "target": target}
        if self.style == "paper":
            return Problem(identity, f"Numbers: {list(numbers)}\nTarget: {target}", truth)
        given = " ".join(map(str, numbers))
        asks = {"compact": f"make {target} from {given}", "sentence": f"How do {given} give {target}?"}
        return Problem(identity, asks[self.style], truth, worked_solution(numbers, target, self.operators))

    def parse(self, row: dict[str, Any]) -> Problem:
        """Of ``{"input": "30,100,93", "output": "23"}``."""
        return self.problem(tuple(int(n) for n in row["input"].split(",")), int(row["output"]))

    def completion_truth(self, row: dict[str, Any]) -> Problem:
        numbers, target = row["ground_truth"]
        if not all(type(n) is int for n in [*numbers, target]):
            raise ValueError(f"ground_truth {row['ground_truth']!r} is not [[numbers], target] in integers")
        return self.problem(tuple(numbers), target)

    def instruction(self, problem: Problem) -> str:
        return super().instruction(problem).replace("{operators}", ", ".join(self.operators))

    def extract(self, completion: str) -> str:
        """The expression that a completion marks as its answer, as plain arithmetic; all of it where nothing is marked."""
        if self.extraction == "published":
            return released.expression(completion)
        marked = answers.final(completion, numeric=True)
        return answers.expression(marked[0] if marked else answers.cut_at_end(completion))

    def grade(self, problem: Problem, completion: str) -> Grade:
        """By default exactly; ``published`` as the released code computes, within 1e-5."""
        expression = self.extract(completion)
        if self.extraction == "published":
            solved = released.is_solution(expression, problem.truth)
        else:
            solved = self.value(problem, expression) == problem.truth["target"]
        return Grade.of(solved, expression[: answers.MAX_EXPRESSION])

    def value(self, problem: Problem, expression: str) -> Fraction | None:
        """The value of an expression that uses just the given numbers and the task's operators, else None."""
        result = answers.arithmetic(expression)
        if result is None or set(expression) & (set("+-*/") - set(self.operators)):
            return None
        return result[0] if sorted(result[1]) == sorted(problem.truth["numbers"]) else None

    def reward(self, problem: Problem, completion: str) -> float:
        """1.0 for a right expression, 0.1 for one that uses the given numbers but misses the target, else 0."""
        if self.grade(problem, completion).solved:
            return 1.0
        return 0.0 if self.value(problem, self.extract(completion)) is None else 0.1

    def released_rewards(self) -> dict[str, tuple[Judge, float]]:
        return {"countdown": (released.countdown, 1.0)}


Term = tuple[int, str, int]  # value, expression, precedence of its top operator (1: + -, 2: * /, 3: a number)


def _results(p: Term, q: Term, operators: str) -> Iterator[tuple[Term, str]]:
    """Every positive whole result of one operation on two terms, in a fixed order, each with its step (``8*3=24``)."""
    high, low = (p, q) if p[0] >= q[0] else (q, p)
    for op in "+-*/":
        if op not in operators or (op == "/" and (low[0] == 0 or high[0] % low[0])):
            continue
        (a, x, inner), (b, y, other) = (high, low) if op in "-/" else (p, q)
        value = a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a // b
        if value <= 0:
            continue
        precedence = 1 if op in "+-" else 2
        left = x if inner >= precedence else f"({x})"
        right = y if other > precedence or (op in "+*" and other == precedence) else f"({y})"
        step = f"{p[0]}*{q[0]}" if op == "/" and b == 1 else f"{a}{op}{b}"
        yield (value, f"{left}{op}{right}", precedence), f"{step}={value}"


@cache
def _reachable(values: tuple[int, ...], target: int, operators: str) -> bool:
    return _search(tuple((v, str(v), 3) for v in values), target, operators) is not None


def _search(terms: tuple[Term, ...], target: int, operators: str) -> tuple[list[str], str] | None:
    """The written search, (steps, expression): the first solution in the fixed order and what was tried before it."""
    if len(terms) == 1:
        return ([], terms[0][1]) if terms[0][0] == target else None
    tried: list[str] = []
    for i, j in combinations(range(len(terms)), 2):
        rest = tuple(t for k, t in enumerate(terms) if k not in (i, j))
        for result, step in _results(terms[i], terms[j], operators):
            tried = [*tried, step] if rest else [step]
            if _reachable(tuple(t[0] for t in (*rest, result)), target, operators):
                found = _search((*rest, result), target, operators)
                return found and (tried + found[0], found[1])
    return None


def worked_solution(numbers: tuple[int, ...], target: int, operators: str) -> str | None:
    """The search and its answer in the compact style, or None if positive whole steps cannot reach the target."""
    found = _search(tuple((n, str(n), 3) for n in numbers), target, operators)
    return found and f"<reasoning>{' '.join(found[0])}</reasoning><answer>{found[1]}</answer>"
