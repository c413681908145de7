"""Any reasoning-gym data set as a task: ``reasoning_gym:leg_counting,max_animals=4``, graded by its own verifier.

A problem's question fixes its split. Problems are made and graded in a bounded process (``tasks/verifier.py``): model text is
never executed. Data sets whose verifier needs that, or pays for nonsense, are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from unmask.errors import UserError, unknown
from unmask.tasks import answers, bounded, verifier
from unmask.tasks.base import TASKS, Grade, Judge, Problem, Task, split_of, stream_seed

INSTRUCTION = """\
{question}
Think between <reasoning> and </reasoning>, then write only the final answer between <answer> and </answer>."""


@TASKS.register("reasoning_gym")
@dataclass(frozen=True)
class ReasoningGym(Task):
    name = "reasoning_gym"
    score_name = "score"

    dataset: str = ""
    options: tuple[tuple[str, str], ...] = ()
    """Fields of the data set's own config, as (key, text)."""

    def __post_init__(self) -> None:
        from reasoning_gym.factory import DATASETS  # slow: only where it is used

        if self.dataset not in DATASETS:
            raise unknown("reasoning_gym data set", self.dataset, DATASETS)
        if self.style != "paper" or self.extraction != "default":
            raise UserError(f"reasoning_gym:{self.dataset} has one style and one extraction: drop those parameters")
        refusal = self.ask("probe")
        if refusal is None:
            limits = f"{verifier.MAKE_SECONDS:.0f} seconds or {bounded.MEMORY >> 30} GiB"
            refusal = f"reasoning_gym:{self.dataset} takes more than {limits} to make"
        if refusal:
            raise UserError(refusal + (": use task 'countdown' instead" if self.dataset == "countdown" else ""))

    def ask(self, what: str, *more: Any) -> Any:
        """The verifier's reply about this data set, see ``verifier.prepare``; None where it has none within bounds."""
        return verifier.HELPER.ask(what, self.dataset, self.options, *more)

    @property
    def label(self) -> str:
        return f"{self.name}_{self.dataset}"

    def draw(self, seed: int) -> Iterator[Problem]:
        for index in range(verifier.SIZES.get(self.dataset, verifier.ENDLESS)):
            question = self.ask("question", stream_seed(seed), index)
            if question is None:
                fix = "choose other parameters or another seed"
                raise UserError(f"problem {index} of reasoning_gym:{self.dataset} cannot be made: {fix}")
            yield Problem(f"{seed}:{index}", question, {"seed": seed, "index": index})

    def home_split(self, problem: Problem) -> str:
        return split_of(problem.question)

    def dedup_key(self, problem: Problem, split: str) -> str:
        return problem.question

    def instruction(self, problem: Problem) -> str:
        return INSTRUCTION.format(question=problem.question)

    def grade(self, problem: Problem, completion: str) -> Grade:
        text = answers.cut_at_end(completion)
        answer = (answers.tagged(text) or text).strip()
        score = float(self.ask("score", stream_seed(problem.truth["seed"]), problem.truth["index"], answer) or 0)
        return Grade(score >= 1.0, score, 1.0, answer)

    def rewards(self) -> dict[str, tuple[Judge, float]]:
        return {self.dataset: (self.share, 1.0)}
