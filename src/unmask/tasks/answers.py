"""Finding and checking answers in model text. Nothing here executes that text or raises on it."""

from __future__ import annotations

import ast
import re
from fractions import Fraction

_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_LATEX_OPERATORS = {"\\div": "/", "\\times": "*", "\\cdot": "*", "\u00d7": "*", "\u00f7": "/", "\u2212": "-"}
_END_TOKENS = re.compile(r"<\|eot_id\|>|<\|endoftext\|>|<\|im_end\|>")
MAX_EXPRESSION = 200  # characters; longer text is no answer to a Countdown problem


def boxed(text: str, last: bool = True) -> list[str]:
    """Contents of every ``\\boxed{…}``, braces balanced, in order. An unclosed box is not one."""
    found = []
    for match in re.finditer(r"\\boxed\s*\{", text):
        depth, start = 1, match.end()
        for i in range(start, min(len(text), start + 10_000)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                found.append(text[start:i])
                break
    return found


def tagged(text: str) -> str | None:
    """The text of the last ``<answer>…</answer>``, or None."""
    found = _TAGS.findall(text)
    return found[-1] if found else None


def cut_at_end(text: str) -> str:
    """The text before its first end-of-turn or end-of-text token, if such tokens are still spelled out in it."""
    return _END_TOKENS.split(text, maxsplit=1)[0]


def to_expression(text: str) -> str:
    """LaTeX and typographic operators to Python's, a leading or trailing ``= number`` side dropped."""
    for latex, operator in _LATEX_OPERATORS.items():
        text = text.replace(latex, operator)
    return text.split("=", 1)[0].strip() if "=" in text else text.strip()


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
