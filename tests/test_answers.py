"""Answers as models write them, beside near misses that must stay wrong; readings and rewards as released; hostile text."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask import UserError, make_task
from unmask.rl.rewards import reward_functions
from unmask.tasks import bounded, released
from unmask.tasks.answers import final
from unmask.tasks.math import equivalence
from unmask.tasks.math.math500 import same
from unmask.tasks.notation import plain
from unmask.tasks.quantities import number

TAGS, BOX = "<answer>{}</answer>", "<answer>\\boxed{{{}}}</answer>"
FORM = "steps\n</reasoning>\n<answer>\n{}\n</answer>"
PUZZLE, GRID = "Solve the following Sudoku puzzle: 0102200002100320", "3142243142131324"

# fmt: off
NUMBERS = {
    "2220": ["2\\,220", "2\\;220", "2\\:220", "2\\!220", "2\u202f220", "2\u2009220", "2\u00a0220"],
    "73": ["**73**", "*73*", "__73__", "`73`", "```\n73\n```", "<b>73</b>", "<strong>73</strong>", "# 73", "### 73", "#### 73",
        "***73***", "**Answer:** 73", "**Answer: 73**", "Answer: 73", "Final answer: 73.", "The answer is 73",
        "The final answer is: $73$.", "73 students", "73 red apples", "73 \\text{ students}", "73\\text{ cm}^2", "73 cm",
        "73cm", "73 square units", "73 km/h", "73 miles per hour", "73 percent", "73%", "73\\%", "73°", "73^\\circ",
        "73^{\\circ}", "73 degrees", "７３", "𝟕𝟑", "\\mathbf{73}", "\\textbf{73}", "\\text{73}", "\\boldsymbol{73}",
        "\\mathrm{73}", "{73}", "\\left(73\\right)", "(73)", "\\displaystyle 73", "\\color{red}{73}", "73.", "73,", "73;",
        "73.0", "x = 73", '"73"', "73\n", " 73 ✅", "\\( 73 \\)", "\\[ 73 \\]", "$$73$$", "+73"],
    "36": ["\\$36", "$36", "$\\$36$", "$36$", "€36", "36 €", "£36", "US$36", "\\text{\\$}36", "USD 36", "36 dollars", "36 USD"],
    "-3": ["\u20133", "\u22123", "\u20143", "\u20103", "\uff0d3", "- 3", "-\\$3", "$-3$", "minus 3", "negative 3"],
    "70000": ["70 000"], "10000": ["10{,}000", "10\\,000"], "26000": ["26~000"],
    "1000": ["1_000", "1\\_000", "1'000", "1\u2019000"], "1234567": ["1,234,567", "1 234 567"], "1234.5": ["1 234.5"],
    "2000000": ["2 million", "$2 million"], "1500000000": ["1.5 billion"], "3000": ["3 thousand"],
    "2500000": ["2.5 million dollars"], "500": ["5 hundred"], "200000": ["2 hundred thousand"], "0.5": ["½", ".5"],
    "2.5": ["2½", "2 1/2", "2\\frac{1}{2}", "2 \\frac12"], "-2.5": ["-2 1/2"],
    "1500": ["1.5e3", "1.5 \\times 10^3", "1.5\\times10^{3}", "1.5 × 10³"], "300000": ["3 x 10^5"],
    "18": ["9 \\times 2 = 18", "18", "18.00", "$18.", "9 \\times 2 = 18 \\text{ dollars}"], "-7": ["-7", "\u22127"],
    "43500": ["\\$43,500"], "-10": ["-$10"], "385000": ["385\\,000"], "11111100": ["11,\\! 111,\\!100"], "1200": ["1{,}200 m"],
    "120": ["120\\text{ minutes}"], "12": ["\\text{12 kg}"], "30": ["30 m^2"],
    "0.75": ["\\frac{3}{4}", "3/4"], "-0.75": ["-\\dfrac34 cup"],
}
NO_NUMBERS = {  # as written: what it might be taken for, beside the numbers in it
    "5 6": "56 30 11", "5\\ 6": "56 30 11", "5\\,6": "56 30", "5-6": "-1", "5\u20136": "", "5 to 6": "", "5 or 6": "",
    "5 and 6": "", "5, 6": "", "2:30": "", "4/5/2020": "", "2020-05-04": "4", "5 dollars and 50 cents": "",
    "5 feet 6 inches": "", "2(3)": "", "5 squared": "", "2^3": "", "2**3": "", "2³": "3", "5 tenths": "",
    "3 hundredths": "300", "1.2.3": "1", "x - 3": "-3", "2\\pi": "", "2pi": "", "2π": "", "\\sqrt{3}": "", "√3": "",
    "5 times 6": "", "20 minus 5": "-5", "3x": "", "36>": "", "12 34": "1234", "70 0000": "700000", "1 2345": "12345",
    "5 60": "560", "5 7/3": "22/3", "\\frac{1}{2}\\frac{1}{3}": "0.5", "2 3/4 5": "2.75",
    "1/0": "", "": "0", "129+42": "", "4, 6": "", "H2O": "",
}
FORMULAS = [  # as written, a truth that it equals
    ("pi/2", "\\frac{\\pi}{2}"), ("π/2", "\\frac{\\pi}{2}"), ("\\pi/2", "\\frac{\\pi}{2}"), ("sqrt(2)", "\\sqrt{2}"),
    ("√2", "\\sqrt{2}"), ("3√13", "3\\sqrt{13}"), ("3*sqrt(13)", "3\\sqrt{13}"), ("x**2", "x^2"), ("x²", "x^2"),
    ("**x+1**", "x+1"), ("$x$ = 5", "5"), ("\\(x=2\\) or \\(x=3\\)", "2,3"), ("$2$ and $3$", "2,3"), ("12π cm^2", "12\\pi"),
    ("12\\pi \\text{ square inches}", "12\\pi"), ("\\mathbf{(C)}", "\\text{(C)}"), ("**C**", "\\text{(C)}"),
    ("Evelyn.", "\\text{Evelyn}"), ("\\textbf{Evelyn}", "\\text{Evelyn}"), ("(\u2013∞, 0]", "(-\\infty, 0]"), ("½", "\\frac12"),
    ("1 4/5", "1\\frac{4}{5}"), ("9/5", "1\\frac{4}{5}"), ("137.5", "137 \\frac{1}{2}"),
    ("270/7", "\\frac{270}7\\text{ degrees}"), ("270/7 degrees", "\\frac{270}7\\text{ degrees}"),
    ("864 square inches", "864 \\mbox{ inches}^2"), ("5.4 cents", "5.4 \\text{ cents}"), ("$18.90", "\\$18.90"),
    ("18.9", "\\$18.90"), ("2x*3", "6x"), ("11 111 111 100", "11,\\! 111,\\! 111,\\! 100"), ("-1/3", "-\\frac{1}{3}"),
    ("y = -2x", "y=-2x"), ("6 \u2212 5i", "6 - 5i"), ("2k + 2", "2k+2"), ("x∈[-2,7]", "x \\in [-2,7]"), ("2, 1", "1,2"),
    ("(x^{999}-1)/(x-1)", "\\frac{x^{999}-1}{x-1}"), ("(x-1)(x+1)", "x^2-1"), ("3*2^{98}", "3 \\cdot 2^{98}"),
    ("\\frac{8}{49}\\begin{pmatrix} 2 \\\\ 3 \\end{pmatrix}", "\\begin{pmatrix} 16/49 \\\\ 24/49 \\end{pmatrix}"),
    ("\\operatorname{adj} A \\text{ m}", "\\operatorname{adj} A \\text{ m}"), ("1.5", "\\frac{3}{2}"),
    ("\\sqrt{18}", "3\\sqrt{2}"), ("2,1", "1,2"), ("x=5", "5"), ("10080", "10,\\!080"), ("32348", "\\$32,\\!348"),
    ("C", "\\text{(C)}"), ("wednesday", "\\text{Wednesday}"), ("2516", "2516_8"),
    ("(3, \\pi/2)", "\\left( 3, \\frac{\\pi}{2} \\right)"), ("[-2, 7]", "x \\in [-2,7]"), ("-5i+6", "6 - 5i"),
    ("(x+1)^2", "x^2+2x+1"), ("1-\\sqrt{2},1+\\sqrt{2}", "1 \\pm \\sqrt{2}"),
    ("\\begin{pmatrix} \\frac{1}{5} \\\\ -2 \\end{pmatrix}", "\\begin{pmatrix} 1/5 \\\\ -2 \\end{pmatrix}"),
    ("8 + 8 + 15 = 31", "31"), ("5 \\text{ cm}", "5"),
]
OTHER_FORMULAS = [
    ("2.7", "\\frac{8}{3}"), ("3c", "3"), ("3 c", "3"), ("3h", "3"), ("3m", "3"), ("2k", "2000"), ("pi", "p"),
    ("2x = 10", "10"), ("a=3, b=5", "5"), ("7! \\times 2!", "10080"), ("\\sqrt{2^{16}}", "256"),
    ("\\frac{6}{3}", "2"), ("2^8", "256"), ("2+3", "5"), ("2 \\cdot 3", "6"), ("\\sqrt{16}", "4"), ("5!", "120"),
    ("\\frac{1}{2^{98}}", "\\frac{1}{2^{99}}"), ("0.333333", "\\frac{1}{3}"), ("5 million", "5"),
    ("(2 \\cdot 3, 1)", "(6,1)"), ("\\frac{2}{4}\\pi", "\\frac{1}{2}\\pi"), ("x+y+z+1=0", "5x - 7y + 11z + 4 = 0"),
    ("0", "10\\,000"), ("\\(x=2\\) or \\(x=3\\)", "3"), ("no more than 5", "5"), ("5 \\text{ or } 6", "5"),
    ("5 \\text{ and } 6", "6"), ("not 5", "5"), ("5 or more", "5"), ("\\approx 5", "5"), ("2516_7", "2516_8"),
    ("4.2\\pi", "4\\pi"), ("sqrt(2)", "2"), ("2 sqrt 3", "2"), ("3.14159265358979\\cdot 2", "2\\pi"),
    ("1.41421356", "\\sqrt{2}"), ("2^{98}x+1", "2^{98}x"), ("x^{999}+x", "x"), ("7! \\times 2! \\pi", "10080\\pi"),
    ("\\sqrt{4}x", "2x"), ("2e", "2000"), ("(2,1)", "(1,2)"), ("(1,2)", "[1,2]"), ("2x", "2"), ("1,2", "1"),
    ("10,000", "10"), ("q - p", "p - q"), ("4210_7", "4210_5"), ("2516_8", "2516"), ("3.14", "\\pi"), ("west", "\\text{east}"),
    ("12 \\text{ and } 13", "12"), ("12", "12 \\text{ and } 13"), ("\\frac{8}{18}", "\\frac{4}{9}"),
]
COSTLY = [
    ("(x^{999}-1)/(x-1)", "3x"), ("x^{99}+x=1, y=2", "x=5, y=2"), ("x^{99}+y^{99}=1", "x^2+y^2=1"),
    ("(x+1)^{999}(x+2)^{999}(y+1)^{999}", "x"), ("\\{" + ",".join(f"x^{{{i}}}" for i in range(40)) + "\\}", "\\{1,2\\}"),
]
FINALS = [
    (FORM.format("\\boxed{18}"), ("18", True)), (FORM.format("18 dollars"), ("18 dollars", False)),
    ("first \\boxed{3}, no: \\boxed{4}", ("4", True)), ("\\boxed{4} or \\boxed{...}", ("4", True)),
    ("\\boxed{3}</reasoning><answer>4</answer>", ("4", False)), ("<answer>4</answer> so \\boxed{3}", ("3", True)),
    ("<answer>\n\\boxed{36>", None), ("<answer>\n\\boxed{\\frac{1}{2}\n</answer>", ("\\frac{1}{2}", False)),
    ("\\boxed{3}<answer>\n\\boxed{36\n</answer>", ("36", False)), ("so \\boxed 5$ it is", ("5", True)),
    ("<answer>\\boxed{}101</answer>", ("101", False)), ("<answer>145</answer}", None), ("the answer is 79", None),
    ("<answer></answer>", None), ("\\boxed{}", None), ("", None),
]
MARKS = [
    ("so\n#### 18", True), ("so\n#### $18\n</reasoning>", True), ("so #### 18 and", False), ("#### Step 18", False),
    ("so\n#### 18. Compute", False), ("so\n#### 18\n<answer>19</answer>", False), ("<answer>\n## Answer\n18\n</answer>", True),
    ("so\n**Final Answer:** 18", True), ("the answer is 18", False),
    ("<answer>18</answer>\nI put it in \\boxed as asked.", True), ("\\boxed{18}. The answer is given in \\boxed form.", True),
    ("\\boxed{18}\n\\boxed{\\text{answer}}", True), ("\\boxed{18} in \\boxed{your answer here}", True),
    ("\\boxed{18} \\boxed{?} \\boxed{}", True), ("\\boxed 18", True), ("it goes in \\boxed{}, so 18", False),
    ("\\boxed{18} no: \\boxed{19}", False), ("<answer>18</answer>" + "so it is " * 20_000, True),
    ("so it is " * 20_000 + "\\boxed{18}", True), ("<answer>\\boxed{18}" + "so it is " * 5_000 + "</answer>", True),
]
EXPRESSIONS = [  # numbers, target, how a solution is written
    ([4, 6, 10], 34, ["$4 \\times 6 + 10$", "**4*6+10**", "4⋅6+10", "4 x 6 + 10", "4×6+10 = 34", "34 = 4*6+10", "`4*6+10`",
        "\\[4*6+10\\]", "\\(4*6+10\\)", "[4*6]+10", "Answer: 4*6+10", "４*６+１０", "(**4*6**)+10"]),
    ([8, 2, 7], 11, ["\\boxed{\\frac{8}{2}+7}", "\\dfrac{8}{2}+7.", "\\frac82+7", "8/2+7\\,", "8 ÷ 2 + 7", "8 \\div 2 + 7"]),
    ([10, 3], 7, ["10 \u2013 3"]), ([8, 2, 7], 42, ["\\left(8-2\\right) \\cdot 7"]), ([8, 6, 2], 7, ["\\frac{8+6}{2}"]),
    ([8, 2, 2], 2, ["\\frac{\\frac{8}{2}}{2}"]),
]
NO_EXPRESSIONS = [  # and what is none
    ([4, 6, 10], 34, ["\\text{Answer: }4*6+10", "(4)(6)+10", "4*6+10+0", "4*6-10"]), ([56], 56, ["5 6"]),
    ([5, 6], 30, ["5 6", "5(6)"]), ([5, 6], 56, ["5 6"]), ([1, 72, 70, 43], 0, ["1/72/70/43"]),
    ([3, 367, 942, 35], -35, ["((3/367)/942 - 35)"]), ([4, 6], 4096, ["4**6"]), ([8, 2, 7], 28, ["\\frac{8}{2}{7}"]),
    ([2, 8, 4], 4, ["2\\frac{8}{4}"]), ([46, 10], 56, ["4 6 + 10"]), ([4, 6, 10], 56, ["46+10"]),
]
GRIDS = [
    "The solved 4x4 Sudoku is: 3142 2431 4213 1324", "3142243142131324", "**3142243142131324**",
    "3 1 4 2\n2 4 3 1\n4 2 1 3\n1 3 2 4",
    "| 3 | 1 | 4 | 2 |\n|---|---|---|---|\n| 2 | 4 | 3 | 1 |\n| 4 | 2 | 1 | 3 |\n| 1 | 3 | 2 | 4 |",
    "[[3,1,4,2],[2,4,3,1],[4,2,1,3],[1,3,2,4]]", "Row 1: 3142\nRow 2: 2431\nRow 3: 4213\nRow 4: 1324",
    "1. 3142\n2. 2431\n3. 4213\n4. 1324", "The 4 × 4 grid: 3142243142131324", "```\n3142\n2431\n4213\n1324\n```",
    "Puzzle 0102200002100320 becomes 3142243142131324", "16 digits: 3142 2431 4213 1324", "a3142 b2431 c4213 d1324",
    "３１４２２４３１４２１３１３２４", "R1: 3 1 4 2\nR2: 2 4 3 1\nR3: 4 2 1 3\nR4: 1 3 2 4",
    "Every row, column and 2x2 box holds the digits 1-4: 3142243142131324.", "1: 3142\n2: 2431\n3: 4213\n4: 1324",
    "\\begin{bmatrix}3 & 1 & 4 & 2\\\\2 & 4 & 3 & 1\\\\4 & 2 & 1 & 3\\\\1 & 3 & 2 & 4\\end{bmatrix}",
]
PIECES = ["\\boxed{", *"}{-/0.$\\\n^=", "<answer>", "</answer>", "\\frac", "1,234", "\\("]
LONG = ["\\boxed{", "<answer>", "####", "1,", "=", "½", " ", "\\frac1{", "$\\(", "</reasoning><answer>"]
PUBLISHED = [  # task, completion, truth, whether it is right
    ("countdown", "So 48 + 29 + 16 = 93 works.", [[48, 29, 16], 93], True),
    ("countdown", "<answer>48 + 29 + 16</answer>", [[48, 29, 16], 93], False),  # the tags are read where a box is open
    ("countdown", "<answer>48 + 29 + 16</answer>\\boxed{", [[48, 29, 16], 93], True),
    ("countdown", "\\boxed{4**2}", [[4, 2], 16], True), ("countdown", "1/72/70/43", [[1, 72, 70, 43], 0], True),  # within 1e-5
    ("gsm8k", "\\boxed{360\\text{ hours} hours.", "360", True), ("gsm8k", "\\boxed{70 000}", "70", True),
    ("gsm8k", "<answer>2:00 pm</answer>\\boxed{2:00 pm}", "2", True),
    ("math500", "\\boxed <answer>7</answer>", "7", False), ("math500", "5", "5", True),  # the whole text where there is no box
    ("math500", "\\boxed{\\frac{6}{3}}", "\\frac63", True),
]
RELEASED: Any = {released.number: [
    ("\\boxed{18}", 18.0), ("\\boxed{3} \\boxed{4}", 3.0), ("\\boxed{...} \\boxed{4}", 4.0), ("\\boxed{43,500}", 43.0),
    ("\\boxed{120\\text{ minutes}}", 120.0), ("<answer>it makes 12 or 18</answer>", 18.0), ("\\boxed{36>", None),
    ("\\boxed{18\n}<answer>3</answer>", 3.0), ("<answer>18", None),
], released.latex: [
    ("\\boxed{3} \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"), ("<answer>7</answer>", "<answer>7</answer>"),
    ("<answer>7</answer> \\boxed{8", "7"), ("so $\\boxed 5$", "5"),
], released.grid: [
    ("<answer>\n3142 2431\n4213 1324\n</answer>", GRID), ("<answer>grid: ```3142243142131324```</answer>", GRID),
    ("nothing", "0" * 16), ("<answer>31422431<|eot_id|>", "3142243100000000"),  # cut off: padded with 0
    ("so 3142243142131324 is the grid", GRID), ("<answer></answer> 3142243142131324<|eot_id|>", GRID),
    ("<answer>a3142 b2431 c4213 d1324</answer>", "a3142b2431c4213d"),  # labels are kept, unlike by default
]}
RELEASED_EQUAL = [
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
LINES = "\na\n</reasoning>\n<answer>\n{}\n</answer>\n"
ROWS = {
    "gsm8k": {"question": "q", "answer": "#### 1,002"}, "math500": {"problem": "q", "answer": "\\frac{3}{2}"},
    "countdown": {"input": "8,3,5", "output": "29"}, "sudoku": {"Puzzle": PUZZLE[-16:], "Solution": GRID},
}
PAID = {  # task -> completion, what each reward pays by default, and as released
    "gsm8k": [
        (LINES.format("1,002"), [2, 0, 0.5, 0.5, 0.5], [2, 0.5, 0, 0, 0.5]),
        (LINES.format("1002"), [2, 0.5, 0.5, 0.5, 0.5], [0, 0.5, 0, 0.5, 0.5]),
        (LINES.format("1002")[:-1], [2, 0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0.5, 0.451]),
        (LINES.format("8"), [0, 0.5, 0.5, 0.5, 0.5], [0, 0.5, 0, 0.5, 0.5]),
        (LINES.format("1002") + "more", [2, 0.5, 0, 0.5, 0.496], [0, 0, 0, 0.5, 0.492]),
        (LINES.format("1002") + "<|eot_id|>x", [2, 0.5, 0.5, 0.5, 0.5], [0, 0.5, 0, 0.5, 0.5]),
        ("\na\nb" + LINES.format("1002")[2:], [2, 0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0.5, 0.5]),
        ("a</reasoning> <answer>1,002</answer>", [2, 0, 0, 0.5, 0], [2, 0, 0.5, 0, 0]),
        ("a</reasoning> so <answer>1002</answer>", [2, 0.5, 0, 0, 0], [0, 0, 0, 0.5, 0]),
        (LINES.format("1002")[:-12], [0, 0, 0, 0, 0.375], [0, 0, 0, 0.5, 0.336]),
        ("\na\n</reasoning>" + LINES.format("1002")[2:], [2, 0.5, 0.5, 0.5, 0.375], [0, 0, 0, 0.5, 0.5]),
        ("", [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
    ],
    "math500": [
        (LINES.format("\\boxed{1.5}"), [2, 1], [0, 0.75]), (LINES.format("\\boxed{\\frac32}"), [2, 1], [2, 0.75]),
        (LINES.format("\\frac{3}{2}"), [2, 0.75], [0, 0.75]), ("\\boxed{3}" + LINES.format("4"), [0, 0.75], [0, 0.75]),
        ("so \\boxed{\\frac32}", [2, 0.5], [2, 0.25]), ("so 3/2", [0, 0.25], [0, 0.25]),
    ],
    "countdown": [
        ("<answer>8*3+5</answer>", [1], [1]), ("<answer>of course</answer>", [0], [0.1]), ("\\boxed{8*3+5}", [1], [0]),
        ("<answer>8+3+5</answer>", [0.1], [0.1]), ("<answer>8*3+4</answer>", [0], [0.1]), ("29", [0], [0]),
        ("\\boxed{8 \\times 3 + 5 = 29}", [1], [0]),
    ],
    "sudoku": [(f"<answer>{GRID}</answer>", [1], [1]), (f"<answer>{GRID}", [1], [0])],
}
GRADED = {"gsm8k": "17", "math500": "17", "countdown": [[8, 3, 5], 29], "sudoku": GRID}
READABLE = ["\\frac{1}{2}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "2^{10}", "x^{2y}", "10!", "\\text{dx}", "\\cdot"]
NOT_READABLE = ["\\begin{vmatrix} 1 \\end{vmatrix}", "2^{3^4}", "2^{12345}", "5!!", "\\operatorname{x}", "d x", "1" * 40]
# fmt: on


def solved(task: str, completion: str, truth: Any, question: str = "q?") -> bool:
    grader = make_task(task, {})
    return grader.grade(grader.completion_truth({"question": question, "ground_truth": truth}), completion).solved


@pytest.mark.parametrize("task", ["gsm8k", "math500"])
@pytest.mark.parametrize("form", [TAGS, BOX], ids=["tags", "box"])
def test_a_number_is_read_however_it_is_written(task: str, form: str) -> None:
    written = [(text, value, "-1.5") for value, texts in NUMBERS.items() for text in texts]  # -2 1/2 is -2.5
    assert [text for text, value, _ in written if not solved(task, form.format(text), value)] == []
    for text, value, others in written + [(text, "nan", others) for text, others in NO_NUMBERS.items()]:
        for other in [*re.findall(r"[0-9]+(?:\.[0-9]+)?", text), *others.split()]:
            if value == "nan" or Fraction(other) != Fraction(value):
                assert not solved(task, form.format(text), other), (text, other)


def test_what_is_read_as_a_number_and_as_the_final_answer() -> None:
    for value, texts in NUMBERS.items():
        assert [text for text in texts if number(text) != Fraction(value) or plain(plain(text)) != plain(text)] == []
    assert [text for text in NO_NUMBERS if number(text) is not None] == []
    assert [(text, final(text)) for text, _ in FINALS] == FINALS
    for text, right in MARKS:
        assert solved("gsm8k", text, "18") == solved("math500", text, "18") == right, text[:60]
    assert number("Of 20 eggs 18 are left.", last=True) == 18 and number("Of 20 eggs 18 are left.") == 20  # in prose
    assert number("16 hours (two days)") == 16 and number("3 + 15", last=True) is number("9" * 80) is None
    assert solved("gsm8k", "\\boxed{4}<|eot_id|>\\boxed{5}", "4")  # nothing behind the end token


@pytest.mark.parametrize("form", [TAGS, BOX], ids=["tags", "box"])
def test_formulas_in_other_notations_are_equal_and_exactly_so(form: str) -> None:
    assert [row for row in FORMULAS if not solved("math500", form.format(row[0]), row[1])] == []
    assert [row for row in OTHER_FORMULAS if solved("math500", form.format(row[0]), row[1])] == []


def test_a_formula_is_finished_and_compared_in_time() -> None:
    assert same("\\frac{3}{2}", "1.5", "What power is it?")
    assert not same("\\frac{3}{2}", "1.5", "Express your answer as a common fraction.")
    for answer, truth in COSTLY:
        start = time.perf_counter()
        assert not solved("math500", BOX.format(answer), truth)
        assert time.perf_counter() - start < 4  # half a second of work, on a machine that has more to do


@pytest.mark.parametrize("form", [TAGS, "{}", "\\boxed{{{}}}", "so\nAnswer: {}"])
def test_expressions_in_other_notations(form: str) -> None:
    for rows, right in ((EXPRESSIONS, True), (NO_EXPRESSIONS, False)):
        for numbers, target, texts in rows:
            assert [t for t in texts if solved("countdown", form.format(t), [numbers, target]) != right] == []


def test_the_cells_of_a_grid_however_it_is_set() -> None:
    for answer in GRIDS:
        assert solved("sudoku", TAGS.format(answer), GRID, PUZZLE), answer
        assert not solved("sudoku", TAGS.format(answer.replace("3", "1").replace("３", "1")), GRID, PUZZLE)


@pytest.mark.parametrize("piece", LONG)
@pytest.mark.parametrize("task", ["gsm8k", "math500", "countdown", "sudoku"])
def test_a_text_of_200_000_characters_takes_a_second_at_most(task: str, piece: str) -> None:
    text = (piece * 200_000)[:200_000]
    truth = {"countdown": [[8, 3, 5], 29], "sudoku": GRID}.get(task, "18")
    for extraction in ("default", "published"):
        grader = make_task(f"{task}:extraction={extraction}", {})
        problem = grader.completion_truth({"question": PUZZLE, "ground_truth": truth})
        for completion in (text, TAGS.format(text), BOX.format(text)):
            start = time.process_time()
            assert not grader.grade(problem, completion).solved
            assert time.process_time() - start < 1.5  # with room for a machine at work
        for judge, _ in grader.released_rewards().values():
            start = time.process_time()
            judge(problem, text)
            assert time.process_time() - start < 1


@settings(max_examples=80, deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=40).map("".join)))
def test_reading_never_raises(text: str) -> None:
    for completion in (text, FORM.format(text), FORM.format(f"\\boxed{{{text}}}")):
        for spec in ("gsm8k", "gsm8k:extraction=published", "math500:extraction=published"):
            solved(spec, completion, "3")


def test_published_readings_as_released_and_a_task_without_a_released_reward() -> None:
    for task, completion, truth, right in PUBLISHED:
        assert solved(f"{task}:extraction=published", completion, truth) == right, completion
    for reader, rows in RELEASED.items():
        assert [(text, reader(text)) for text, _ in rows] == rows
    assert [(a, b) for a, b in RELEASED_EQUAL if not (released.same_latex(a, b) and released.same_latex(b, a))] == []
    assert not released.same_latex("1.5", "\\frac32") and not released.same_latex("x/2", "\\frac{x}{2}")
    with pytest.raises(UserError, match="task reasoning_gym has no released reward: set reward_funcs to"):
        reward_functions(["released"], [make_task("reasoning_gym:leg_counting", {})])


@pytest.mark.parametrize("task", PAID)
def test_rewards_by_hand(task: str) -> None:
    grader = make_task(f"{task}:template=tags" if task == "gsm8k" else task, {})
    columns: Any = {"problem": [grader.parse(ROWS[task])], "task": [grader], "prompts": ["p"]}
    for completion, *paid in PAID[task]:
        for names, values in zip(([], ["released"]), paid, strict=True):
            table = reward_functions(names, [grader]).values()
            found = [weight * (reward(completions=[completion], **columns)[0] or 0) for reward, weight in table]
            assert found == pytest.approx(values), (completion, names)


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


def test_what_math_verify_gets_and_in_any_thread() -> None:
    assert all(map(equivalence.readable, READABLE)) and not any(map(equivalence.readable, [*NOT_READABLE, "(" * 13]))
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(lambda i: same(f"x+{i}", f"{i} + x"), range(5, 9)))


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


def printed(code: str) -> list[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


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
    assert printed(code) == ["True", "refused", "refused", "refused"]


def test_the_worker_ends_with_its_program() -> None:
    code = "from unmask.tasks.math import equivalence as e; print(e.equivalent('2', '1+1'), e.WORKER.process.pid)"
    found, pid = printed(code)
    assert found == "True"
    for _ in range(100):
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    assert Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
