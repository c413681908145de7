"""Readings and rewards as released, hostile text, and the process that compares formulas."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from test_answers import FORM, GRID, PUZZLE, TAGS, solved
from unmask import UserError, make_task
from unmask.rl.rewards import reward_functions
from unmask.tasks import bounded, released
from unmask.tasks.math import equivalence
from unmask.tasks.math.math500 import same

# fmt: off
PUBLISHED = [  # task, completion, truth, whether it is right
    ("countdown", "So 48 + 29 + 16 = 93 works.", [[48, 29, 16], 93], True),
    ("countdown", "<answer>48 + 29 + 16</answer>", [[48, 29, 16], 93], False),  # the tags are read where a box is open
    ("countdown", "<answer>48 + 29 + 16</answer>\\boxed{", [[48, 29, 16], 93], True),
    ("countdown", "1/72/70/43", [[1, 72, 70, 43], 0], True),  # within 1e-5
    ("countdown", "\\boxed{4**2}", [[4, 2], 16], True),
    ("gsm8k", "\\boxed{360\\text{ hours} hours.", "360", True),
    ("gsm8k", "<answer>2:00 pm</answer>\\boxed{2:00 pm}", "2", True),
    ("gsm8k", "\\boxed{70 000}", "70", True),
    ("math500", "5", "5", True),  # the whole text where there is no box
    ("math500", "\\boxed <answer>7</answer>", "7", False),
    ("math500", "\\boxed{\\frac{6}{3}}", "\\frac63", True),
]
NUMBERS = [
    ("\\boxed{18}", 18.0), ("\\boxed{3} \\boxed{4}", 3.0), ("\\boxed{...} \\boxed{4}", 4.0), ("\\boxed{43,500}", 43.0),
    ("\\boxed{120\\text{ minutes}}", 120.0), ("<answer>it makes 12 or 18</answer>", 18.0), ("\\boxed{36>", None),
    ("\\boxed{18\n}<answer>3</answer>", 3.0), ("<answer>18", None),
]
FORMULAS = [
    ("\\boxed{3} \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"), ("<answer>7</answer>", "<answer>7</answer>"),
    ("<answer>7</answer> \\boxed{8", "7"), ("so $\\boxed 5$", "5"),
]
GRIDS = [
    ("<answer>\n3142 2431\n4213 1324\n</answer>", "3142243142131324"),
    ("<answer>grid: ```3142243142131324```</answer>", "3142243142131324"),
    ("<answer>31422431<|eot_id|>", "3142243100000000"),  # cut off: padded with 0
    ("<answer></answer> 3142243142131324<|eot_id|>", "3142243142131324"),  # what follows an empty answer
    ("so 3142243142131324 is the grid", "3142243142131324"),
    ("<answer>a3142 b2431 c4213 d1324</answer>", "a3142b2431c4213d"),  # labels are kept, unlike by default
    ("nothing", "0" * 16),
]
EQUAL = [
    ("\\dfrac12", "\\frac{1}{2}"), ("1/2", "\\frac{1}{2}"), ("0.5", "\\frac12"), (".5", "\\frac12"), ("x = 5", "5"),
    ("90^\\circ", "90"), ("5\\text{ cm}", "5"), ("\\left( 3, 4 \\right)", "(3,4)"), ("\\sqrt3", "\\sqrt{3}"), ("50\\%", "50"),
]
HOSTILE = [
    "10^{10^{10}}", "9^{99999}", "((99)!)!", "99999!", "\\binom{99999999}{49999999}", "(" * 10**5, "{" * 10**5,
    "\\sqrt{" * 200 + "2" + "}" * 200, "\\frac{1}{" * 2000, "\\boxed{" * 10**4, "\\(" * 10**4, "$" * 10**4, "1,234," * 10**4,
    "\\operatorname{eye}(99999999)", "\\frac{d}{d\\exit}", "\\sum_{i=1}^{10^9} i", "__import__('os').system('true')",
    "\\frac{1}{0}", "\ud800", "\x00", "٤", "9**9**9", "(" * 90 + "1" + ")" * 90, "٣+٨*٥", "1²+3", "8*3+5" + "+0" * 50_000,
    "8//0+3+5", "8/0+3*5", "1e9+8+3+5", "8" * 5000, "\\boxed{" * 30_000 + "}" * 30_000, "<answer>" * 25_000, "9*3+5=" * 30_000,
    "0x8*3+5", "8_0*3+5", "lambda: 29", "",
]
GRADED = {"gsm8k": "17", "math500": "17", "countdown": [[8, 3, 5], 29], "sudoku": GRID}
READABLE = [
    "\\frac{1}{2}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "2^{10}", "x^{2y}", "10!", "\\text{dx}", "\\cdot",
]
NOT_READABLE = [
    "\\begin{vmatrix} 1 \\end{vmatrix}", "2^{3^4}", "2^{12345}", "5!!", "\\operatorname{x}", "d x", "1" * 40, "(" * 13,
]
# fmt: on


def test_the_published_readings_stay_as_released() -> None:
    for task, completion, truth, right in PUBLISHED:
        assert solved(f"{task}:extraction=published", completion, truth) == right, completion
    for reader, rows in ((released.number, NUMBERS), (released.latex, FORMULAS), (released.grid, GRIDS)):
        assert [(text, reader(text)) for text, _ in rows] == rows  # type: ignore[operator]
    assert [pair for pair in EQUAL if not (released.same_latex(*pair) and released.same_latex(*pair[::-1]))] == []
    assert not released.same_latex("1.5", "\\frac32") and not released.same_latex("x/2", "\\frac{x}{2}")


LINES = "\na\n</reasoning>\n<answer>\n{}\n</answer>\n"
PAID = [  # task, row, completion, what each reward pays
    ("gsm8k", {"question": "q", "answer": "#### 1,002"}, LINES.format("1,002"), [2, 0.5, 0, 0, 0.5]),
    ("gsm8k", {"question": "q", "answer": "#### 1,002"}, LINES.format("1002"), [0, 0.5, 0, 0.5, 0.5]),
    ("gsm8k", {"question": "q", "answer": "#### 7"}, "a</reasoning><answer>7</answer>", [2, 0, 0.5, 0.5, 0]),
    ("math500", {"problem": "q", "answer": "5"}, LINES.format("\\boxed{5}"), [2, 0.75]),
    ("math500", {"problem": "q", "answer": "5"}, LINES.format("5"), [0, 0.75]),
    ("math500", {"problem": "q", "answer": "5"}, "so \\boxed{5}", [2, 0.25]),
    ("countdown", {"input": "8,3,5", "output": "29"}, "<answer>8*3+5</answer>", [1]),
    ("countdown", {"input": "8,3,5", "output": "29"}, "<answer>of course</answer>", [0.1]),
    ("countdown", {"input": "8,3,5", "output": "29"}, "\\boxed{8*3+5}", [0]),
    ("sudoku", {"Puzzle": "0102200002100320", "Solution": GRID}, f"<answer>{GRID}</answer>", [1]),
    ("sudoku", {"Puzzle": "0102200002100320", "Solution": GRID}, f"<answer>{GRID}", [0]),
]


@pytest.mark.parametrize(("task", "row", "completion", "paid"), PAID)
def test_released_rewards_by_hand(task: str, row: Any, completion: str, paid: list[float]) -> None:
    grader = make_task(task, {})
    columns: Any = {"problem": [grader.parse(row)], "task": [grader], "prompts": ["p"], "completions": [completion]}
    table = reward_functions(["released", "solved"], [grader])
    values = [weight * (function(**columns)[0] or 0) for function, weight in table.values()]
    assert values[:-1] == paid and list(table)[-1] == "solved"


def test_a_task_without_a_released_reward_says_so() -> None:
    with pytest.raises(UserError, match="task reasoning_gym has no released reward: set reward_funcs to"):
        reward_functions(["released"], [make_task("reasoning_gym:leg_counting", {})])


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: t[:14].encode("unicode_escape", "replace").decode())
def test_hostile_answers_are_wrong_and_fast(text: str) -> None:
    assert same("x+3", "3+x")  # the worker runs
    for task, truth in GRADED.items():
        for spec in (task, f"{task}:extraction=published"):
            for completion in (text, TAGS.format(text), FORM.format(f"\\boxed{{{text}}}")):
                start = time.perf_counter()
                assert not solved(spec, completion, truth, PUZZLE)
                assert time.perf_counter() - start < 2  # half of it for a machine at work
    assert same("x+4", "4+x")  # and it still does


def test_what_math_verify_gets() -> None:
    assert all(map(equivalence.readable, READABLE)) and not any(map(equivalence.readable, NOT_READABLE))


def test_what_comes_late_is_different(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock: not remembered. By processor time: that ends a copy of the worker, which answers the next at once."""
    monkeypatch.setattr(bounded, "WALL_SECONDS", 0.1)
    remembered, start = equivalence.WORKER.replies.cache_info().currsize, time.perf_counter()
    assert not equivalence.equivalent("x^{99}+y=2", "y+x^{98}=2")
    assert equivalence.WORKER.replies.cache_info().currsize == remembered and time.perf_counter() - start < 20
    monkeypatch.undo()
    assert equivalence.equivalent("9", "8 + 1")
    process, start = equivalence.WORKER.process, time.perf_counter()
    assert not equivalence.equivalent("x^{97}+y=2", "y+x^{98}=2")  # ends long before WALL_SECONDS
    assert equivalence.equivalent("2", "1 +  1") and equivalence.WORKER.process is process
    assert time.perf_counter() - start < 20


def test_formulas_are_compared_in_any_thread() -> None:
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(lambda i: same(f"x+{i}", f"{i} + x"), range(5, 9)))


def test_no_text_reaches_python() -> None:
    """In the worker sympy's evaluation of strings refuses, by whatever name it is called."""
    code = (
        "from unmask.tasks.math import equivalence\n"
        "print(equivalence.prepare()('1', '1'))\n"
        "import sympy, math_verify.parser as parser\n"
        "for read in (sympy.sympify, parser.parse_expr_cached, sympy.parse_expr):\n"
        "    try:\n        read('(1).__class__.__base__.__subclasses__()')\n"
        "    except ValueError:\n        print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "refused", "refused", "refused"]


def test_the_worker_ends_with_its_program() -> None:
    code = "from unmask.tasks.math import equivalence as e; print(e.equivalent('2', '1+1'), e.WORKER.process.pid)"
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
