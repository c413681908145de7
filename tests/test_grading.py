"""Reading answers of GSM8K and MATH500 and comparing them: tables, hostile text, the process of math-verify."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask import make_task
from unmask.tasks import bounded
from unmask.tasks.answers import final, number, published_latex, published_number, same_latex
from unmask.tasks.math import equivalence
from unmask.tasks.math.gsm8k import GSM8K
from unmask.tasks.math.math500 import MATH500, extract, same

FORM = "steps\n</reasoning>\n<answer>\n{}\n</answer>"
PIECES = [
    "\\boxed{",
    "}",
    "{",
    "<answer>",
    "</answer>",
    "\\frac",
    "1,234",
    "-",
    "/",
    "0",
    ".",
    "$",
    "\\",
    "\n",
    "^",
    "=",
    "\\(",
]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        ("18.00", 18),
        ("-7", -7),
        ("−7", -7),
        ("$18.", 18),
        ("\\$43,500", 43500),
        ("-$10", -10),
        ("385\\,000", 385000),
        ("11,\\! 111,\\!100", 11111100),
        ("1{,}200 m", 1200),
        ("60\\%", 60),
        ("120\\text{ minutes}", 120),
        ("\\text{12 kg}", 12),
        ("30 m^2", 30),
        ("49^\\circ", 49),
        ("**72**", 72),
        (".5", Fraction(1, 2)),
        ("\\frac{3}{4}", Fraction(3, 4)),
        ("-\\dfrac34 cup", Fraction(-3, 4)),
        ("2\\frac{1}{2}", Fraction(5, 2)),
        ("3/4", Fraction(3, 4)),
        ("x = 5", 5),
        ("9 \\times 2 = 18 \\text{ dollars}", 18),
        ("16 hours (two days)", 16),
        ("129+42", None),  # no number but a sum
        ("4, 6", None),
        ("2^3", None),
        ("2\\pi", None),
        ("\\sqrt{3}", None),
        ("1/0", None),
        ("H2O", None),
        ("9" * 80, None),
        ("", None),
    ],
)
def test_numbers(text: str, value: Fraction | int | None) -> None:
    assert number(text) == value


def test_the_last_of_several_numbers_counts_in_prose() -> None:
    assert number("Of 20 eggs 18 are left.", last=True) == 18
    assert number("Of 20 eggs 18 are left.") == 20
    assert number("3 + 15", last=True) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (FORM.format("\\boxed{18}"), ("18", True)),
        (FORM.format("18 dollars"), ("18 dollars", False)),
        ("first \\boxed{3}, no: \\boxed{4}", ("4", True)),
        ("\\boxed{4} or \\boxed{...}", ("4", True)),
        ("\\boxed{3}</reasoning><answer>4</answer>", ("4", False)),
        ("<answer>4</answer> so \\boxed{3}", ("3", True)),
        ("<answer>\n\\boxed{36>", None),  # never closed
        ("<answer>\n\\boxed{\\frac{1}{2}\n</answer>", ("\\frac{1}{2}", False)),  # the tags are
        ("\\boxed{3}<answer>\n\\boxed{36\n</answer>", ("36", False)),
        ("so \\boxed 5$ it is", ("5", True)),
        ("<answer>\\boxed{}101</answer>", ("101", False)),
        ("<answer>145</answer}", None),
        ("the answer is 79", None),
        ("<answer></answer>", None),
        ("\\boxed{}", None),
        ("", None),
    ],
)
def test_the_final_answer(text: str, found: tuple[str, bool] | None) -> None:
    assert final(text) == found


def test_text_behind_the_end_token_is_not_read() -> None:
    task = make_task("gsm8k", {})
    assert task.grade(gsm8k("4"), "\\boxed{4}<|eot_id|>\\boxed{5}").solved


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("\\boxed{18}", 18.0),
        ("\\boxed{3} \\boxed{4}", 3.0),
        ("\\boxed{...} \\boxed{4}", 4.0),
        ("\\boxed{120\\text{ minutes}}", 120.0),
        ("\\boxed{43,500}", 43.0),
        ("<answer>it makes 12 or 18</answer>", 18.0),
        ("\\boxed{18\n}<answer>3</answer>", 3.0),
        ("\\boxed{36>", None),
        ("<answer>18", None),
    ],
)
def test_the_published_reading_of_numbers(text: str, value: float | None) -> None:
    assert published_number(text) == value


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\\boxed{3} \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("<answer>7</answer> \\boxed{8", "7"),  # tags only where the last box stays open
        ("<answer>7</answer>", "<answer>7</answer>"),  # without a box the whole text
        ("so $\\boxed 5$", "5"),
    ],
)
def test_the_published_reading_of_formulas(text: str, found: str) -> None:
    assert published_latex(text) == found


def test_published_equality_of_formulas() -> None:
    for left, right in [
        ("\\dfrac12", "\\frac{1}{2}"),
        ("1/2", "\\frac{1}{2}"),
        ("0.5", "\\frac12"),
        (".5", "\\frac12"),
        ("x = 5", "5"),
        ("90^\\circ", "90"),
        ("5\\text{ cm}", "5"),
        ("\\left( 3, 4 \\right)", "(3,4)"),
        ("\\sqrt3", "\\sqrt{3}"),
        ("50\\%", "50"),
    ]:
        assert same_latex(left, right) and same_latex(right, left), (left, right)
    assert not same_latex("1.5", "\\frac32") and not same_latex("x/2", "\\frac{x}{2}")


EQUAL = [
    ("\\operatorname{adj} A \\text{ m}", "\\operatorname{adj} A \\text{ m}"),  # not given to math-verify
    ("\\frac{3}{2}", "1.5"),
    ("3\\sqrt{2}", "\\sqrt{18}"),
    ("1,2", "2,1"),
    ("5", "x=5"),
    ("10,\\!080", "10080"),
    ("\\$32,\\!348", "32348"),
    ("\\text{(C)}", "C"),
    ("\\text{Wednesday}", "wednesday"),
    ("2516_8", "2516"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)"),
    ("x \\in [-2,7]", "[-2, 7]"),
    ("6 - 5i", "-5i+6"),
    ("x^2+2x+1", "(x+1)^2"),
    ("1 \\pm \\sqrt{2}", "1-\\sqrt{2},1+\\sqrt{2}"),
    ("\\begin{pmatrix} 1/5 \\\\ -2 \\end{pmatrix}", "\\begin{pmatrix} \\frac{1}{5} \\\\ -2 \\end{pmatrix}"),
    ("31", "8 + 8 + 15 = 31"),
    ("5", "5 \\text{ cm}"),
]
DIFFERENT = [
    ("(1,2)", "(2,1)"),
    ("[1,2]", "(1,2)"),
    ("2", "2x"),
    ("1", "1,2"),
    ("10", "10,000"),
    ("p - q", "q - p"),
    ("4210_5", "4210_7"),
    ("2516", "2516_8"),
    ("\\pi", "3.14"),
    ("\\text{east}", "west"),
    ("12", "12 \\text{ and } 13"),
    ("12 \\text{ and } 13", "12"),
    ("\\frac{4}{9}", "\\frac{8}{18}"),  # not in lowest terms
    ("2", "\\frac{6}{3}"),
]


def test_equality_of_formulas() -> None:
    assert [pair for pair in EQUAL if not same(*pair)] == []
    assert [pair for pair in DIFFERENT if same(*pair)] == []


def test_what_is_given_to_math_verify() -> None:
    for text in (
        "\\frac{1}{2}",
        "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
        "2^{10}",
        "x^{2y}",
        "10!",
        "\\text{dx}",
        "\\cdot",
    ):
        assert equivalence.readable(text), text
    for text in (
        "\\begin{vmatrix} 1 \\end{vmatrix}",
        "2^{3^4}",
        "2^{12345}",
        "5!!",
        "\\operatorname{x}",
        "d x",
        "1" * 40,
    ):
        assert not equivalence.readable(text), text


def test_a_decimal_is_no_answer_where_a_fraction_is_asked_for() -> None:
    assert same("\\frac{3}{2}", "1.5", "What power is it?")
    assert not same("\\frac{3}{2}", "1.5", "Express your answer as a common fraction.")


def gsm8k(answer: str) -> Any:
    return GSM8K().made("How many?", answer, None)


def math500(answer: str) -> Any:
    return MATH500().made("How many?", answer, None)


HOSTILE = [
    "10^{10^{10}}",
    "9^{99999}",
    "((99)!)!",
    "99999!",
    "\\binom{99999999}{49999999}",
    "(" * 10**5,
    "{" * 10**5,
    "\\sqrt{" * 200 + "2" + "}" * 200,
    "\\frac{1}{" * 2000,
    "\\boxed{" * 10**4,
    "\\(" * 10**4,
    "$" * 10**4,
    "1,234," * 10**4,
    "\\operatorname{eye}(99999999)",
    "\\frac{d}{d\\exit}",
    "\\sum_{i=1}^{10^9} i",
    "__import__('os').system('true')",
    "\\frac{1}{0}",
    "\ud800",
    "\x00",
    "٤",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: t[:14].encode("unicode_escape", "replace").decode())
def test_hostile_answers_are_wrong_and_fast(text: str) -> None:
    same("x", "1x")  # the helper runs
    for task, problem in (("gsm8k", gsm8k("3")), ("math500", math500("3"))):
        for extraction in ("default", "published"):
            grader = make_task(f"{task}:extraction={extraction}", {})
            for completion in (text, f"<answer>{text}</answer>", FORM.format(f"\\boxed{{{text}}}")):
                start = time.perf_counter()
                assert not grader.grade(problem, completion).solved
                assert time.perf_counter() - start < 2  # half of it for a machine at work
    assert same("x+3", "3+x")  # and it still does


def test_a_formula_that_takes_too_long_is_different_and_the_next_one_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bounded, "WALL_SECONDS", 0.3)
    start = time.perf_counter()
    with pytest.raises(TimeoutError):
        equivalence._helper.ask("x^{99}+y=2", "y+x^{98}=2")
    assert time.perf_counter() - start < 3
    monkeypatch.undo()
    assert equivalence._helper.ask("2", "1+1")


def test_what_came_late_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded.Helper, "ask", lambda *_: (_ for _ in ()).throw(TimeoutError))
    assert not equivalence.equivalent("9", "8 + 1")
    monkeypatch.undo()
    assert equivalence.equivalent("9", "8 + 1")


def test_processor_time_is_what_is_limited() -> None:
    """One that takes too long ends a copy of the helper; the next is answered at once, by the same process."""
    assert equivalence.equivalent("2", "1 + 1")
    process = equivalence._helper.process
    start = time.perf_counter()
    assert not equivalence.equivalent("x^{97}+y=2", "y+x^{98}=2")  # ends long before WALL_SECONDS
    assert equivalence.equivalent("2", "1 +  1")
    assert time.perf_counter() - start < 3 and equivalence._helper.process is process


def test_formulas_are_compared_in_any_thread() -> None:
    found: list[bool] = []
    threads = [threading.Thread(target=lambda i=i: found.append(same(f"x+{i}", f"{i} + x"))) for i in range(5, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def test_no_text_reaches_python() -> None:
    """In the helper sympy's evaluation of strings refuses, by whatever name it is called."""
    code = (
        "import io\n"
        "from unmask.tasks.bounded import serve\n"
        "from unmask.tasks.math import equivalence\n"
        "out = io.StringIO()\n"
        'serve(equivalence._comparison(), io.StringIO(\'["1", "1"]\\n\'), out)\n'
        "import sympy, math_verify.parser as parser\n"
        "evil = '(1).__class__.__base__.__subclasses__()'\n"
        "refused = 0\n"
        "for read in (sympy.sympify, parser.parse_expr_cached, sympy.parse_expr):\n"
        "    try:\n        read(evil)\n"
        "    except ValueError:\n        refused += 1\n"
        "print(out.getvalue().split(), refused)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['ready', 'true'] 3"


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=40).map("".join)))
def test_reading_never_raises(text: str) -> None:
    number(text)
    number(text, last=True)
    published_number(text)
    published_latex(text)
    same_latex(text, "1")
    equivalence.readable(text)
    extract(text)
    for completion in (text, FORM.format(text), FORM.format(f"\\boxed{{{text}}}")):
        for extraction in ("default", "published"):
            make_task(f"gsm8k:extraction={extraction}", {}).grade(gsm8k("3"), completion)
        make_task("math500:extraction=published", {}).grade(math500("3"), completion)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join))
def test_reading_costs_linear_time(piece: str) -> None:
    text = (piece * 20_000)[:20_000]
    times = []
    for _ in range(3):
        start = time.process_time()
        for reader in (final, number, published_number, published_latex, extract, lambda t: same_latex(t, "1")):
            reader(text)
        times.append(time.process_time() - start)
    assert min(times) < 0.25


def test_the_helper_ends_with_its_program() -> None:
    code = "from unmask.tasks.math import equivalence as e; print(e.equivalent('2', '1+1'), e._helper.process.pid)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, pid = done.stdout.split()
    assert found == "True"
    for _ in range(100):
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    stat = Path(f"/proc/{pid}/stat")
    assert stat.exists() and stat.read_text().split()[2] == "Z"
