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
MAX_ANSWER = 500  # characters of a marked answer that are searched for a number
MAX_NUMBER = 60  # characters of one number

_PLACEHOLDER = re.compile(r"(?:[\s.…]|\\[cl]?dots)*")
_EMPTY_BOX = re.compile(r"\\boxed\s*\{[\s.…]*\}")
_BARE_BOX = re.compile(r"\\boxed\s+([^\s${}\\<]+)")  # ``\boxed 5``, without braces
_SEPARATORS = (  # thousands as LaTeX writes them
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\!\s*"), ""),
    (re.compile(r"(?<=[0-9])(?:\\[,;: ]|~)\s*(?=[0-9]{3}(?![0-9]))"), ","),
)
_WRAPPERS = re.compile(
    r"\\(?:text[a-z]*|mbox|math(?:rm|bf|it)|left|right|displaystyle|quad|pounds|euro)(?![a-zA-Z])"
    r"|\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\[(),;:!\[\] ]|\*\*"
)
_VALUED = re.compile(r"\\(?:sqrt|pi|log|ln|exp|sin|cos|tan|infty|pm|binom)(?![a-zA-Z])")  # more than a number
_UNIT_POWER = re.compile(r"(?<=[a-zA-Z}])\s*\^\s*(?:\{[^{}]*\}|[0-9])")
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")
_DECIMAL = r"(?:[0-9]+(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>-\s*)?(?:(?P<whole>[0-9]+)\s+(?=[0-9]+\s*/))?(?P<value>{_DECIMAL})"
    rf"(?:\s*/\s*(?P<under>{_DECIMAL}))?"
)
_JOINED_AFTER = re.compile(  # an inequality is no number either, nor the start of 1e3, 0x1f, 3x
    r"\s*(?:[-+*/^:,]\s*[-(]*[0-9]|[<>])|[eE][-+]?[0-9]|[xX][0-9a-fA-F]|[xyz]\b"
)
_JOINED_BEFORE = re.compile(r"[0-9)]\s*[-+*/^:,][-(\s]*\Z")


def boxed(text: str) -> list[str]:
    """Contents of every closed ``\\boxed{…}``, braces balanced, in the order of their opening. One pass."""
    return [text[a:b] for a, b in _box_spans(text)]


def _box_spans(text: str) -> list[tuple[int, int]]:
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


def final(text: str) -> tuple[str, bool] | None:
    """The final answer as it is written, and whether it stands in a box; None where nothing is marked as the answer.

    The last box that is not empty and no ``...``; the last answer tags instead where they come after it, or where the box
    inside them is never closed. Tags that are never closed (a damaged or cut end) mark nothing.
    """
    text = text.replace("\\fbox", "\\boxed")
    boxes = [(a, text[a:b]) for a, b in _box_spans(text)] + [(m.start(), m[1]) for m in _BARE_BOX.finditer(text)]
    found = [(a, content, True) for a, content in boxes if not _PLACEHOLDER.fullmatch(content)]
    tags = tagged(text)
    if tags is not None:
        end = text.rfind("</answer>")
        start = text.rfind("<answer>", 0, end)
        inside = _EMPTY_BOX.sub(" ", tags).replace("\\boxed{", " ", 1)
        if not any(start < a < end for a, _, _ in found) and not _PLACEHOLDER.fullmatch(inside):
            found.append((start, inside, False))
    if not found:
        return None
    _, content, box = max(found, key=lambda f: f[0])
    return content.strip(), box


def number(text: str, last: bool = False) -> Fraction | None:
    """The number that a marked answer states, exactly; None if it states none, or several joined by operators or commas.

    Reads currency signs, thousands separators, percent signs (``60%`` is 60), units, trailing periods, LaTeX wrappers,
    fractions and mixed numbers. Of ``a = b`` the right side counts.

    Args:
        last: take the last of several numbers (prose), not the first (a number and its remarks).
    """
    text = text[-MAX_ANSWER:] if last else text[:MAX_ANSWER]
    for pattern, replacement in _SEPARATORS:
        text = pattern.sub(replacement, text)
    text = plain_operators(text).replace("\\approx", "=").replace("≈", "=")
    text = _FRACTION.sub(r" \1\2/\3\4 ", _UNIT_POWER.sub("", _WRAPPERS.sub(" ", text)))
    for side in reversed(re.sub(r"\\?[$€£¥%]|[{}]", " ", text).split("=")):
        numbers = list(_NUMBER.finditer(side))
        if numbers:
            return None if _VALUED.search(side) else _value(side, numbers[-1 if last else 0])
    return None


def _value(side: str, match: re.Match[str]) -> Fraction | None:
    before = side[: match.start()] + ("-" if match["sign"] else "")
    if _JOINED_BEFORE.search(before) or _JOINED_AFTER.match(side, match.end()) or len(match[0]) > MAX_NUMBER:
        return None
    value, under = (Fraction(part.replace(",", "")) for part in (match["value"], match["under"] or "1"))
    if under == 0:
        return None
    total = value / under + Fraction(match["whole"] or 0)
    return -total if match["sign"] else total


def published_number(text: str) -> float | None:
    """The released evaluation's reading of a number: the first box that holds one, else the first answer tags.

    A box counts as a whole or by its first number, tags by their last; thousands separators are not read.
    """
    text = text[:MAX_COMPLETION]
    position = 0
    while (start := text.find("\\boxed{", position)) >= 0 and (end := text.find("}", start)) >= 0:
        position = start + len("\\boxed{")
        if text.find("\n", start, end) < 0:
            found = _published_value(text[position:end].strip(), 0)
            position = end + 1
            if found is not None:
                return found
    tags = _first_tags(text)
    return None if tags is None else _published_value(tags, -1)


def _published_value(text: str, which: int) -> float | None:
    try:
        return float(text)
    except ValueError:
        numbers = re.findall(r"-?\d+\.?\d*", text)
        return float(numbers[which]) if numbers else None


def published_latex(text: str) -> str | None:
    """The released evaluation's reading of a formula: the last box; the first answer tags only where that box stays open."""
    text = text[:MAX_COMPLETION]
    if "\\boxed " in text:
        return text.rsplit("\\boxed ", 1)[1].split("$")[0]
    start = text.rfind("\\boxed" if "\\boxed" in text else "\\fbox")
    if start < 0:
        return None  # the released code compares the whole completion here, which equals no answer
    depth = 0
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            content = text[start : start + brace.end()]
            if content.startswith("\\boxed{"):
                content = content[len("\\boxed{") : -1]
            return content or _first_tags(text)
    return _first_tags(text)


def _first_tags(text: str) -> str | None:
    start = text.find("<answer>")
    end = text.find("</answer>", start)
    return text[start + len("<answer>") : end].strip() if 0 <= start < end else None


def same_latex(left: str, right: str) -> bool:
    """Equality after the field's usual normalisation of LaTeX; as written where that does not apply to one of them."""
    a, b = _normal(left), _normal(right)
    return left == right if a is None or b is None else a == b


def _normal(text: str) -> str | None:
    """Spaces, ``\\left``, degrees, currency, percent and units gone; one way of writing fractions and roots.

    None for more than one unit or a quotient that is not one of integers.
    """
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = re.sub(r"[dt]frac", "frac", text)
    text = re.sub(r"\\left|\\right|\^\{\\circ\}|\^\\circ|\\\$|\\%", "", text)
    if text.count("\\text{ ") > 1:
        return None
    text = text.split("\\text{ ")[0]
    text = re.sub(r"(^|[ {])\.", r"\g<1>0.", text)
    name, equals, value = text.partition("=")
    if equals and "=" not in value and len(name) <= 2:
        text = value
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(
        r"\\frac([^{])(?:([^{])|(?=\{))", lambda m: f"\\frac{{{m[1]}}}" + (f"{{{m[2]}}}" if m[2] else ""), text
    )
    if text == "0.5":
        return "\\frac{1}{2}"
    if text.count("/") == 1:
        quotient = re.fullmatch(r"(-?[0-9]+)/(-?[0-9]+)", text)
        return f"\\frac{{{quotient[1]}}}{{{quotient[2]}}}" if quotient else None
    return text
