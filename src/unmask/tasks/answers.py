"""Finding and checking answers in model text. Nothing here executes that text or raises on it."""

from __future__ import annotations

import ast
import re
from fractions import Fraction

_BRACES = re.compile(r"\\boxed\s*\{|\{|\}")
_LATEX_OPERATORS = {"\\div": "/", "\\times": "*", "\\cdot": "*", "\u00d7": "*", "\u00f7": "/", "\u2212": "-"}
_END_TOKENS = re.compile(r"<\|eot_id\|>|<\|endoftext\|>|<\|im_end\|>")
MAX_COMPLETION = 20_000  # characters read; no canvas is longer
MAX_EXPRESSION = 200  # characters; longer text is no answer to a Countdown problem


def boxed(text: str) -> list[str]:
    """Contents of every closed ``\\boxed{…}``, braces balanced, in the order of their opening. One pass."""
    spans: list[tuple[int, int]] = []
    opened: list[int | None] = []  # where the content of a box starts; None for a plain brace
    for match in _BRACES.finditer(text):
        if match[0] != "}":
            opened.append(None if match[0] == "{" else match.end())
        elif opened and (start := opened.pop()) is not None:
            spans.append((start, match.start()))
    return [text[a:b] for a, b in sorted(spans)]


def tagged(text: str) -> str | None:
    """The text of the last ``<answer>…</answer>``, or None."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end] if start >= 0 else None


def cut_at_end(text: str) -> str:
    """The text before its first end-of-turn or end-of-text token, if such tokens are spelled out in it; bounded."""
    return _END_TOKENS.split(text[:MAX_COMPLETION], maxsplit=1)[0]


def plain_operators(text: str) -> str:
    """LaTeX and typographic operators as Python's."""
    for latex, operator in _LATEX_OPERATORS.items():
        text = text.replace(latex, operator)
    return text


def arithmetic(expression: str) -> tuple[Fraction, list[int]] | None:
    """Value and integer literals of ``+ - * / ( )`` over decimal integers, exactly; None for anything else.

    Bounded: at most 200 characters, ASCII only, integers of at most 9 digits, no powers, no names, no calls.
    """
    if len(expression) > MAX_EXPRESSION or not re.fullmatch(r"[0-9+\-*/() ]+", expression) or "**" in expression:
        return None
    if "//" in expression or re.search(r"\d{10}", expression):
        return None
    expression = re.sub(r"\b0+(\d)", r"\1", expression)  # "07" is seven, not a syntax error
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    literals: list[int] = []

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            literals.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            inner = value(node.operand)
            return -inner if isinstance(node.op, ast.USub) else inner
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Add):
                return left + right
            if isinstance(node.op, ast.Sub):
                return left - right
            if isinstance(node.op, ast.Mult):
                return left * right
            if isinstance(node.op, ast.Div):
                return left / right
        raise ValueError

    try:
        return value(tree.body), literals
    except (ValueError, ZeroDivisionError, RecursionError):
        return None
