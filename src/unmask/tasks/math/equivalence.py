"""Whether two LaTeX answers mean the same, decided by math-verify in a bounded process.

math-verify compares values as floats of 15 digits and then simplifies their difference, which may take seconds. Here values are
compared exactly where they are rational, else to a thousand digits, with numbers in place of variables. math-verify and sympy
evaluate text as Python, even the numbers of a LaTeX answer; in the worker they read numerals and names and refuse all else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate
from typing import Any

from unmask.tasks.bounded import BoundedProcess

MAX_LATEX = 300  # characters; no answer of MATH has more than 160
MAX_DEPTH = 12
MAX_DIGITS = 40
DIGITS = 1000  # to which values are compared that are not rational
WORKER = BoundedProcess(__name__)

_LIST = """frac dfrac tfrac cfrac sqrt cdot times div pm mp pi circ degree infty cup cap setminus in notin emptyset varnothing
    left right big Big bigl bigr lfloor rfloor lceil rceil langle rangle lvert rvert vert mid begin end text mbox textbf
    mathrm mathbf mathbb mathcal displaystyle quad qquad ldots dots cdots le leq ge geq lt gt ne neq approx equiv to
    sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp alpha beta gamma delta epsilon varepsilon zeta
    eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda
    Xi Sigma Phi Psi Omega overline bar hat vec prime binom"""
_COMMANDS = frozenset(_LIST.split())
_TEXT = re.compile(r"\\(?:text|mbox|textbf|mathrm|mathbf|mathbb|mathcal)\s*\{[^{}]*\}")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{([^{}]*)\}")
_TOWER = re.compile(r"\^[\s({]*[0-9.]+[\s)}]*(?:\^|!)|\^[\s({]*[0-9]{4}|[0-9]{4}[\s)}]*!|![\s)}]*!|[)}]\s*!")


def readable(text: str) -> bool:
    """Whether a LaTeX answer is short, shallow and plain enough for math-verify."""
    bare = _TEXT.sub(" ", text)
    return (
        len(text) <= MAX_LATEX
        and max(accumulate((c in "{([") - (c in "})]") for c in text), default=0) <= MAX_DEPTH
        and not re.search(rf"[0-9]{{{MAX_DIGITS}}}", text)
        and {"pmatrix", "bmatrix", "matrix"}.issuperset(_ENVIRONMENT.findall(text))
        and _COMMANDS.issuperset(re.findall(r"\\([a-zA-Z]+)", bare))
        and not _TOWER.search(bare)
        and not ("\\binom" in bare and re.search("[0-9]{3}", bare))
        and not re.search(r"d\s*[a-zA-Z\\]", re.sub(r"\\[a-zA-Z]+", r"\\", bare))  # a differential: not an answer
    )


def equivalent(truth: str, answer: str) -> bool:
    """Whether ``answer`` means the same as ``truth``; False where that cannot be told within bounds. Never raises on text."""
    return readable(truth) and readable(answer) and WORKER.ask(truth, answer) is True


def prepare() -> Callable[[str, str], bool]:
    """The worker's function of truth and answer. Changes sympy and math-verify for the whole process."""
    import logging
    from dataclasses import replace

    import math_verify
    from math_verify import grader
    from math_verify.parser import LatexExtractionConfig
    from sympy import Rational, Symbol
    from sympy.parsing import sympy_parser

    def atom(text: str, *_: Any, **__: Any) -> Any:
        if re.fullmatch(r"[0-9]+\.?|[0-9]*\.[0-9]+", text):
            return Rational(text)
        if text.isidentifier():  # sympy's own modules read names so when they are imported late
            return Symbol(text)
        raise ValueError("only numerals and names are read from text")

    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError("text is not evaluated here")

    sympy_parser.parse_expr, sympy_parser.eval_expr = atom, refuse
    logging.disable()
    simplified = grader.sympy_symbolic_eq

    def same_value(a: Any, b: Any, *_: Any) -> bool:
        same = _same_value(a, b)
        return bool(simplified(a, b) if same is None else same)

    grader.sympy_numeric_eq, grader.sympy_symbolic_eq = same_value, lambda *_: False
    plain = LatexExtractionConfig(boxed_match_priority=0)
    target = [replace(plain, normalization_config=replace(plain.normalization_config, units=False))]

    def parsed(text: str) -> list[Any]:
        return math_verify.parse(f"\\boxed{{{text}}}", target, parsing_timeout=None)

    with suppress(Exception):  # builds the tables of the parser
        math_verify.verify(parsed("\\frac{x}{2}"), parsed("0.5x"), timeout_seconds=None)

    return lambda truth, answer: bool(math_verify.verify(parsed(truth), parsed(answer), timeout_seconds=None))


def _same_value(a: Any, b: Any) -> bool | None:
    """Whether two values of sympy are equal, whatever numbers their variables stand for; None where that is not known."""
    from sympy import MatrixBase, MatrixExpr, Rational
    from sympy.core.evalf import PrecisionExhausted

    a, b = (x.doit() if isinstance(x, MatrixExpr) else x for x in (a, b))
    if isinstance(a, MatrixBase) or isinstance(b, MatrixBase):
        if not (isinstance(a, MatrixBase) and isinstance(b, MatrixBase)) or a.shape != b.shape:
            return False
        same = [_same_value(x, y) for x, y in zip(a.flat(), b.flat(), strict=True)]
        return False if False in same else None if None in same else True
    variables = sorted(a.free_symbols | b.free_symbols, key=str)
    told = 0
    for row in _POINTS if variables else _POINTS[:1]:
        values = {v: Rational(row[i % len(row)], 7 + i) for i, v in enumerate(variables)}
        x, y = a.xreplace(values).doit(), b.xreplace(values).doit()
        tolerance = 0
        if not (x.is_Rational and y.is_Rational):
            try:
                x, y = x.evalf(DIGITS), y.evalf(DIGITS)
            except PrecisionExhausted:
                continue
            if not all(part.is_Float or part.is_Rational for z in (x, y) for part in z.as_real_imag()):
                continue
            tolerance = Rational(1, 10) ** (DIGITS - 50) * max(abs(x), abs(y))
        if abs(x - y) > tolerance:
            return False
        told += 1
    return True if told > bool(variables) else None


_POINTS = ((11, 19, 13, 17), (-10, 16, -23, 12), (25, -9, 15, -31))  # rows of numerators
