"""Finding and checking answers in model text. Nothing here executes that text or raises on it; time is linear in it."""

from __future__ import annotations

import ast
import operator
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Any

from unmask.tasks.notation import operators, plain

_BRACES = re.compile(r"\\boxed\s*\{|\{|\}")
_END_TOKENS = re.compile(r"<\|eot_id\|>|<\|endoftext\|>|<\|im_end\|>")
MAX_EXPRESSION = 200  # characters; longer text is no answer to a Countdown problem
MAX_ANSWER = 500  # characters of an answer that a record keeps
MAX_NUMBER = 60  # characters of one number

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
_WRAPPERS = re.compile(r"\\(?:text|mbox|math(?:rm|bf|it))(?![a-zA-Z])|[%{}]")
_VALUED = re.compile(r"\\(?:sqrt|pi|log|ln|exp|sin|cos|tan|infty|pm|binom)(?![a-zA-Z])")  # more than a number
_UNIT_POWER = re.compile(r"(?<=[a-zA-Z}])\s*\^\s*(?:\{[^{}]*\}|[0-9])")
_FRACTION = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_DECIMAL = r"(?:[0-9]+(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SUFFIXES = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "bn": 10**9}
_NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>-\s*|(?:minus|negative)\s+)?(?:(?P<whole>[0-9]+)\s+(?:and\s+)?(?=[0-9]+\s*/))?"
    rf"(?P<value>{_DECIMAL})(?:\s*/\s*(?P<under>{_DECIMAL}))?"
    r"(?:[eE](?P<power>[-+]?[0-9]{1,3})(?!\w)|\s*[*x]\s*10\s*\^\s*(?P<ten>-?\s*[0-9]{1,3})(?![\w.]))?"
    rf"(?P<scale>(?:\s*(?:{'|'.join(_SCALES)})s?(?![a-zA-Z]))+|(?:[kKMB]|bn)(?![a-zA-Z]))?"
)
_JOINED_AFTER = re.compile(  # neither an inequality nor the start of 3x, 0x1f, 2:30, 2(3), 5 squared, 3 tenths is a number
    r"[)\]\s]*(?:[-+*/^:,]\s*[-+($\[]*[.0-9]|[<>])|[eE][-+]?[0-9]|[xX][0-9a-fA-F]|[xyz](?![a-zA-Z])|\)*\([-(]*[0-9]|\.[0-9]"
    r"|\s*-?\s*(?:squared|cubed|factorial|(?:ten|hundred|thousand|million|billion)ths?)(?![a-zA-Z])"
)
_JOINED_BEFORE = re.compile(r"[0-9)](?:\s*[-+*/^:,][-+(\s]*|\([-(]*)\Z")
_UNIT = (
    r"(?:square|cubic|sq|cu|units?|[cmk]?m|inch(?:es)?|in|feet|foot|ft|yards?|yd|miles?|mi|(?:centi|milli|kilo)?met(?:er|re)s?|"
    r"degrees?|deg|radians?|rad|dollars?|cents?|hours?|hrs?|minutes?|mins?|seconds?|secs?|days?|weeks?|months?|years?|"
    r"percent|lit(?:er|re)s?|[km]?g|(?:kilo)?grams?|pounds?|lbs?|ounces?|oz|gallons?|quarts?|pints?|cups?|mph|[sLh])"
)
_PART = re.compile(  # what stands between two numbers that are parts of one answer, or two answers
    rf"\s*(?:{_UNIT}(?![a-zA-Z])\.?\s*(?:,?\s*and(?![a-zA-Z])|,|&)?|[,;]?\s*(?:and|or|to|through|times|plus|minus|over|"
    r"divided\s+by|multiplied\s+by)(?![a-zA-Z])\s*[(]?|[)]?\s)\s*",
    re.IGNORECASE,
)
_NO_UNIT = (
    "or and to not no more less than least most over under about approximately around between except times plus minus mod "
    "base of per-cent if where when for all any each infinity infinitely many solutions solution is are was"
)
_REMARK = re.compile(
    rf"(?:[\s.,;)\\%]|(?:(?<=[0-9])(?=[a-zA-Z]{{2}})|(?<![0-9])\b)(?:{_UNIT}|per)(?![a-zA-Z])[/.]?|(?<=\s)(?!(?:{'|'.join(_NO_UNIT.split())})\b)"
    r"[a-zA-Z]{3,}\b(?!\())*",
)
_TEXT = re.compile(r"\\(?:text|mbox)\s*\{([^{}]*)\}")
_LAST_UNIT = re.compile(
    rf"(?:\s*(?:(?<![a-zA-Z\\])(?=[a-zA-Z]{{2}}){_UNIT}(?![a-zA-Z])|\\(?:text|mbox)\s*\{{(?:\s*{_UNIT}(?![a-zA-Z])\.?)+\s*\}})\.?"
    r"(?:\s*\^\s*(?:\{\s*[0-9]\s*\}|[0-9]))?)+\s*\Z"
)


def boxed(text: str) -> list[str]:
    """Contents of every closed ``\\boxed{…}``, braces balanced, in the order of their opening. One pass."""
    return [text[a:b] for a, b in box_spans(text)]


def box_spans(text: str) -> list[tuple[int, int]]:
    """Where the contents of the closed boxes begin and end, in the order of their opening."""
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
    """The text before its first end-of-turn or end-of-text token, if such tokens are spelled out in it."""
    return _END_TOKENS.split(text, maxsplit=1)[0]


_EXACT: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > 10_000:
        raise OverflowError
    return base**exponent


_PYTHON = {**_EXACT, ast.FloorDiv: operator.floordiv, ast.Pow: _power}


def _evaluated(expression: str, known: dict[type[ast.operator], Callable[[Any, Any], Any]], number: Any) -> Any:
    """The value of Python arithmetic with these operators; None for anything else and for what has no value."""

    def value(node: ast.AST) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return number(node.value)
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
    if len(expression) > MAX_EXPRESSION or not re.fullmatch(r"[0-9+\-*/() ]+", expression):
        return None
    if re.search(r"[0-9]{10}", expression):
        return None
    expression = re.sub(r"\b0+([0-9])", r"\1", expression.strip())  # "07" is seven, not a syntax error
    value = _evaluated(expression, _EXACT, Fraction)
    return None if value is None else (value, [int(n) for n in re.findall("[0-9]+", expression)])


def expression(text: str) -> str:
    """A marked answer as Python arithmetic, LaTeX made plain; of ``a = b`` the side with an operator."""
    text = operators(plain(text))
    if len(text) <= 10 * MAX_EXPRESSION:
        for _ in range(MAX_EXPRESSION):
            text, found = _FRACTION.subn(r"((\1)/(\2))", text)
            if not found:
                break
    text = re.sub(r"(?<=[0-9)])\s*[xX]\s*(?=[0-9(])", "*", re.sub(r"\s+", " ", text))
    sides = [side.strip().rstrip(" .,;") for side in text.translate(str.maketrans("[]{}", "()()")).split("=")]
    return next((side for side in sides if re.search(r"[0-9)] ?[-+*/]", side)), sides[0])


def final(text: str, numeric: bool = False) -> tuple[str, bool] | None:
    """The final answer as it is written, and whether it stands in a box; None where nothing is marked as the answer.

    The last box that is not empty, no ``...`` and no words about an answer; the last answer tags instead where they come
    after it, or where the box inside them is never closed; a last line ``#### …`` or ``Answer: …`` where it comes after both.
    Tags that are never closed (a damaged or cut end) mark nothing, and neither does a ``\\boxed`` without a content.

    Args:
        numeric: only what has a digit is an answer.
    """
    text = text.replace("\\fbox", "\\boxed")
    digits = [i for i, character in enumerate(text) if character.isnumeric()] if numeric else []

    def answers(a: int, b: int) -> bool:
        if numeric:
            place = bisect_left(digits, a)
            return place < len(digits) and digits[place] < b
        return not _PLACEHOLDER.fullmatch(text, a, b)

    spans = sorted(box_spans(text) + [m.span(1) for m in _BARE_BOX.finditer(text)], reverse=True)
    box = next((span for span in spans if answers(*span)), None)
    found = [] if box is None else [(box[0], text[box[0] : box[1]], True)]
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0 and not (box is not None and start < box[0] < end) and answers(start + len("<answer>"), end):
        inside = _EMPTY_BOX.sub(" ", text[start + len("<answer>") : end]).replace("\\boxed{", " ", 1)
        if not _PLACEHOLDER.fullmatch(inside):
            found.append((start, inside, False))
    body = len(text) if (closing := _CLOSING.search(text, max(0, len(text) - 200))) is None else closing.start()
    line = text.rfind("\n", 0, body) + 1
    marked = _LAST_LINE.fullmatch(text, line, body)
    if marked and "\\boxed" not in marked[1] and not (start < line < end) and answers(*marked.span(1)):
        found.append((line, marked[0], False))  # its label is dropped where the answer is read
    if not found:
        return None
    _, content, in_box = max(found, key=lambda f: f[0])
    return content.strip(), in_box


def number(text: str, last: bool = False) -> Fraction | None:
    """The number that a marked answer states, exactly; None if it states none, or several (a sum, a list, a range, parts).

    Reads currency signs, thousands separators, scales (``2 million``), percent signs (``60%`` is 60), units, Markdown, trailing
    periods, LaTeX wrappers, fractions, mixed numbers and powers of ten. Of ``a = b`` the right side counts.

    Args:
        last: take the last of several numbers (prose), not the first (a number and its remarks).
    """
    for side, numbers in _sides(text):
        if numbers:
            return None if _VALUED.search(side) else _value(side, numbers, len(numbers) - 1 if last else 0)
    return None


def quantity(text: str) -> Fraction | None:
    """The number that is all that an answer states, perhaps with its name (``x = 5``) and a unit; else None."""
    text = _TEXT.sub(
        lambda m: f" {m[1]} " if re.search("[0-9]", m[1]) or not _REMARK.fullmatch(" " + m[1]) else " unit ", text
    )
    if "\\approx" in text or (text.count("=") > 1 and re.search(r"[,;]|\band\b", text)):
        return None
    left = re.sub(r"\\[a-zA-Z]+", " ", text.rpartition("=")[0])
    if re.search("[a-zA-Z]", left) and re.search(r"[-+*/^!]|[0-9]\s*[a-zA-Z]|\\frac", text.rpartition("=")[0]):
        return None  # an equation, no name of the number
    side, numbers = next(_sides(text))
    if len(numbers) != 1 or _VALUED.search(side) or (numbers[0]["scale"] or "").strip() in _SUFFIXES:
        return None
    before, after = side[: numbers[0].start()], side[numbers[0].end() :]
    if (
        not re.fullmatch(r"[\s(\\+]*", before)
        or not _REMARK.fullmatch(side, numbers[0].end())
        or len(after.split()) > 6
    ):
        return None
    return _value(side, numbers, 0)


def _sides(text: str) -> Iterator[tuple[str, list[re.Match[str]]]]:
    """The sides of the equations in an answer, the last one first, with the numbers in each."""
    text = _FRACTION.sub(_slashed, _UNIT_POWER.sub("", operators(plain(text)).replace("\\approx", "=")))
    for side in reversed(_WRAPPERS.sub(" ", text).split("=")):
        yield side, list(_NUMBER.finditer(side))


def _slashed(fraction: re.Match[str]) -> str:
    """``a/b``, apart from a whole number before it (``2\\frac{1}{2}``) but not from its sign."""
    sign = fraction.string[fraction.start() - 1 : fraction.start()] == "-"
    return f"{'' if sign else ' '}{fraction[1]}/{fraction[2]} "


def _value(side: str, numbers: list[re.Match[str]], which: int) -> Fraction | None:
    match = numbers[which]
    before = side[max(0, match.start() - 200) : match.start()]
    spaced = match["sign"] and match["sign"][0] == "-" and match["sign"] != "-" and re.search(r"\w\s+\Z", before)
    joined = _JOINED_BEFORE.search(before + ("-" if match["sign"] else "")) or _JOINED_AFTER.match(side, match.end())
    beside = pairwise(numbers[max(0, which - 1) : which + 2])
    parts = any(_PART.fullmatch(side, a.end(), b.start()) for a, b in beside)
    if spaced or joined or parts or len(match[0]) > MAX_NUMBER:
        return None
    value, under = (Fraction(part.replace(",", "")) for part in (match["value"], match["under"] or "1"))
    if under == 0 or (match["whole"] and value >= under):
        return None
    total = value / under + Fraction(match["whole"] or 0)
    total *= Fraction(10) ** int((match["power"] or match["ten"] or "0").replace(" ", ""))
    for scale in re.findall("[a-zA-Z]+", match["scale"] or ""):
        total *= _SUFFIXES.get(scale) or _SCALES[scale.removesuffix("s")]
    return -total if match["sign"] else total


def without_unit(text: str) -> str:
    """A plain formula without the words behind it that are units: ``12\\pi \\text{ cm}^2``, ``3\\sqrt{2} units``."""
    unit = _LAST_UNIT.search(text, max(0, len(text) - MAX_ANSWER))
    return text[: unit.start()].strip() if unit and unit.start() else text


def published_number(text: str) -> float | None:
    """The released evaluation's reading of a number: the first box that holds one, else the first answer tags.

    A box counts as a whole or by its first number, tags by their last; thousands separators are not read.
    """
    for piece in (piece for line in text.split("\n") for piece in line.split("}")[:-1]):  # what a closing brace ends
        _, box, content = piece.partition("\\boxed{")
        if box and (found := _published_value(content.strip(), 0)) is not None:
            return found
    tags = _first_tags(text)
    return None if tags is None else _published_value(tags, -1)


def _published_value(text: str, which: int) -> float | None:
    try:
        return float(text)
    except ValueError:
        numbers = re.findall(r"-?\d+\.?\d*", text)
        return float(numbers[which]) if numbers else None


def published_latex(text: str) -> str:
    """The released evaluation's reading of a formula: the last box; the first answer tags where that box is open or empty.

    Without any box the whole completion is the answer (which is right only where nothing else was written).
    """
    return released_box(text) or _first_tags(text) or ""


def released_box(text: str) -> str | None:
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


_RELEASED_OPERATORS = {"\\div": "/", "\\times": "*", "\\cdot": "*"}
_RELEASED_EQUATION = re.compile(r"(?<![0-9+\-*/() ])([0-9+\-*/() ]+)=[0-9. ]")


def published_expression(text: str) -> str:
    """The released evaluation's reading of a Countdown answer: the last box; the answer tags where it stays open; else all.

    Of the first ``expression = number`` in it, wherever that stands, the expression.
    """
    found = released_box(text)
    if found is None:
        tags = _first_tags(text)
        found = text if tags is None else tags
    for latex, sign in _RELEASED_OPERATORS.items():
        found = found.replace(latex, sign)
    equation = _RELEASED_EQUATION.search(found)
    return equation[1].strip() if equation else found


def released_value(expression: str, numbers: list[int]) -> Any:
    """The value of an expression as the released code computes it (floats, also of ``//`` and ``**``); None where it has none.

    None too where the digits in it are not just the given numbers.
    """
    try:
        used = sorted(map(int, re.findall(r"\d+", expression)))
    except ValueError:  # of thousands of digits
        return None
    if used != sorted(numbers) or len(expression) > 10 * MAX_EXPRESSION:
        return None
    if not re.match(r"[\d+\-*/().\s]+\Z", expression):
        return None
    return _evaluated(expression.strip(), _PYTHON, lambda literal: literal)


def _first_tags(text: str) -> str | None:
    start = text.find("<answer>")
    end = text.find("</answer>", start)
    return text[start + len("<answer>") : end].strip() if 0 <= start < end else None


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
        text = re.sub(
            r"\\frac([^{])(?:([^{])|(?=\{))", lambda m: f"\\frac{{{m[1]}}}" + (f"{{{m[2]}}}" if m[2] else ""), text
        )
    if text == "0.5":
        return "\\frac{1}{2}"
    over, slash, under = text.partition("/")
    if slash and "/" not in under:
        try:
            whole = f"{int(over)}/{int(under)}" == text
        except ValueError:
            return None
        return f"\\frac{{{over}}}{{{under}}}" if whole else text
    return text
