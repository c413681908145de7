"""One way of writing for all graders: typography, Markdown and LaTeX style out of an answer. Takes linear time."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_SYMBOLS = dict(zip("−∗∕⁄’‘“”", "-*//''\"\"", strict=True)) | {"\ufe0f": "", "°": r"^\circ "}
_COMMANDS = "times ×✕✖, cdot ·⋅∙, div ÷, pi π, infty ∞, pm ±, approx ≈, leq ≤, geq ≥, neq ≠, in ∈, cup ∪, cap ∩"
_SYMBOLS |= {sign: rf"\{command} " for command, signs in map(str.split, _COMMANDS.split(",")) for sign in signs}


@lru_cache(maxsize=4096)
def _ascii(character: str) -> str:
    """A look-alike of ASCII (full-width, bold, every dash and space) as ASCII, a fraction as LaTeX; else as it is."""
    kind, *codes = unicodedata.decomposition(character).split() or [""]
    category = unicodedata.category(character)
    if category in ("Pd", "Zs", "So", "Cf"):
        return {"Pd": "-", "Cf": ""}.get(category, " ")
    if kind == "<fraction>":
        return "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", character).split("⁄"))
    plain_kinds = ("<wide>", "<narrow>", "<font>", "<compat>", "<square>")
    return "".join(chr(int(code, 16)) for code in codes) if kind in plain_kinds else character


_RAISED = re.compile("[⁰¹²³⁴-⁹⁺⁻ⁿ]+")
_FRACTIONS = re.compile("[¼-¾⅐-⅞]{2,}")  # no number, and each would become eleven characters
_LOWERED = re.compile("[₀-₉]+")
_ROOT = re.compile(r"(?:√|(?<![\\a-zA-Z])sqrt)\s*(?:\(([^()]*)\)|\{([^{}]*)\}|([0-9]+(?:\.[0-9]+)?|[a-z](?![a-z])))")

_RULES = (  # Markdown, then LaTeX
    (re.compile(r"```[a-z]*[ \t]*(?=\n)|`"), ""),
    (re.compile(r"(?m)^[ \t]*#{1,6}[ \t]+"), ""),
    (re.compile(r"</?(?:b|i|u|em|strong|mark|code|span)>", re.IGNORECASE), ""),
    (re.compile(r"<br\s?/?>", re.IGNORECASE), " "),
    (re.compile(r"(?<![\w)}*\\])(\*{2,3})(?=[^\s*])((?:[^*\n]|\*(?!\*))+)\1(?![\w({*\\])"), r"\2"),
    (re.compile(r"(?<![\w)}*\\])\*(?=[^\s*])([^*\n]+)\*(?![\w({*\\])"), r"\1"),
    (re.compile(r"(?<![\w}\\])(_{1,2})(?=[^\s_])([^_\n]+)\1(?!\w)"), r"\2"),
    (re.compile(r"\\(?:text)?color\s*\{[^{}]*\}"), ""),
    (re.compile(r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle)(?![a-zA-Z])\.?"), ""),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\{\s*(?:,|\\,)\s*\}"), ","),
    (re.compile(r"\\!\s*"), ""),
    (re.compile(r",\\[,;: ]\s*(?=[0-9]{3}(?![0-9]))"), ","),
    (re.compile(r"(?<!\\)\\(?:[,;:> ]|(?:quad|qquad|thinspace)(?![a-zA-Z]))|~"), " "),
    (re.compile(r"(?<=-)(?:\\?\$|[€£¥₹₩])\s*"), ""),
    (re.compile(r"(?<!\\)\\[()\[\]]|(?:\b(?:US|AU?|CA?|NZ))?\\?\$|[€£¥₹₩]"), " "),
    (re.compile(r"\\(?:pounds|euro|texteuro|textdollar|textsterling|yen)(?![a-zA-Z])(?:\{\})?"), " "),
    (re.compile(r"(?<![a-zA-Z])(?:USD|EUR|GBP|INR|Rs\.?)(?=\s*[0-9])"), " "),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])"), " "),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\*\*\s*(-?[0-9]+|[a-zA-Z](?![a-zA-Z])|\([^()]*\))"), r"^{\1}"),
    (re.compile(r"(?<![\\a-zA-Z])pi(?![a-zA-Z])"), r"\\pi"),
)
_STYLE = re.compile(r"\\(text[a-z]*|mbox|math(?:rm|bf|it|sf|tt|normal)|boldsymbol|bm|emph|underline)\s*\{([^{}]*)\}")
FRACTION = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")
_THOUSANDS = re.compile(
    r"(?<![\w.,'])(?<![0-9] )[0-9]{1,3}(?:(?: [0-9]{3})+|(?:'[0-9]{3})+|(?:\\?_[0-9]{3})+)(?![0-9'_]|\s*/|\s[0-9])"
)
_LABEL = re.compile(
    r"\A(?:\W*(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+)?(?:answer|result|solution|expression)\s*"
    r"(?:is\s*:?|[:=\n])\s*(?=\S))+",
    re.IGNORECASE,
)


def plain(text: str) -> str:
    """An answer as plain LaTeX: ASCII signs, digits without gaps (``70 000`` is ``70000``, but ``5 6`` stays two numbers).

    Dropped are Markdown, font and size commands, currencies, degrees, a label (``Answer:``), and full stops around.
    ``2½`` becomes ``2\\frac{1}{2}``, ``x**2`` and ``x²`` become ``x^{2}``, ``sqrt(2)`` and ``pi`` commands.
    """
    text = _ROOT.sub(lambda m: f"\\sqrt{{{m[1] or m[2] or m[3] or ''}}}", text)
    if not text.isascii():
        text = _FRACTIONS.sub("?", text)
        text = _RAISED.sub(lambda m: f"^{{{unicodedata.normalize('NFKC', m[0])}}}", text)
        text = _LOWERED.sub(lambda m: f"_{{{unicodedata.normalize('NFKC', m[0])}}}", text)
        text = re.sub(r"[^\x00-\x7f]", lambda m: _SYMBOLS[m[0]] if m[0] in _SYMBOLS else _ascii(m[0]), text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = _STYLE.sub(_unstyled, text)
    text = _SHORT_FRACTION.sub(lambda m: f"\\frac{{{m[1] or m[2] or ''}}}{{{m[3] or m[4] or ''}}}", text)
    text = _THOUSANDS.sub(lambda m: re.sub("[^0-9]", "", m[0]), text)
    return _LABEL.sub("", text).lstrip(' \t\n\r,;:"').rstrip(' \t\n\r.,;:"')


def _unstyled(match: re.Match[str]) -> str:
    """The content of a font command; words (units, choices) stay marked as text."""
    command, content = match.groups()
    if not re.search("[a-zA-Z]", content):
        return content
    letter = len(content.strip()) == 1 and not command.startswith(("text", "mbox", "emph", "underline"))
    return content if letter or "\\" in content else f"\\text{{{content}}}"


def operators(text: str) -> str:
    """LaTeX operators as Python's."""
    return re.sub(r"\\(?:times|cdot|ast)(?![a-zA-Z])", "*", re.sub(r"\\div(?![a-zA-Z])", "/", text))
