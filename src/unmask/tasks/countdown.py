"""Countdown: reach a target with + - * / and every given number exactly once.

Problems come from reasoning-gym; a problem's identity is (sorted numbers, target), which fixes its split. The compact style
carries a worked solution: a systematic search, written out, that tries every pair of numbers and stops at the first result
from which the target can be reached, so its length cannot be known before the problem is solved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import combinations, count
from typing import Any, ClassVar

from unmask.errors import UserError
from unmask.io.hub import read_rows
from unmask.tasks import answers, released
from unmask.tasks.base import Grade, Problem, Reward, Task, split_of, stream_seed, take_unique

INSTRUCTION = """\
Reach the target with the numbers given. Use every number exactly once and only the operations {operators}.
Think between <reasoning> and </reasoning>, then write only the final expression, for example (1 + 2) * 3, between \
<answer> and </answer>.

{question}"""


@dataclass(frozen=True)
class Countdown(Task):
    name: ClassVar[str] = "countdown"

    numbers: int = 3
    """How many numbers a problem gives (the paper: 3)."""
    max_value: int = 100
    max_target: int = 100
    operators: str = "+-*/"

    def __post_init__(self) -> None:
        if not 2 <= self.numbers <= 6:
            raise UserError(f"numbers of task countdown is {self.numbers}: give 2 to 6")
        if not self.operators or set(self.operators) - set("+-*/"):
            raise UserError(f"operators of task countdown is {self.operators!r}: give some of + - * /")
        if self.max_value < 5 or self.max_target < 10:
            raise UserError(
                f"max_value={self.max_value}, max_target={self.max_target} of task countdown leave too few problems: "
                "give at least 5 and 10"
            )

    def generate(self, split: str, limit: int | None, seed: int) -> list[Problem]:
        if limit is None:
            raise UserError("task countdown generates problems without end: give a limit")
        import reasoning_gym  # slow: only where problems are made

        source = reasoning_gym.create_dataset(
            "countdown",
            size=2**31,
            seed=stream_seed(seed),
            min_numbers=self.numbers,
            max_numbers=self.numbers,
            min_value=1,
            max_value=self.max_value,
            min_target=1,
            max_target=self.max_target,
            operators=tuple(self.operators),
        )
        drawn = (self._drawn(source, index, split) for index in count())
        what = f"{split} problems exist for {self.config()}: ask for fewer or raise max_value"
        return take_unique(drawn, limit, what)

    def _drawn(self, source: Any, index: int, split: str) -> tuple[str, Problem] | None:
        """A problem of this split with what tells it from others."""
        try:
            metadata = source[index]["metadata"]
        except ValueError:  # reasoning-gym found no target in range for this index
            return None
        problem = self.problem(tuple(metadata["numbers"]), metadata["target"])
        if split_of(problem.id) != split or self.hopeless(problem):
            return None
        # For training, the same numbers in another order are another problem (of the same split).
        return problem.question if split == "train" else problem.id, problem

    def hopeless(self, problem: Problem) -> bool:
        """True if the compact search cannot write a solution (reasoning-gym may pass through negative numbers)."""
        return self.style == "compact" and problem.response is None

    def problem(self, numbers: tuple[int, ...], target: int) -> Problem:
        identity = f"countdown {sorted(numbers)} {target}"
        truth = {"numbers": list(numbers), "target": target}
        if self.style == "compact":
            question = f"make {target} from {' '.join(map(str, numbers))}"
            return Problem(identity, question, truth, worked_solution(numbers, target, self.operators))
        return Problem(identity, f"Numbers: {list(numbers)}\nTarget: {target}", truth)

    def load(self, path: str) -> Iterator[Problem]:
        for place, row in read_rows(path):
            try:
                yield self.problem(tuple(int(n) for n in row["input"].split(",")), int(row["output"]))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f'{place} is not a problem like {{"input": "30,100,93", "output": "23"}}') from None

    def instruction(self, problem: Problem) -> str:
        if self.style == "compact":
            return problem.question
        return INSTRUCTION.format(operators=", ".join(self.operators), question=problem.question)

    def extract(self, completion: str) -> str:
        """The expression that a completion marks as its answer, as plain arithmetic; all of it where nothing is marked."""
        if self.extraction == "published":
            return answers.published_expression(completion)
        text = answers.cut_at_end(completion)
        marked = answers.final(text, numeric=True)
        return answers.expression(text if marked is None else marked[0])

    def grade(self, problem: Problem, completion: str) -> Grade:
        """By default exactly; ``published`` as the released code computes, within 1e-5."""
        expression, target = self.extract(completion), problem.truth["target"]
        if self.extraction == "published":
            solved = released.is_near(expression, problem.truth["numbers"], target)
        else:
            solved = self.value(problem, expression) == target
        return Grade(solved, float(solved), 1.0, expression[: answers.MAX_EXPRESSION])

    def value(self, problem: Problem, expression: str) -> Fraction | None:
        """The value of an expression that uses just the given numbers and the task's operators, else None."""
        result = answers.arithmetic(expression)
        if result is None or set(expression) & (set("+-*/") - set(self.operators)):
            return None
        return result[0] if sorted(result[1]) == sorted(problem.truth["numbers"]) else None

    def rewards(self) -> dict[str, tuple[Reward, float]]:
        return {"countdown": (self.reward, 1.0)}

    def reward(
        self, prompts: list[str], completions: list[str], problem: list[Problem], **_: Any
    ) -> list[float | None]:
        """1.0 for a right expression, 0.1 for one that uses the given numbers but misses the target, else 0."""
        values: list[float | None] = []
        for completion, p in zip(completions, problem, strict=True):
            well_formed = self.value(p, self.extract(completion)) is not None
            values.append(1.0 if self.grade(p, completion).solved else 0.1 if well_formed else 0.0)
        return values

    def released_rewards(self) -> dict[str, tuple[Reward, float]]:
        return {"countdown": (released.countdown, 1.0)}

    def completion_truth(self, row: dict[str, Any]) -> Problem:
        numbers, target = row["ground_truth"]
        if not all(type(n) is int for n in [*numbers, target]):
            raise ValueError(f"ground_truth {row['ground_truth']!r} is not [[numbers], target] in integers")
        return self.problem(tuple(numbers), target)


Term = tuple[int, str, int]  # value, expression, precedence of its top operator (1: + -, 2: * /, 3: a number)


def _results(p: Term, q: Term, operators: str) -> Iterator[Term]:
    """Every positive whole result of one operation on two terms, in a fixed order."""
    high, low = (p, q) if p[0] >= q[0] else (q, p)
    for op in "+-*/":
        if op not in operators:
            continue
        left, right = (high, low) if op in "-/" else (p, q)
        precedence = 1 if op in "+-" else 2
        a = left[1] if left[2] >= precedence else f"({left[1]})"
        b = right[1] if right[2] > precedence or (op in "+*" and right[2] == precedence) else f"({right[1]})"
        if op == "/":
            if low[0] == 0 or high[0] % low[0]:
                continue
            value = high[0] // low[0]
        else:
            value = left[0] + right[0] if op == "+" else left[0] - right[0] if op == "-" else left[0] * right[0]
        if value > 0:
            yield value, f"{a}{op}{b}", precedence


def _step(p: Term, q: Term, result: Term) -> str:
    """How the search writes one operation: ``8*3=24`` on the current values."""
    high, low = max(p[0], q[0]), min(p[0], q[0])
    if p[0] + q[0] == result[0] and result[2] == 1:
        return f"{p[0]}+{q[0]}={result[0]}"
    if high - low == result[0] and result[2] == 1:
        return f"{high}-{low}={result[0]}"
    if p[0] * q[0] == result[0]:
        return f"{p[0]}*{q[0]}={result[0]}"
    return f"{high}/{low}={result[0]}"


@cache
def _reachable(values: tuple[int, ...], target: int, operators: str) -> bool:
    return any(True for _ in _search(tuple((v, str(v), 3) for v in values), target, operators))


def _search(terms: tuple[Term, ...], target: int, operators: str) -> Iterator[tuple[list[str], str]]:
    """The written search: at most one (steps, expression), the first found in the fixed order."""
    if len(terms) == 1:
        if terms[0][0] == target:
            yield [], terms[0][1]
        return
    written: list[str] = []
    for i, j in combinations(range(len(terms)), 2):
        rest = tuple(t for k, t in enumerate(terms) if k not in (i, j))
        for result in _results(terms[i], terms[j], operators):
            step = _step(terms[i], terms[j], result)
            if len(terms) > 2:
                written.append(step)
            if _reachable(tuple(t[0] for t in (*rest, result)), target, operators):
                steps, expression = next(_search((*rest, result), target, operators))
                yield (written if len(terms) > 2 else [step]) + steps, expression
                return


def worked_solution(numbers: tuple[int, ...], target: int, operators: str) -> str | None:
    """The search and its answer in the compact style, or None if positive whole steps cannot reach the target."""
    for steps, expression in _search(tuple((n, str(n), 3) for n in numbers), target, operators):
        return f"<reasoning>{' '.join(steps)}</reasoning><answer>{expression}</answer>"
    return None
