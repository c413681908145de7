"""MATH500: 500 competition problems of MATH (Hendrycks et al., 2021, arXiv 2103.03874) whose answer is a formula."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import gcd, isqrt
from typing import Any

from unmask.tasks import answers, released
from unmask.tasks.base import TASKS, Grade, Judge, Problem
from unmask.tasks.math.equivalence import MAX_LATEX, equivalent
from unmask.tasks.math.hub_task import HubMathTask
from unmask.tasks.notation import plain
from unmask.tasks.quantities import quantity, without_unit

_DELIMITER = re.compile(r"(?<!\\)(?:\\[()\[\]]|\${1,2})")
_CLOSES = {"$": "$", "$$": "$$", "\\(": "\\)", "\\[": "\\]"}
_JOINS = re.compile(r"[\s,;]*(?:and|or)?\s*")
_BASE = re.compile(r"(?<=[0-9])_(?:\{([0-9]+)\}|([0-9]+))\Z")
_QUOTIENT = re.compile(
    r"\\frac\s*\{\s*([0-9]{1,20})\s*\}\s*\{\s*([0-9]{1,20})\s*\}"
    r"|(?<![0-9.}])([0-9]{1,20})\s*/\s*([0-9]{1,20})(?![0-9.])"
)
_ROOT = re.compile(r"\\sqrt\s*\{\s*([0-9]{1,20})\s*\}")
_UNDONE = re.compile(
    r"[0-9]\s*!|[0-9]\s*(?:\\times|\\cdot|\\div|\*)\s*[0-9]|(?<![0-9.a-zA-Z])[0-9.]+\s*\^\s*\{?\s*[0-9]"
    r"|(?<![\w}).^{])(?<![\w}).^{]\s)[0-9]+\s*[-+]\s*[0-9]+(?![\w\\({.^!])"
)


@TASKS.register("math500")
@dataclass(frozen=True)
class MATH500(HubMathTask):
    name = "math500"
    hub_train, hub_test = ("ankner/math-500", None), ("HuggingFaceH4/MATH-500", None)

    def parse(self, row: dict[str, Any]) -> Problem:
        """Of ``problem`` (or ``question``) with ``answer`` (or ``ground_truth_answer``), or the last box of ``solution``."""
        solution, answer = row.get("solution"), row.get("answer", row.get("ground_truth_answer"))
        if answer is None and (answer := (answers.final(solution or "") or [None])[0]) is None:
            raise ValueError("no answer, and no box in the solution")
        return self.make_problem(row["problem"] if "problem" in row else row["question"], str(answer), solution)

    def completion_truth(self, row: dict[str, Any]) -> Problem:
        if not isinstance(row["ground_truth"], (str, int, float)):
            raise ValueError(f"ground_truth is {row['ground_truth']!r}, not a formula")
        return self.make_problem(row["question"], str(row["ground_truth"]))

    def grade(self, problem: Problem, completion: str) -> Grade:
        """By default the last marked answer, see `same`; ``published``: the last box, equal as normalized LaTeX."""
        truth = problem.truth["answer"]
        if self.extraction == "published":
            read: str | None = released.latex(completion)
            solved = released.same_latex(read or "", truth)
        else:
            read = extract(completion)
            solved = read is not None and same(truth, read, problem.question)
        return Grade.of(solved, None if read is None else read[: answers.MAX_ANSWER])

    def rewards(self) -> dict[str, tuple[Judge, float]]:
        """The released terms and weights, 2 for a right answer and up to 1 for its form, each judged as it is meant."""
        return {"correct": (self.reward, 2.0), "boxed_format": (self.of_text(_boxed_format), 1.0)}

    def released_rewards(self) -> dict[str, tuple[Judge, float]]:
        """The last box (all of the text where none closes) is compared; for the form no box counts: it seeks no ``\\boxed``."""

        def correct(problem: Problem, completion: str) -> float:
            text = self.full_text(completion)
            box = released.last_box(text)
            return float(released.same_latex(text if box is None else box, problem.truth["answer"]))

        form = self.of_text(lambda text: 0.75 if "<answer>" in text else 0.25)
        return {"correct": (correct, 2.0), "boxed_format": (form, 1.0)}


def _boxed_format(text: str) -> float:
    """1 for a box inside answer tags, 0.75 for tags without one, 0.5 for a box without tags, else 0.25."""
    tag = answers.tagged(text)
    return 0.25 + 0.25 * bool(answers.box_spans(text if tag is None else tag)) + 0.5 * (tag is not None)


def extract(completion: str) -> str | None:
    """The answer as written: what the box holds, or of tags without a box the last formula between dollars, if any."""
    marked = answers.final(completion)
    return marked and (marked[0] if marked[1] else _formula(marked[0])).strip().removesuffix(".").strip()


def _formula(text: str) -> str:
    """The last formula between math delimiters, with those that a comma, "and" or "or" joins to it; the text without any."""
    opened: re.Match[str] | None = None
    formulas: list[tuple[re.Match[str], re.Match[str]]] = []  # the delimiters of each
    for mark in _DELIMITER.finditer(text):
        if opened is None:
            opened = mark if mark[0] in _CLOSES else None
        elif mark[0] == _CLOSES[opened[0]]:
            formulas += [(opened, mark)] if opened.end() < mark.start() else []
            opened = None
    if not formulas or quantity(text) is not None:
        return text
    first = len(formulas) - 1
    while first and _JOINS.fullmatch(text, formulas[first - 1][1].end(), formulas[first][0].start()):
        first -= 1
    return ", ".join(text[a.end() : b.start()] for a, b in formulas[first:])


def same(truth: str, answer: str, question: str = "") -> bool:
    """Whether an answer means the truth and is finished: equal as a number, as words, as LaTeX, or by math-verify.

    As the problems of MATH ask, an answer must be finished: where the truth is a number, so is the answer (``7! \\times 2!``
    and ``\\frac{6}{3}`` are none yet), fractions of integers are in lowest terms, and a decimal is no answer where the question
    wants a fraction. A number of another base is another number; a base left out is taken as meant.
    """
    if truth == answer:
        return True
    truth, answer = plain(truth), plain(answer)
    bases = [found[1] or found[2] for text in (truth, answer) if (found := _BASE.search(text))]
    if len(set(bases)) == 2 or (bases and not _BASE.search(truth)):
        return False
    truth, answer = (_BASE.sub("", text) for text in (truth, answer))
    if len(answer) > 10 * MAX_LATEX:
        return False
    result = answer.rsplit("=", 1)[-1]
    fractions = [(int(a or c), int(b or d)) for a, b, c, d in _QUOTIENT.findall(result)]
    roots = [int(n) for n in _ROOT.findall(result)]
    if any(gcd(a, b) != 1 or b == 1 for a, b in fractions) or any(isqrt(n) ** 2 == n for n in roots):
        return False  # not reduced
    if "fraction" in question and "frac" in truth and re.search(r"[0-9]\.[0-9]|\A\.[0-9]", result):
        return False
    value, stated = quantity(truth), quantity(answer)
    if value is not None:
        percent = 100 if "%" in answer and "%" not in truth else 1
        return stated is not None and stated in (value, value * percent)
    if re.search(r"[0-9]\s+[0-9]", answer):  # neither one number nor a product
        return False
    if _words(truth) == _words(answer) != "":
        return True
    truth, answer = without_unit(truth), without_unit(answer)
    if "\\text" not in truth + answer and released.same_latex(truth, answer):
        return True
    done = _UNDONE.search(answer.rsplit("=", 1)[-1]) is None or _UNDONE.search(truth) is not None
    return done and equivalent(truth, answer)


def _words(text: str) -> str:
    """Text answers without their wrapping: ``\\text{(C)}``, ``C`` and ``(c)`` alike."""
    bare = re.sub(r"\\(?:text[a-z]*|mbox|mathrm|mathbf)|[{}().\s]", "", text)
    return bare.lower() if bare.isalpha() else ""
