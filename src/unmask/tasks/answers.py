"""Finding answers in model text, and arithmetic. Nothing executes that text or raises on it; time is linear in it."""

from __future__ import annotations

import ast
import operator
import re
from bisect import bisect_left
from fractions import Fraction
from typing import Any

from unmask.tasks.notation import FRACTION, operators, plain

MAX_EXPRESSION = 200  # characters; longer text is no answer to a Countdown problem
MAX_ANSWER = 500  # characters of an answer that a record keeps

_BRACES = re.compile(r"\\boxed\s*\{|\{|\}")
_END_TOKENS = re.compile(r"<\|eot_id\|>|<\|endoftext\|>|<\|im_end\|>")
_PLACEHOLDER = re.compile(  # what is written in place of an answer: dots, or words as in ``\boxed{\text{final answer}}``
    r"(?:[\s.…?_{}]|\\[cl]?dots|\\(?:text[a-z]*|mbox|mathrm)|(?:your|the|final|answer|here|result|in|form|goes)\b)*",
    re.IGNORECASE,
)
_EMPTY_BOX = re.compile(r"\\boxed\s*\{[\s.…]*\}")
_BARE_BOX = re.compile(r"\\boxed\s+(-?[0-9.][^\s${}\\<]*|[a-zA-Z](?=\$))")  # ``\boxed 5``, but no mention of ``\boxed``
_LAST_LINE = re.compile(
    r"(?:#{4}[ \t]+(?![a-zA-Z]{2}|[0-9]+[.)]\s)|[#*_ \t]*(?:final[ \t]+)?answer[*_ \t]*[:=][*_ \t]*)(?=\S)(.*)",
    re.IGNORECASE,
)
_CLOSING = re.compile(r"(?:\s|</(?:reasoning|answer)>)+\Z")


def box_spans(text: str) -> list[tuple[int, int]]:
    """Where the contents of the closed boxes begin and end, braces balanced, in the order of their opening."""
    spans: list[tuple[int, int]] = []
    opened: list[int | None] = []  # where the content of a box starts; None for a plain brace
    for match in _BRACES.finditer(text):
        if match[0] != "}":
            opened.append(None if match[0] == "{" else match.end())
        elif opened and (start := opened.pop()) is not None:
            spans.append((start, match.start()))
    return sorted(spans)


def tagged(text: str) -> str | None:
    """The text of the last ``<answer>…</answer>``, or None."""
    _, tag, content = text.rpartition("</answer>")[0].rpartition("<answer>")
    return content if tag else None


def cut_at_end(text: str) -> str:
    """The text before its first end-of-turn or end-of-text token, if such tokens are spelled out in it."""
    return _END_TOKENS.split(text, maxsplit=1)[0]


def final(text: str, numeric: bool = False) -> tuple[str, bool] | None:
    """The answer that a completion marks, as it is written, and whether it is in a box; None where nothing is marked.

    Of the text before its end token: the last box that is not empty, no ``...`` and no words about an answer; the last answer
    tags instead where they come after it, or where the box inside them is never closed; a last line ``#### …`` or
    ``Answer: …`` where it comes after both. ``numeric``: only what has a digit is an answer.
    """
    text = cut_at_end(text).replace("\\fbox", "\\boxed")
    digits = [i for i, character in enumerate(text) if character.isnumeric()] if numeric else []

    def holds_answer(a: int, b: int) -> bool:
        return bisect_left(digits, a) < bisect_left(digits, b) if numeric else not _PLACEHOLDER.fullmatch(text, a, b)

    found: list[tuple[int, bool, str]] = []  # where it begins, whether it is in a box, what is written
    spans = box_spans(text) + [bare.span(1) for bare in _BARE_BOX.finditer(text)]
    box, box_end = max((span for span in spans if holds_answer(*span)), default=(-1, -1))
    if box >= 0:
        found.append((box, True, text[box:box_end]))
    end = text.rfind("</answer>")
    tag = text.rfind("<answer>", 0, max(end, 0))
    start = tag + len("<answer>")
    if tag >= 0 and not tag < box < end and holds_answer(start, end):
        inside = _EMPTY_BOX.sub(" ", text[start:end]).replace("\\boxed{", " ", 1)
        if not _PLACEHOLDER.fullmatch(inside):
            found.append((tag, False, inside))
    closing = _CLOSING.search(text, max(0, len(text) - 200))
    body = closing.start() if closing else len(text)
    line = text.rfind("\n", 0, body) + 1
    marked = _LAST_LINE.fullmatch(text, line, body)
    if marked and "\\boxed" not in marked[1] and not tag < line < end and holds_answer(*marked.span(1)):
        found.append((line, False, marked[0]))  # its label is dropped where the answer is read
    if not found:
        return None
    _, in_box, written = max(found)  # the box, where tags begin it
    return written.strip(), in_box


_EXACT = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def evaluate(expression: str, exact: bool) -> Any:
    """The value of Python arithmetic, None for anything else and for what has no value.

    ``exact``: in fractions, with ``+ - * /`` alone; else as Python computes, also ``//`` and bounded powers.
    """
    known: dict[Any, Any] = _EXACT if exact else {**_EXACT, ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow}

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=int() | float() as number):
                return Fraction(number) if exact else number
            case ast.UnaryOp(ast.UAdd() | ast.USub() as sign, operand):
                return -value(operand) if isinstance(sign, ast.USub) else value(operand)
            case ast.BinOp(left, op, right) if type(op) in known:
                a, b = value(left), value(right)
                if (
                    isinstance(op, ast.Pow)
                    and isinstance(a, int)
                    and isinstance(b, int)
                    and a.bit_length() * abs(b) > 10_000
                ):
                    raise OverflowError
                return known[type(op)](a, b)
        raise ValueError

    try:
        return value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return None


def arithmetic(expression: str) -> tuple[Fraction, list[int]] | None:
    """Value and integer literals of ``+ - * / ( )`` over decimal integers, exactly; None for anything else.

    Bounded: at most 200 characters, ASCII only, integers of at most 9 digits, no powers, no names, no calls.
    """
    if not re.fullmatch(rf"[0-9+\-*/() ]{{1,{MAX_EXPRESSION}}}", expression) or re.search("[0-9]{10}", expression):
        return None
    expression = re.sub(r"\b0+([0-9])", r"\1", expression.strip())  # "07" is seven, not a syntax error
    value = evaluate(expression, exact=True)
    return None if value is None else (value, [int(n) for n in re.findall("[0-9]+", expression)])


def expression(text: str) -> str:
    """A marked answer as Python arithmetic, LaTeX made plain; of ``a = b`` the side with an operator."""
    text = operators(plain(text))
    while len(text) <= 10 * MAX_EXPRESSION and FRACTION.search(text):
        text = FRACTION.sub(r"((\1)/(\2))", text)
    text = re.sub(r"(?<=[0-9)])\s*[xX]\s*(?=[0-9(])", "*", re.sub(r"\s+", " ", text))
    sides = [side.strip().rstrip(" .,;") for side in text.translate(str.maketrans("[]{}", "()()")).split("=")]
    return next((side for side in sides if re.search(r"[0-9)] ?[-+*/]", side)), sides[0])
