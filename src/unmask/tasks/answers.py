"""Finding answers in model text, and arithmetic. Nothing executes that text or raises on it; time is linear in it."""

from __future__ import annotations

import ast
import operator
import re
from bisect import bisect_left
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from unmask.tasks.notation import FRACTION, operators, plain

MAX_EXPRESSION = 200  # characters; longer text is no answer to a Countdown problem
MAX_ANSWER = 500  # characters of an answer that a record keeps

_BRACES = re.compile(r"\\boxed\s*\{|\{|\}")
_END_TOKENS = re.compile(r"<\|eot_id\|>|<\|endoftext\|>|<\|im_end\|>")
_PLACEHOLDER = re.compile(  # what stands where an answer belongs: dots, or words as in ``\boxed{\text{final answer}}``
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


def tag_span(text: str) -> tuple[int, int] | None:
    """Where the content of the last ``<answer>…</answer>`` begins and ends."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return (start + len("<answer>"), end) if start >= 0 else None


def tagged(text: str) -> str | None:
    """The text of the last ``<answer>…</answer>``, or None."""
    span = tag_span(text)
    return span and text[slice(*span)]


def cut_at_end(text: str) -> str:
    """The text before its first end-of-turn or end-of-text token, if such tokens are spelled out in it."""
    return _END_TOKENS.split(text, maxsplit=1)[0]


def final(text: str, numeric: bool = False) -> tuple[str, bool] | None:
    """The answer that a completion marks, as it is written, and whether it stands in a box; None where nothing is marked.

    Of the text before its end token: the last box that is not empty, no ``...`` and no words about an answer; the last answer
    tags instead where they come after it, or where the box inside them is never closed; a last line ``#### …`` or
    ``Answer: …`` where it comes after both. Tags that are never closed mark nothing, and neither does an empty ``\\boxed``.

    Args:
        numeric: only what has a digit is an answer.
    """
    text = cut_at_end(text).replace("\\fbox", "\\boxed")
    digits = [i for i, character in enumerate(text) if character.isnumeric()] if numeric else []

    def holds_answer(a: int, b: int) -> bool:
        if numeric:
            return bisect_left(digits, a) < bisect_left(digits, b)
        return not _PLACEHOLDER.fullmatch(text, a, b)

    found: list[tuple[int, str, bool]] = []  # where it stands, what is written, whether in a box
    boxes = sorted(box_spans(text) + [m.span(1) for m in _BARE_BOX.finditer(text)], reverse=True)
    box, box_end = next((span for span in boxes if holds_answer(*span)), (-1, -1))
    if box >= 0:
        found.append((box, text[box:box_end], True))
    start, end = tag_span(text) or (-1, text.rfind("</answer>"))
    tag = start - len("<answer>")
    if start >= 0 and not tag < box < end and holds_answer(start, end):
        inside = _EMPTY_BOX.sub(" ", text[start:end]).replace("\\boxed{", " ", 1)
        if not _PLACEHOLDER.fullmatch(inside):
            found.append((tag, inside, False))
    closing = _CLOSING.search(text, max(0, len(text) - 200))
    body = closing.start() if closing else len(text)
    line = text.rfind("\n", 0, body) + 1
    marked = _LAST_LINE.fullmatch(text, line, body)
    if marked and "\\boxed" not in marked[1] and not tag < line < end and holds_answer(*marked.span(1)):
        found.append((line, marked[0], False))  # its label is dropped where the answer is read
    if not found:
        return None
    _, content, in_box = max(found, key=lambda f: f[0])  # the box, where tags begin in it
    return content.strip(), in_box


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > 10_000:
        raise OverflowError
    return base**exponent


_EXACT: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate(expression: str, exact: bool) -> Any:
    """The value of Python arithmetic, None for anything else and for what has no value.

    Args:
        exact: in fractions, with ``+ - * /`` alone; else as Python computes, also ``//`` and bounded powers.
    """
    known = _EXACT if exact else {**_EXACT, ast.FloorDiv: operator.floordiv, ast.Pow: _power}

    def value(node: ast.AST) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return Fraction(node.value) if exact else node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            inner = value(node.operand)
            return -inner if isinstance(node.op, ast.USub) else inner
        if isinstance(node, ast.BinOp) and type(node.op) in known:
            return known[type(node.op)](value(node.left), value(node.right))
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
    if len(text) <= 10 * MAX_EXPRESSION:
        for _ in range(MAX_EXPRESSION):
            text, found = FRACTION.subn(r"((\1)/(\2))", text)
            if not found:
                break
    text = re.sub(r"(?<=[0-9)])\s*[xX]\s*(?=[0-9(])", "*", re.sub(r"\s+", " ", text))
    sides = [side.strip().rstrip(" .,;") for side in text.translate(str.maketrans("[]{}", "()()")).split("=")]
    return next((side for side in sides if re.search(r"[0-9)] ?[-+*/]", side)), sides[0])
