"""The number that an answer states, exactly. Nothing raises on model text; time is linear in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

from unmask.tasks.notation import FRACTION, operators, plain

MAX_NUMBER = 60  # characters of one number
MAX_SUFFIX = 500  # characters at the end of a formula among which a unit is looked for

_WRAPPERS = re.compile(r"\\(?:text|mbox|math(?:rm|bf|it))(?![a-zA-Z])|[%{}]")
_VALUED = re.compile(r"\\(?:sqrt|pi|log|ln|exp|sin|cos|tan|infty|pm|binom)(?![a-zA-Z])")  # more than a number
_UNIT_POWER = re.compile(r"(?<=[a-zA-Z}])\s*\^\s*(?:\{[^{}]*\}|[0-9])")
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
_PART = re.compile(  # what is between two numbers that are parts of one answer, or two answers
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


def number(text: str, last: bool = False) -> Fraction | None:
    """The number that a marked answer states, exactly; None if it states none, or several (a sum, a list, a range, parts).

    Reads thousands separators, scales (``2 million``), percent signs (``60%`` is 60), units, fractions, mixed numbers, powers
    of ten. Of ``a = b`` the right side counts. ``last``: of several numbers the last (prose), not the first (with remarks).
    """
    for side, numbers in _sides(text):
        if numbers:
            return None if _VALUED.search(side) else _value(side, numbers, len(numbers) - 1 if last else 0)
    return None


def quantity(text: str) -> Fraction | None:
    """The number that is all that an answer states, perhaps with its name (``x = 5``) and a unit; else None."""
    text = _TEXT.sub(lambda m: " unit " if _REMARK.fullmatch(" " + m[1]) else f" {m[1]} ", text)
    if "\\approx" in text or (text.count("=") > 1 and re.search(r"[,;]|\band\b", text)):
        return None
    left = text.rpartition("=")[0]
    if re.search(r"(?<![\\a-zA-Z])[a-zA-Z]", left) and re.search(r"[-+*/^!]|[0-9]\s*[a-zA-Z]|\\frac", left):
        return None  # an equation, no name of the number
    side, numbers = next(_sides(text))
    if len(numbers) != 1 or _VALUED.search(side) or (numbers[0]["scale"] or "").strip() in _SUFFIXES:
        return None
    start, end = numbers[0].span()
    alone = re.fullmatch(r"[\s(\\+]*", side[:start]) and _REMARK.fullmatch(side, end) and len(side[end:].split()) <= 6
    return _value(side, numbers, 0) if alone else None


def _sides(text: str) -> Iterator[tuple[str, list[re.Match[str]]]]:
    """The sides of the equations in an answer, the last one first, with the numbers in each."""
    text = _UNIT_POWER.sub("", operators(plain(text)).replace("\\approx", "="))
    # a/b, apart from a whole number before it (2\frac{1}{2}) but not from its sign.
    text = re.sub(f"(-?){FRACTION.pattern}", lambda m: f"{m[1] or ' '}{m[2]}/{m[3]} ", text)
    for side in reversed(_WRAPPERS.sub(" ", text).split("=")):
        yield side, list(_NUMBER.finditer(side))


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
    unit = _LAST_UNIT.search(text, max(0, len(text) - MAX_SUFFIX))
    return text[: unit.start()].strip() if unit and unit.start() else text
