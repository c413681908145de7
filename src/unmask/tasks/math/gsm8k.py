"""GSM8K: grade-school word problems whose answer is a number (Cobbe et al., 2021, arXiv 2110.14168)."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from unmask.tasks import answers, released
from unmask.tasks.base import TASKS, Grade, Judge, Problem
from unmask.tasks.math.hub_task import HubMathTask
from unmask.tasks.quantities import number


@TASKS.register("gsm8k")
@dataclass(frozen=True)
class GSM8K(HubMathTask):
    name = "gsm8k"
    hub_train = hub_test = ("openai/gsm8k", "main")

    def parse(self, row: dict[str, Any]) -> Problem:
        """Of ``question`` and ``answer``, a worked solution that ends in ``#### N``."""
        steps, mark, stated = row["answer"].rpartition("####")
        if not mark:
            raise ValueError(f"the answer {row['answer'][-40:]!r} does not end in '#### number'")
        problem = self.make_problem(row["question"], _plain(stated), re.sub(r"<<[^<>]*>>", "", steps))
        return replace(problem, truth={**problem.truth, "stated": stated.strip()})

    def completion_truth(self, row: dict[str, Any]) -> Problem:
        """A null ground truth (the released files have two: the negative answers) lets no completion be right."""
        truth = row["ground_truth"]
        if not isinstance(truth, (str, int, float, type(None))):
            raise ValueError(f"ground_truth is {truth!r}, not a number")
        return self.make_problem(row["question"], "" if truth is None else _plain(str(truth)))

    def grade(self, problem: Problem, completion: str) -> Grade:
        """By default exactly, on the last marked answer; ``published`` as a float, on the first box that holds a number."""
        truth = number(problem.truth["answer"])
        if self.extraction == "published":
            read = released.number(completion)
            solved = read is not None and truth is not None and read == float(truth)
            return Grade.of(solved, None if read is None else f"{read:.12g}")
        marked = answers.final(completion, numeric=True)
        value = marked and number(marked[0], last=not marked[1])
        return Grade.of(value is not None and value == truth, None if value is None else _written(value))

    def rewards(self) -> dict[str, tuple[Judge, float]]:
        """The released terms and weights, each judged as it is meant; `released_rewards` judges as the released code runs."""
        forms = {"integer": _integer, "strict_format": _strict, "soft_format": _soft, "tags": _tag_count}
        return {"correct": (self.reward, 2.0)} | {name: (self.of_text(form), 0.5) for name, form in forms.items()}

    def released_rewards(self) -> dict[str, tuple[Judge, float]]:
        """All have weight 1 in the released code; the answer must be written as in the data set."""

        def correct(problem: Problem, completion: str) -> float:
            stated = problem.truth.get("stated", problem.truth["answer"])
            return float(released.last_tags(self.full_text(completion)) == stated)

        forms = (released.strict_format, released.soft_format, released.integer, released.tag_count)
        return {"correct": (correct, 2.0)} | {form.__name__: (self.of_text(form), 0.5) for form in forms}


def _plain(text: str) -> str:
    """A truth as digits without separators; ValueError if it is no number."""
    value = number(text)
    if value is None:
        raise ValueError(f"{text.strip()!r} is not a number")
    return _written(value)


def _written(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else format(float(value), ".12g")


def _integer(text: str) -> float:
    """1 if the answer tags hold an integer and nothing else."""
    return float(re.fullmatch(r"-?[0-9]+", (answers.tagged(text) or "").strip()) is not None)


def _strict(text: str) -> float:
    """1 if each tag is alone on its line, in order, with nothing before and no more than a line end after."""
    reasoning, _, answer = text.partition("\n</reasoning>\n<answer>\n")
    return float(reasoning.startswith("<reasoning>\n") and answer.endswith(("\n</answer>", "\n</answer>\n")))


def _soft(text: str) -> float:
    """1 if the text starts with reasoning tags, followed by answer tags."""
    before = text.rpartition("</answer>")[0]
    return float(re.match(r"<reasoning>.*?</reasoning>\s*<answer>", before, re.DOTALL) is not None)


def _tag_count(text: str) -> float:
    """A quarter for each of the four tags that occurs once, alone on its line, less 0.002 a character behind the last."""
    tags, lines = ("<reasoning>", "</reasoning>", "<answer>", "</answer>"), text.split("\n")
    alone = [tag for tag in tags if text.count(tag) == 1 and tag in (lines if tag == "</answer>" else lines[:-1])]
    behind = text.partition("</answer>")[2].removeprefix("\n") if "</answer>" in alone else ""
    return 0.25 * len(alone) - 0.002 * len(behind)
