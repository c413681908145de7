"""Any reasoning-gym data set as a task: ``reasoning_gym:leg_counting,max_animals=4``, graded by its own verifier.

A problem's question fixes its split. Data sets whose verifier evaluates the answer as code are refused: model text is never
executed here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any, ClassVar

import reasoning_gym
from reasoning_gym.factory import DATASETS

from unmask.spec import UserError, build, unknown
from unmask.tasks import answers
from unmask.tasks.base import Grade, Problem, Reward, Task, first_different, split_of, stream_seed

INSTRUCTION = """\
{question}
Think between <reasoning> and </reasoning>, then write only the final answer between <answer> and </answer>."""

_EXECUTES = re.compile(r"\b(parse_expr|sympify|eval|exec|parse_latex)\s*\(")


def executes_text(name: str) -> bool:
    """True if the data set's verifier passes an answer to something that evaluates code (sympy's parser among them)."""
    return bool(_EXECUTES.search(inspect.getsource(DATASETS[name][0].score_answer)))


@cache
def _source(name: str, options: tuple[tuple[str, str], ...], seed: int) -> Any:
    config = build(
        DATASETS[name][1], {**dict(options), "seed": stream_seed(seed), "size": 2**31}, f"task 'reasoning_gym:{name}'"
    )
    try:
        return reasoning_gym.create_dataset(name, **vars(config))
    except AssertionError as error:
        raise UserError(f"reasoning_gym:{name} refuses its parameters: {error}") from None


@dataclass(frozen=True)
class ReasoningGym(Task):
    name: ClassVar[str] = "reasoning_gym"
    score_name: ClassVar[str] = "score"

    dataset: str = ""
    options: tuple[tuple[str, str], ...] = ()
    """Fields of the data set's own config, as (key, text)."""

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise unknown("reasoning_gym data set", self.dataset, DATASETS)
        if executes_text(self.dataset):
            hint = ": use task 'countdown' instead" if self.dataset == "countdown" else ""
            raise UserError(f"the verifier of reasoning_gym:{self.dataset} would execute model text{hint}")
        if self.style != "paper" or self.extraction != "default":
            raise UserError(f"reasoning_gym:{self.dataset} has one style and one extraction: drop those parameters")
        _source(self.dataset, self.options, 0)

    @property
    def label(self) -> str:
        return f"{self.name}_{self.dataset}"

    def generate(self, split: str, limit: int | None, seed: int) -> list[Problem]:
        if limit is None:
            raise UserError("reasoning_gym generates problems without end: give a limit")
        source = _source(self.dataset, self.options, seed)
        drawn = (self._drawn(source[index]["question"], seed, index, split) for index in count())
        return first_different(drawn, limit, f"{split} problems of {self.dataset} found: ask for fewer")

    @staticmethod
    def _drawn(question: str, seed: int, index: int, split: str) -> tuple[str, Problem] | None:
        """A problem of this split with what tells it from others."""
        if split_of(question) != split:
            return None
        return question, Problem(f"{seed}:{index}", question, {"seed": seed, "index": index})

    def load(self, path: str) -> Iterator[Problem]:
        raise UserError(f"reasoning_gym:{self.dataset} generates its problems: drop data={path}")

    def instruction(self, problem: Problem) -> str:
        return INSTRUCTION.format(question=problem.question)

    def grade(self, problem: Problem, completion: str) -> Grade:
        text = answers.cut_at_end(completion)
        answer = (answers.tagged(text) or text).strip()
        source = _source(self.dataset, self.options, problem.truth["seed"])
        try:
            score = float(source.score_answer(answer, source[problem.truth["index"]]))
        except Exception:  # noqa: BLE001  (a verifier that is not ours met text it was not made for: the answer is wrong)
            score = 0.0
        return Grade(score >= 1.0, score, 1.0, answer)

    def rewards(self) -> dict[str, tuple[Reward, float]]:
        return {self.dataset: (self.reward, 1.0)}

    def reward(
        self, prompts: list[str], completions: list[str], problem: list[Problem], **_: Any
    ) -> list[float | None]:
        """The data set's own score, 0 to 1."""
        return [self.grade(p, c).points for p, c in zip(problem, completions, strict=True)]
