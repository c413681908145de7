"""Problems, splits, graders and rewards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask import Grade, Problem, Task, UserError, make_task
from unmask.cli import main
from unmask.errors import TooFewProblems
from unmask.tasks import TASKS, base
from unmask.tasks.answers import arithmetic, box_spans
from unmask.tasks.countdown import Countdown, worked_solution
from unmask.tasks.sudoku import heldout_grids, solved_grids

COMPACT = {
    "countdown": {"style": "compact", "max_value": 15, "max_target": 99, "operators": "+-*"},
    "sudoku": {"style": "compact", "min_empty": 4},
}


@pytest.mark.parametrize("spec", ["countdown", "countdown:numbers=4", "sudoku", "reasoning_gym:leg_counting"])
def test_problems_are_seeded_and_splits_disjoint(spec: str) -> None:
    task = make_task(spec, COMPACT)
    splits = {s: task.problems(s, 40, seed=3) for s in task.splits}
    assert splits["train"] == task.problems("train", 40, seed=3)
    assert splits["train"] != task.problems("train", 40, seed=4)
    assert splits["test"][:10] == task.problems("test", 10, seed=3)
    train = {task.identity(p) for p in splits["train"] + task.problems("train", 200, seed=99)}
    assert not any(task.identity(p) in train for p in splits["validation"] + splits["test"])


@pytest.mark.parametrize("spec", ["countdown", "countdown:numbers=4,operators=+-*/", "sudoku"])
def test_worked_responses_are_right(spec: str) -> None:
    task = make_task(spec, COMPACT)
    grades = [task.grade(problem, problem.response or "") for problem in task.problems("train", 100)]
    assert all(grade.solved and grade.points == grade.possible for grade in grades)


class Letters(Task):
    """Draws ``letters``; a space is a draw that brought no problem."""

    name = "letters"
    letters = "a abb cab "

    def draw(self, seed: int) -> Iterator[Problem | None]:
        return (None if letter == " " else Problem(letter, letter, {}) for letter in self.letters)

    def home_split(self, problem: Problem) -> str:
        return "test"

    def grade(self, problem: Problem, completion: str) -> Grade:
        return Grade.of(False, None)


def test_different_problems_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MAX_CONSECUTIVE_DUPLICATES", 3)
    assert [p.id for p in Letters().problems("test", 3)] == ["a", "b", "c"]
    for letters in ("a abb cab d", "a abb c"):  # misses in a row, and no more draws
        monkeypatch.setattr(Letters, "letters", letters)
        with pytest.raises(TooFewProblems, match="only 3 different test problems of task letters exist: ask for fewer"):
            Letters().problems("test", 4)
    monkeypatch.setattr(base, "MAX_CONSECUTIVE_DUPLICATES", 60)
    for spec in ("countdown:max_value=5,max_target=10", "sudoku:min_empty=1,max_empty=1", "reasoning_gym:coin_flip"):
        with pytest.raises(TooFewProblems, match=r"only \d+ different test .*: ask for fewer"):
            make_task(spec, {}).problems("test", 10**9)


def test_sudoku_grids() -> None:
    grids = solved_grids()
    assert len(grids) == len(set(grids)) == 288
    assert len(heldout_grids()) == 29
    task = make_task("sudoku", COMPACT)
    for split in ("train", "validation", "test"):
        assert not {p.truth["solution"] for p in task.problems(split, 60)} & heldout_grids()
    assert {p.truth["solution"] for p in task.problems("heldout", 60)} <= heldout_grids()
    for problem in make_task("sudoku:max_empty=12", {}).problems("test", 60):  # each has one solution
        puzzle, solution = problem.truth["puzzle"], problem.truth["solution"]
        fits = [g for g in solved_grids() if all(p in ("0", c) for p, c in zip(puzzle, g, strict=True))]
        assert fits == [solution]


def test_sudoku_grade_by_hand() -> None:
    task = make_task("sudoku", {})
    problem = task.parse({"Puzzle": "0102200002100320", "Solution": "3142243142131324"})
    half = "<answer>3142 2431 4444 4444</answer>"
    grade = task.grade(problem, half)
    # Empty cells: 0, 2, 5, 6, 7, 8, 11, 12, 15 = 9. Right of them: 0, 2, 5, 6, 7, 8 (4), 15 (4) = 7.
    assert (grade.points, grade.possible, grade.solved) == (7.0, 9.0, False)
    assert task.reward(problem, half) == 7 / 9
    assert task.grade(problem, "no answer at all").points == 0
    assert task.grade(problem, "<answer>a3142 b2431 c4213 d1324").solved  # left open, with labels


def test_worked_solution_by_hand() -> None:
    # Pairs in order: 3+8=11 (11, 5 reach 55, 16, 6: not 29), 8-3=5 (10, 25), 3*8=24 (24+5=29).
    expected = "<reasoning>3+8=11 8-3=5 3*8=24 5+24=29</reasoning><answer>5+3*8</answer>"
    assert worked_solution((3, 8, 5), 29, "+-*") == expected
    assert worked_solution((1, 1, 1), 50, "+-*") is None


def brute_force(numbers: tuple[int, ...], target: int) -> bool:
    """Whether + - * over positive results reach the target, by plain recursion."""
    if len(numbers) == 1:
        return numbers[0] == target
    pairs = ((value, rest) for a, b, *rest in permutations(numbers) for value in (a + b, a - b, a * b) if value > 0)
    return any(brute_force((value, *rest), target) for value, rest in pairs)


@given(st.tuples(*[st.integers(1, 15)] * 3), st.integers(1, 99))
def test_search_finds_an_answer_exactly_when_there_is_one(numbers: tuple[int, ...], target: int) -> None:
    response = worked_solution(numbers, target, "+-*")
    assert (response is not None) == brute_force(numbers, target)
    if response is not None:
        task = Countdown(style="compact")
        assert task.grade(task.problem(numbers, target), response).solved
        for step in response.split("<reasoning>")[1].split("</reasoning>")[0].split():
            left, right = step.split("=")
            value = arithmetic(left)
            assert value is not None and value[0] == int(right)


def test_arithmetic_and_boxes_by_hand() -> None:
    assert arithmetic("1/3*3") == (Fraction(1), [1, 3, 3]) and arithmetic("1/0") is None
    assert arithmetic("(07 - 2) * -3") == (Fraction(-15), [7, 2, 3])
    text = "\\boxed{a{b}c} x \\boxed {2}"
    assert [text[slice(*span)] for span in box_spans(text)] == ["a{b}c", "2"]


def test_countdown_rewards_by_hand() -> None:
    task = make_task("countdown", {})
    problem = task.parse({"input": "8,3,5", "output": "29"})
    for answer, paid in (
        ("8*3+5", 1.0),
        ("\\boxed{8 \\times 3 + 5 = 29}", 1.0),
        ("8+3+5", 0.1),
        ("8*3+4", 0.0),
        ("29", 0.0),
    ):
        assert task.reward(problem, f"<answer>{answer}</answer>") == paid
    assert task.grade(problem, "<answer>29 = 8*3+5</answer>").solved
    assert not make_task("countdown:operators=+-", {}).grade(problem, "8*3+5").solved  # an operator not allowed


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sudko", "did you mean 'sudoku'"),
        ("countdown:number=3", "did you mean 'numbers'"),
        ("countdown:numbers=x", "numbers of task 'countdown' is 'x'"),
        ("countdown:numbers=9", "choose 2 to 6"),
        ("countdown:numbers", "name:key=value"),
        ("countdown:style=short", "choose from compact, paper"),
        ("nowhere:Task", "cannot import task 'nowhere:Task': ModuleNotFoundError"),
        ("docs.examples.reversal:Problem,x=3", "is no subclass of unmask.Task"),
        ("docs.examples.reversal:Reversal,lenth=3", "did you mean 'length'"),
        ("sudoku:min_empty=9,max_empty=3", "1 <= min <= max"),
        ("reasoning_gym:leg_countin", "did you mean 'leg_counting'"),
        ("reasoning_gym:countdown", "use task 'countdown'"),
        ("reasoning_gym:leg_counting,max_animal=3", "did you mean 'max_animals'"),
    ],
)
def test_wrong_task_specs_name_the_fix(spec: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(UserError, match=message):
        make_task(spec, {})


def test_data_files(tmp_path: Path) -> None:
    countdown, sudoku = tmp_path / "c.jsonl", tmp_path / "s.csv"
    countdown.write_text('{"input": "30,100,93", "output": "23"}\n')
    assert make_task(f"countdown:data={countdown}", {}).problems("test", None)[0].truth["numbers"] == [30, 100, 93]
    sudoku.write_text("Puzzle,Solution\n3102200002100320,3142243142131324\n")
    assert make_task(f"sudoku:data={sudoku}", {}).problems("test", None)[0].truth["solution"] == "3142243142131324"
    countdown.write_text(json.dumps({"input": "1,2", "output": "x"}))
    with pytest.raises(UserError, match=r"c\.jsonl:1 is no problem of task countdown"):
        make_task(f"countdown:data={countdown}", {}).problems("test", None)


def test_a_task_of_ones_own(tmp_path: Path, toy_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of the docs: its problems, its reward, an evaluation; and the same task by a registered name."""
    monkeypatch.chdir(Path(__file__).parent.parent)
    spec = "docs.examples.reversal:Reversal,length=3"
    task = make_task(spec, {})
    problem = task.problems("train", 4)[0]
    word = problem.truth["answer"]
    assert problem.question == f"reverse {word[::-1]}" and task.grade(problem, f" {word}\n").solved
    reward, weight = task.rewards()["letters"]
    assert [weight * reward(problem, text) for text in (word, word[:2])] == [1.0, 2 / 3]
    flags = ["--model", toy_folder, "--limit", "2", "--max-new-tokens", "4", "--output", str(tmp_path / "eval")]
    assert main(["eval", "--task", spec, "--decoder", "full:steps=2", *flags]) == 0
    assert json.loads((tmp_path / "eval" / "summary.json").read_text())["cells"][0]["task"] == spec
    assert TASKS.register("backwards")(type(task)) is type(task)
    assert make_task("backwards:length=3", {"reversal": {"length": 4}}) == task != make_task("backwards", {})
    del TASKS["backwards"]
