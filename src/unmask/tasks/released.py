"""What the released reward functions find in a completion, as they run (``reward: released``). Nothing is executed."""

from __future__ import annotations

import re
from typing import Any

from unmask.tasks import answers
from unmask.tasks.base import Problem


def closed_tags(text: str) -> str | None:
    """The content of the last answer tags, read from the left: an opening tag reaches to the next closing one."""
    found, end = None, 0
    while (start := text.find("<answer>", end)) >= 0 and (close := text.find("</answer>", start)) >= 0:
        found, end = text[start + len("<answer>") : close].strip(), close + len("</answer>")
    return found


def last_tags(text: str) -> str:
    """What follows the last opening tag up to a closing one, whether there are tags or not."""
    return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()


def is_near(expression: str, numbers: list[int], target: int) -> bool:
    """Whether an expression of just the given numbers comes to the target within 1e-5."""
    value = answers.released_value(expression, numbers)
    try:
        return value is not None and bool(abs(value - target) < 1e-5)
    except OverflowError:
        return False


def countdown(prompts: list[str], completions: list[str], problem: list[Problem], **_: Any) -> list[float | None]:
    """1 for a right expression in closed answer tags, 0.1 for closed tags with anything else, 0 without."""
    values: list[float | None] = []
    for completion, p in zip(completions, problem, strict=True):
        tags = closed_tags(completion)
        right = tags is not None and is_near(tags, p.truth["numbers"], p.truth["target"])
        values.append(1.0 if right else 0.0 if tags is None else 0.1)
    return values


def sudoku(prompts: list[str], completions: list[str], problem: list[Problem], **_: Any) -> list[float | None]:
    """The share of the empty cells that are right among the first 16 digits in closed answer tags."""
    values: list[float | None] = []
    for completion, p in zip(completions, problem, strict=True):
        digits = "".join(c for c in closed_tags(completion) or "" if c.isdigit()).ljust(16, "0")
        empty = [i for i, c in enumerate(p.truth["puzzle"]) if c == "0"]
        values.append(sum(digits[i] == p.truth["solution"][i] for i in empty) / len(empty))
    return values


def box_or_all(text: str) -> str:
    """The last box of a MATH completion; all of it where there is none, or where it stays open."""
    box = answers.released_box(text)
    return text if box is None else box


def strict_format(text: str) -> float:
    """1 if each tag stands alone on its line with one line of text between, and a line end closes the last."""
    return float(re.match(r"<reasoning>\n.*\n</reasoning>\n<answer>\n.*\n</answer>\n$", text) is not None)


def soft_format(text: str) -> float:
    """1 if one line of reasoning in its tags starts the text, followed by one line of answer in its tags."""
    if not text.startswith("<reasoning>"):
        return 0.0
    line = (text + "\n").index("\n")
    turns = [m.end() for m in re.finditer(r"</reasoning>\s*<answer>", text) if m.start() <= line - len("</reasoning>")]
    ends = {turns[0], turns[-1]} if turns else set()  # of those on one line the first has the most text behind it
    return float(any("</answer>" in text[end:].partition("\n")[0] for end in ends))


def integer(text: str) -> float:
    """1 if the answer tags hold digits and nothing else."""
    return float(last_tags(text).isdigit())


def tag_count(text: str) -> float:
    """A quarter for each tag that occurs once with its line ends, less 0.002 a character behind the answer, twice."""
    marks = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
    once = [text.count(mark) == 1 for mark in marks]
    behind = len(text.split("\n</answer>\n")[-1]) * once[2] + (len(text.split("\n</answer>")[-1]) - 1) * once[3]
    return 0.25 * sum(once) - 0.002 * behind
