"""What the released evaluation (``extraction=published``) and rewards (``reward_funcs: [released]``) read, in linear time."""

from __future__ import annotations

import re
from typing import Any

from unmask.tasks import answers
from unmask.tasks.base import Problem


def tags(text: str) -> list[str]:
    """The contents of the answer tags, read from the left: an opening tag reaches to the next closing one."""
    closed = text[: text.rfind("</answer>") + len("</answer>")]  # so that all that open, close
    return [content.strip() for content in re.findall(r"<answer>(.*?)</answer>", closed, re.DOTALL)]


def last_tags(text: str) -> str:
    """What follows the last opening tag up to a closing one, whether there are tags or not."""
    return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()


def last_box(text: str) -> str | None:
    """The content of the last box, the whole text where there is none, None where it stays open."""
    if "\\boxed " in text:
        return text.rsplit("\\boxed ", 1)[1].split("$")[0]
    start = text.rfind("\\boxed" if "\\boxed" in text else "\\fbox")
    if start < 0:
        return text
    depth = 0
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0 and brace[0] == "}":
            content = text[start : start + brace.end()]
            return content[len("\\boxed{") : -1] if content.startswith("\\boxed{") else content
    return None


def number(text: str) -> float | None:
    """GSM8K: the first box that holds a number, as a whole or by its first one, else the first answer tags by their last."""
    lines = (line[: line.rfind("}") + 1] for line in text.split("\n"))  # so that all that open, close
    values = (_value(box.strip(), 0) for line in lines for box in re.findall(r"\\boxed\{(.*?)\}", line))
    return next((value for value in values if value is not None), _value((*tags(text), "")[0], -1))


def _value(text: str, which: int) -> float | None:
    try:
        return float(text)
    except ValueError:
        numbers = re.findall(r"-?\d+\.?\d*", text)
        return float(numbers[which]) if numbers else None


def strict_format(text: str) -> float:
    """1 if each tag is alone on its line with one line of text between, and a line end closes the last."""
    return float(re.match(r"<reasoning>\n.*\n</reasoning>\n<answer>\n.*\n</answer>\n$", text) is not None)


def soft_format(text: str) -> float:
    """1 if one line of reasoning in its tags starts the text, followed by one line of answer in its tags."""
    # Of several answers on one line the first has the most text behind it, and the last may begin on the next line.
    turns = (re.match(rf"<reasoning>.*{some}</reasoning>\s*<answer>(.*)", text) for some in ("?", ""))
    return float(any(turn is not None and "</answer>" in turn[1] for turn in turns))


def integer(text: str) -> float:
    """1 if the answer tags hold digits and nothing else."""
    return float(last_tags(text).isdigit())


def tag_count(text: str) -> float:
    """A quarter for each tag that occurs once with its line ends, less 0.002 a character behind the answer, twice."""
    marks = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
    once = [text.count(mark) == 1 for mark in marks]
    behind = len(text.split("\n</answer>\n")[-1]) * once[2] + (len(text.split("\n</answer>")[-1]) - 1) * once[3]
    return 0.25 * sum(once) - 0.002 * behind


def latex(text: str) -> str:
    """MATH: the last box; the first answer tags where it is open or empty; without any box the whole completion."""
    return last_box(text) or (*tags(text), "")[0]


def same_latex(left: str, right: str) -> bool:
    """Equality after the field's usual normalization of LaTeX; as written where that does not apply to one of them."""
    a, b = _normal(left), _normal(right)
    return left == right if a is None or b is None else a == b


def _normal(text: str) -> str | None:
    """Spaces, ``\\left``, degrees, currency, percent and units gone; one way of writing fractions and roots.

    None for more than one unit, a quotient that is not one of integers, and a root or fraction of nothing.
    """
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    for gone in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$"):
        text = text.replace(gone, "")
    if text.count("\\text{ ") > 1:
        return None
    text = text.split("\\text{ ")[0].replace("\\%", "")
    text = re.sub(r"(^|[ {])\.", r"\g<1>0.", text)
    name, equals, value = text.partition("=")
    if equals and "=" not in value and len(name) <= 2:
        text = value
    if text.endswith("\\sqrt"):
        return None
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    if text.endswith("\\frac"):
        return None
    if re.search(r"\\frac[^{](?:\Z|\\frac)", text) is None:
        text = re.sub(r"\\frac([^{])(?=\{)", r"\\frac{\1}", re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", text))
    if text == "0.5":
        return "\\frac{1}{2}"
    over, slash, under = text.partition("/")
    if slash and "/" not in under:
        try:
            return f"\\frac{{{over}}}{{{under}}}" if f"{int(over)}/{int(under)}" == text else text
        except ValueError:
            return None
    return text


def expression(text: str) -> str:
    """Countdown: the last box, the tags where it stays open, or all; of its first ``expression = number`` the expression."""
    found = last_box(text)
    found = (*tags(text), text)[0] if found is None else found
    found = found.replace("\\div", "/").replace("\\times", "*").replace("\\cdot", "*")
    equation = re.search(r"(?<![0-9+\-*/() ])([0-9+\-*/() ]+)=[0-9. ]", found)
    return equation[1].strip() if equation else found


def is_solution(expression: str, truth: dict[str, Any]) -> bool:
    """Whether an expression of just the given numbers, with ``//`` and ``**`` and in floats, is within 1e-5 of the target."""
    if len(expression) > 10 * answers.MAX_EXPRESSION or not re.fullmatch(r"[\d+\-*/().\s]+", expression):
        return False
    try:
        used = sorted(map(int, re.findall(r"\d+", expression)))
        value = answers.evaluate(expression.strip(), exact=False) if used == sorted(truth["numbers"]) else None
        return value is not None and bool(abs(value - truth["target"]) < 1e-5)
    except (ValueError, OverflowError):  # numbers of hundreds of digits
        return False


def countdown(problem: Problem, completion: str) -> float:
    """1 for a right expression in closed answer tags, 0.1 for closed tags with anything else, 0 without."""
    found = tags(completion)
    return (1.0 if is_solution(found[-1], problem.truth) else 0.1) if found else 0.0


_GRIDS = (  # where a grid is looked for, in this order
    ("<answer>", r"\A<answer>.*?```([\d\s]+)```"),
    ("<answer>", r"\A<answer>(.*?)(?:<\|eot_id\|>|<\|endoftext\|>|</answer>)"),
    ("</answer>", r"\A</answer>(.*?)(?:<\|eot_id\|>|<\|endoftext\|>|$)"),
    ("", r"(\d{16})\s*</answer>"),
    ("", r"\b(\d{16})\b"),
)


def grid(text: str) -> str:
    """Sudoku: a fenced grid, the answer up to its end, what is after it, before it, or anywhere; filled with ``0`` to 16."""
    for start, pattern in _GRIDS:
        # From the first tag on only, so that hostile text costs linear time.
        found = re.search(pattern, text[text.find(start) :], re.DOTALL) if start in text else None
        if found and found[1].strip():
            return re.sub(r"\s", "", found[1]).ljust(16, "0")[:16]
    return "0" * 16


def sudoku(problem: Problem, completion: str) -> float:
    """The share of the empty cells that are right among the first 16 digits in closed answer tags."""
    digits = "".join(c for c in ("", *tags(completion))[-1] if c.isdigit()).ljust(16, "0")
    empty = [i for i, c in enumerate(problem.truth["puzzle"]) if c == "0"]
    return sum(digits[i] == problem.truth["solution"][i] for i in empty) / len(empty)
