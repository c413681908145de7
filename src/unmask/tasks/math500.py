"""MATH500: 500 competition problems of MATH (Hendrycks et al., 2021, arXiv 2103.03874) whose answer is a formula."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar

from unmask.tasks import answers
from unmask.tasks.base import Grade, Problem, Reward
from unmask.tasks.equivalence import equivalent
from unmask.tasks.worded import Worded

_MATH = re.compile(r"\$([^$]+)\$|\\\((.*?)\\\)|\\\[(.*?)\\\]", re.DOTALL)
_BASE = re.compile(r"[0-9]_\{?([0-9]+)\}?\Z")
_QUOTIENT = re.compile(
    r"\\[dtc]?frac\s*\{\s*([0-9]{1,20})\s*\}\s*\{\s*([0-9]{1,20})\s*\}"
    r"|(?<![0-9.}])([0-9]{1,20})\s*/\s*([0-9]{1,20})(?![0-9.])"
)


@dataclass(frozen=True)
class MATH500(Worded):
    name: ClassVar[str] = "math500"
    hub: ClassVar[dict[str, tuple[str, str | None]]] = {
        "train": ("ankner/math-500", None),
        "test": ("HuggingFaceH4/MATH-500", None),
    }

    def problem(self, row: dict[str, Any]) -> Problem:
        """Of ``problem`` (or ``question``) with ``answer`` (or ``ground_truth_answer``), or the last box of ``solution``."""
        solution = row.get("solution")
        answer = row.get("answer", row.get("ground_truth_answer"))
        if answer is None:
            marked = answers.final(solution or "")
            if marked is None:
                raise ValueError("no answer, and no box in the solution")
            answer = marked[0]
        return self.made(row["problem"] if "problem" in row else row["question"], str(answer), solution)

    def completion_truth(self, row: dict[str, Any]) -> Problem:
        if not isinstance(row["ground_truth"], (str, int, float)):
            raise ValueError(f"ground_truth is {row['ground_truth']!r}, not a formula")
        return self.made(row["question"], str(row["ground_truth"]), None)

    def grade(self, problem: Problem, completion: str) -> Grade:
        """By default the last marked answer, see `same`; ``published``: the last box, equal as normalised LaTeX."""
        truth = problem.truth["answer"]
        if self.extraction == "published":
            read = answers.published_latex(completion)
            solved = read is not None and answers.same_latex(read, truth)
        else:
            read = extract(completion)
            solved = read is not None and same(truth, read, problem.question)
        return Grade(solved, float(solved), 1.0, None if read is None else read[: answers.MAX_ANSWER])

    def rewards(self) -> dict[str, tuple[Reward, float]]:
        """Weight times value is the published reward: 2 for a right answer, 0.5 at most for its form."""
        return {"correct": (self.correct, 2.0), "boxed_format": (self.boxed_format, 0.5)}

    def boxed_format(self, prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        """1 for a box inside answer tags, 0.75 for tags without one, 0.5 for a box without tags, else 0.25."""
        values: list[float | None] = []
        for text in map(self.whole, completions):
            tag = answers.tagged(text)
            box = bool(answers.boxed(text if tag is None else tag))
            values.append(0.25 + 0.25 * box + 0.5 * (tag is not None))
        return values


def extract(completion: str) -> str | None:
    """The answer as written: what the box holds, or of tags without a box the last formula between dollars, if any."""
    marked = answers.final(answers.cut_at_end(completion))
    if marked is None:
        return None
    text, box = marked
    formulas = [] if box else [a or b or c for a, b, c in _MATH.findall(text[-answers.MAX_ANSWER :])]
    return (formulas[-1] if formulas else text).strip().strip("$").removesuffix(".").strip()


def same(truth: str, answer: str, question: str = "") -> bool:
    """Whether an answer means the truth and is finished: equal as LaTeX, as words, or by math-verify.

    As the problems of MATH ask, fractions of integers must be in lowest terms, and a decimal is no answer where the question
    wants a fraction. A number of another base is another number; a base left out is taken as meant.
    """
    bases = [found[1] for text in (truth, answer) if (found := _BASE.search(text.strip()))]
    if len(set(bases)) == 2 or (bases and not _BASE.search(truth.strip())):
        return False
    if truth == answer or ("\\text" not in truth + answer and answers.same_latex(truth, answer)):
        return True
    if _words(truth) == _words(answer) != "":
        return True
    return _finished(answer, "fraction" in question and "frac" in truth) and equivalent(truth, answer)


def _finished(answer: str, as_fraction: bool) -> bool:
    last = answer.rsplit("=", 1)[-1]
    pairs = [(int(a or c), int(b or d)) for a, b, c, d in _QUOTIENT.findall(last)]
    return all(gcd(a, b) == 1 != b for a, b in pairs) and not (
        as_fraction and re.search(r"[0-9]\.[0-9]|\A\.[0-9]", last)
    )


def _words(text: str) -> str:
    """Text answers without their wrapping: ``\\text{(C)}``, ``C`` and ``(c)`` alike."""
    bare = re.sub(r"\\(?:text[a-z]*|mbox|mathrm|mathbf)|[{}().\s]", "", text)
    return bare.lower() if bare.isalpha() else ""
