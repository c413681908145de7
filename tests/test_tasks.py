"""Problems, splits, prompts, graders and rewards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from itertools import permutations
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from test_answers import FORM, solved
from unmask import Grade, Problem, Task, UserError, make_task
from unmask.cli import main
from unmask.errors import TooFewProblems
from unmask.tasks import TASKS, base
from unmask.tasks.answers import arithmetic, box_spans
from unmask.tasks.countdown import Countdown, worked_solution
from unmask.tasks.math.gsm8k import GSM8K
from unmask.tasks.math.math500 import MATH500
from unmask.tasks.sudoku import heldout_grids, solved_grids

COMPACT = {"countdown": {"style": "compact", "max_value": 15, "max_target": 99, "operators": "+-*"}}
COMPACT["sudoku"] = {"style": "compact", "min_empty": 4}
COMPACT["chain_sum"] = {"style": "compact"}
SPECS = ["countdown", "countdown:numbers=4", "countdown:numbers=4,operators=+-*/", "sudoku"]
SPECS += ["chain_sum", "chain_sum:min_terms=8,max_terms=8,max_digits=4"]
NAMES = ("gsm8k", "math500")
WRONG_SPECS = [
    ("sudko", "did you mean 'sudoku'"), ("countdown:number=3", "did you mean 'numbers'"),
    ("countdown:numbers=x", "numbers of task 'countdown' is 'x'"), ("countdown:numbers=9", "choose 2 to 6"),
    ("countdown:numbers", "name:key=value"), ("countdown:style=short", "choose from compact, paper, sentence"),
    ("nowhere:Task", "cannot import task 'nowhere:Task': ModuleNotFoundError"),
    ("test_tasks:Nameless", "task 'test_tasks:Nameless' has no name: write name ="),
    ("docs.examples.reversal:Problem,x=3", "is no subclass of unmask.Task"),
    ("docs.examples.reversal:Reversal,lenth=3", "did you mean 'length'"), ("reasoning_gym:countdown", "use task 'countdown'"),
    ("reasoning_gym:leg_countin", "did you mean 'leg_counting'"), ("sudoku:min_empty=9,max_empty=3", "1 <= min <= max"),
    ("chain_sum:max_terms=2", "2 <= min <= max <= 20"), ("chain_sum:min_digits=3", "1 <= min <= max <= 9"),
    ("reasoning_gym:leg_counting,max_animal=3", "did you mean 'max_animals'"),
]  # fmt: skip
FAULTY = [
    ("a.jsonl", '{"question": "Q?", "answer": "7"}\n', r"a\.jsonl:1 is no problem of task gsm8k"),
    ("a.jsonl", '{"question": "Q?", "answer": "#### 7"}\n[1]\n', r"a\.jsonl:2 is not a JSON object"),
    ("a.jsonl", '{"question": "\\ud800", "answer": "#### 7"}\n', r"a\.jsonl:1 is not a JSON object"),
    ("a.parquet", "x", "cannot read the data file"), ("a.jsonl", None, r"cannot read .*a\.jsonl"),
    (".", None, r"no \.json, \.jsonl, \.parquet file of the test split .*: use a folder with train"),
]  # fmt: skip


@pytest.mark.parametrize("spec", [*SPECS, "reasoning_gym:leg_counting"])
def test_problems_are_seeded_and_splits_disjoint_and_worked_responses_right(spec: str) -> None:
    task = make_task(spec, COMPACT)
    splits = {s: task.problems(s, 40, seed=3) for s in task.splits}
    assert splits["train"] == task.problems("train", 40, seed=3)
    assert splits["train"] != task.problems("train", 40, seed=4)
    assert splits["test"][:10] == task.problems("test", 10, seed=3)
    train = {task.identity(p) for p in splits["train"] + task.problems("train", 200, seed=99)}
    assert not any(task.identity(p) in train for p in splits["validation"] + splits["test"])
    for problem in task.problems("train", 100) if spec in SPECS else ():
        grade = task.grade(problem, problem.response or "")
        assert grade.solved and grade.points == grade.possible


class Nameless(Task): ...


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


@pytest.mark.parametrize(
    ("method", "made", "says"),
    [
        ("grade", lambda *_: {}["x"], r"grade of task letters raised KeyError\('x'\) on problem 'a': repair it"),
        ("grade", lambda *_: True, "grade of task letters returned True on problem 'a': return a Grade"),
        ("draw", lambda *_: (Problem() for _ in range(9)), "draw of task letters raised TypeError"),  # type: ignore[call-arg]
        ("draw", lambda *_: iter([]), "only 0 different test problems .*: let draw make more different ones"),
    ],
)
def test_a_faulty_task_is_one_sentence(method: str, made: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Letters, method, made)
    with pytest.raises(UserError, match=says):
        base.grade_completion(Letters(), Letters().problems("test", 1)[0], "text")


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
    assert len(grids) == len(set(grids)) == 288 and len(heldout_grids()) == 29
    task = make_task("sudoku", COMPACT)
    for split in ("train", "validation", "test"):
        assert not {p.truth["solution"] for p in task.problems(split, 60)} & heldout_grids()
    assert {p.truth["solution"] for p in task.problems("heldout", 60)} <= heldout_grids()
    for problem in make_task("sudoku:max_empty=12", {}).problems("test", 60):  # each has one solution
        puzzle, solution = problem.truth["puzzle"], problem.truth["solution"]
        fits = [g for g in solved_grids() if all(p in ("0", c) for p, c in zip(puzzle, g, strict=True))]
        assert fits == [solution]


def test_sudoku_grade_by_hand() -> None:
    task, half = make_task("sudoku", {}), "<answer>3142 2431 4444 4444</answer>"
    problem = task.parse({"Puzzle": "0102200002100320", "Solution": "3142243142131324"})
    grade = task.grade(problem, half)
    # Empty cells: 0, 2, 5, 6, 7, 8, 11, 12, 15 = 9. Right of them: 0, 2, 5, 6, 7, 8 (4), 15 (4) = 7.
    assert (grade.points, grade.possible, grade.solved) == (7.0, 9.0, False)
    assert task.reward(problem, half) == 7 / 9
    assert task.grade(problem, "no answer at all").points == 0
    assert task.grade(problem, "<answer>a3142 b2431 c4213 d1324").solved  # left open, with labels


def test_worked_solution_by_hand() -> None:
    # Pairs in order: 3+8=11 (11, 5 reach 55, 16, 6: not 29), 8-3=5 (10, 25), 3*8=24 (24+5=29).
    expected = "<reasoning>3+8=11 8-3=5 3*8=24 5+24=29</reasoning><answer>5+3*8</answer>"
    assert worked_solution((3, 8, 5), 29, "+-*") == expected and worked_solution((1, 1, 1), 50, "+-*") is None


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
            assert (arithmetic(left) or (None,))[0] == int(right)


def test_arithmetic_boxes_and_countdown_grades_by_hand() -> None:
    assert arithmetic("1/3*3") == (Fraction(1), [1, 3, 3]) and arithmetic("1/0") is None
    assert arithmetic("(07 - 2) * -3") == (Fraction(-15), [7, 2, 3])
    text = "\\boxed{a{b}c} x \\boxed {2}"
    assert [text[slice(*span)] for span in box_spans(text)] == ["a{b}c", "2"]
    task = make_task("countdown", {})
    problem = task.parse({"input": "8,3,5", "output": "29"})
    assert task.grade(problem, "<answer>29 = 8*3+5</answer>").solved
    assert not make_task("countdown:operators=+-", {}).grade(problem, "8*3+5").solved  # an operator not allowed


def test_chain_sums_by_hand() -> None:
    task = make_task("chain_sum:style=compact", {})
    problem = task.problem("47+85-12")
    expected = "<reasoning>47+85=132 132-12=120</reasoning><answer>120</answer>"
    assert (problem.question, problem.response) == ("compute 47+85-12", expected)
    assert task.problem("47-85+90") is None  # 38 below zero on the way
    for text in ("so it is\n#### 120", "\\boxed{120}", "<answer>120.0</answer>"):
        assert task.grade(problem, text).solved
    for text in ("<answer>132</answer>", "120", "", "9" * 9999):
        assert not task.grade(problem, text).solved


@pytest.mark.parametrize("name", ["sudoku", "countdown", "chain_sum"])
def test_wordings_ask_the_same(name: str) -> None:
    """Another prompt for the same problems with the same worked responses."""
    compact, sentence = (
        make_task(f"{name}:style={style}", {}).problems("test", 20) for style in ("compact", "sentence")
    )
    for a, b in zip(compact, sentence, strict=True):
        assert (a.id, a.truth, a.response) == (b.id, b.truth, b.response) and a.question != b.question


@pytest.mark.parametrize(("spec", "message"), WRONG_SPECS)
def test_wrong_task_specs_name_the_fix(spec: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(UserError, match=message):
        make_task(spec, {})


def test_data_files(tmp_path: Path) -> None:
    countdown, sudoku = tmp_path / "c.jsonl", tmp_path / "s.csv"
    countdown.write_text('{"input": "30,100,93", "output": "23"}\n')
    sudoku.write_text("Puzzle,Solution\n3102200002100320,3142243142131324\n")
    specs = (f"countdown:data={countdown}", f"sudoku:data={sudoku}")
    numbers, grid = (make_task(spec, {}).problems("test", None)[0].truth for spec in specs)
    assert numbers["numbers"] == [30, 100, 93] and grid["solution"] == "3142243142131324"


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


# ---- GSM8K and MATH500 ----------------------------------------------------------------------------------------------


def row(name: str, i: int) -> dict[str, Any]:
    if name == "math500":
        return {"problem": f"What is $\\frac{{1}}{{{i}}}$?", "solution": f"It is \\boxed{{\\frac{{1}}{{{i}}}}}."}
    answer = f"Two hold 2*{i}=<<2*{i}={2 * i}>>{2 * i}.\n#### {2 * i:,}"
    return {"question": f"A box holds {i} eggs. And two?", "answer": answer}


@pytest.mark.parametrize("name", NAMES)
def test_splits_of_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row(name, i)) + "\n" for i in range(1, 401)))
    last = [row(name, i) for i in range(401, 406)]
    questions = [r.get("problem", r.get("question")) for r in last]
    if name == "math500":  # in the form of other copies
        last = [{"question": r["problem"], "ground_truth_answer": r["solution"][13:-2]} for r in last]
    (tmp_path / "test.json").write_text(json.dumps(last))
    task = make_task(f"{name}:data={tmp_path}", {})
    train, validation, test = (task.problems(s, None, seed=1) for s in ("train", "validation", "test"))
    assert len(train) + len(validation) == 400 and 20 < len(validation) < 65
    assert [p.question for p in test] == questions
    assert not {p.id for p in train} & {p.id for p in validation}
    other = task.problems("train", None, seed=2)
    assert {p.id for p in other} == {p.id for p in train} and other != train
    assert task.problems("validation", None, seed=2) == validation and task.problems("train", 7, seed=1) == train[:7]
    assert all(p.response and task.grade(p, p.response).solved for p in train[:20] + validation[:20])


def test_problems_of_the_published_forms_and_completions() -> None:
    problem = GSM8K().parse({"question": "Q?", "answer": "Half is 4/2=<<4/2=2>>2.\nSo 1,002.\n#### 1,002"})
    assert problem.truth == {"answer": "1002", "stated": "1,002"}
    assert problem.response == "\nHalf is 4/2=2.\nSo 1,002.\n</reasoning>\n<answer>\n\\boxed{1002}\n</answer>"
    tags = GSM8K(template="tags").parse({"question": "Q?", "answer": "So 7.\n#### 7"})
    assert tags.response == "\nSo 7.\n</reasoning>\n<answer>\n7\n</answer>"
    hub = {"problem": "Q?", "solution": "x \\boxed{9}", "answer": "8", "level": 2, "unique_id": "a"}
    assert MATH500().parse(hub).truth == {"answer": "8"}
    local = MATH500().parse({"question": "Q?", "ground_truth_answer": "8"})
    assert (local.id, local.response) == (MATH500().parse(hub).id, None)  # one identity, wherever it comes from
    for braceless in ("so $\\boxed 8$.", "so $\\fbox{8}$."):
        assert MATH500().parse({"problem": "Q?", "solution": braceless}).truth == {"answer": "8"}
    # Completions made elsewhere:
    assert MATH500().completion_truth({"question": "Q?", "ground_truth": "\\frac14"}).truth == {"answer": "\\frac14"}
    assert solved("gsm8k", FORM.format("\\boxed{1,200}"), 1200.0)
    for spec in ("gsm8k", "gsm8k:extraction=published"):  # no truth, no right answer
        assert not solved(spec, "\\boxed{3}", None)


def test_a_copy_of_a_hub_data_set_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "main").mkdir()
    files = [{"split": split, "path": f"main/{split}-*"} for split in ("train", "test")]
    configs = json.dumps([{"config_name": "main", "data_files": files}])
    (tmp_path / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
    for split, rows in (("train", range(1, 60)), ("test", range(60, 63))):
        table = pyarrow.Table.from_pylist([row("gsm8k", i) for i in rows])
        parquet.write_table(table, tmp_path / "main" / f"{split}-00000-of-00001.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    task = make_task(f"gsm8k:data={tmp_path}", {})
    assert [p.question for p in task.problems("test", None)] == [row("gsm8k", i)["question"] for i in range(60, 63)]
    assert len(task.problems("train", None)) + len(task.problems("validation", None)) == 59
    file = tmp_path / "main" / "test-00000-of-00001.parquet"
    assert make_task(f"gsm8k:data={file}", {}).problems("test", None) == task.problems("test", None)


def test_the_hub_is_the_default_source_and_no_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {"openai/gsm8k": "gsm8k", "HuggingFaceH4/MATH-500": "math500", "ankner/math-500": "math500"}
    asked = []

    def load(name: str, configuration: str | None, split: str) -> list[dict[str, str]]:
        asked.append((name, configuration, split))
        return [row(sources[name], i) for i in range(1, 101)]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in NAMES:
        task = make_task(name, {})
        assert len(task.problems("test", None)) == 100 and len(task.problems("test", 3)) == 3
        assert len(task.problems("train", None)) + len(task.problems("validation", None)) == 100
        with pytest.raises(UserError, match=r"problems, not 5000: ask for fewer"):
            task.problems("train", 5000)
    ours = {("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")}
    assert set(asked) == ours | {("HuggingFaceH4/MATH-500", None, "test"), ("ankner/math-500", None, "train")}
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=OSError("no route")))
    for name, source in (("gsm8k", "openai/gsm8k"), ("math500", "HuggingFaceH4/MATH-500")):
        with pytest.raises(UserError) as raised:
            make_task(name, {}).problems("test", 3)
        said = f"could not download the data set {source} (no route): use a local file or folder as {name}:data=PATH"
        assert str(raised.value) == said


@pytest.mark.parametrize(("file", "content", "message"), FAULTY)
def test_faulty_sources_are_named(tmp_path: Path, file: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        make_task(f"gsm8k:data={tmp_path / file}", {}).problems("test", None)
    with pytest.raises(UserError, match="holds test problems: split 'train'" if file != "." else "train split"):
        make_task(f"gsm8k:data={tmp_path / file}", {}).problems("train", 3)


def test_prompts(tmp_path: Path) -> None:
    task: Any = make_task("gsm8k", {})
    problem = task.make_problem("How many?", "3")
    for name in NAMES:
        boxed, tags = (make_task(f"{name}:template={t}", {}) for t in ("boxed", "tags"))
        assert make_task(name, {}) == boxed and boxed.prefill == tags.prefill == "<reasoning>"
        assert "\\boxed{" in boxed.instruction(problem) and "\\boxed" not in tags.instruction(problem)
        for text in (boxed.instruction(problem), tags.instruction(problem)):
            assert text.endswith(problem.question) and "<reasoning>\n" in text and "\n</answer>" in text
    file = tmp_path / "template.txt"
    file.write_text("Q: {question} {x}\nA:")
    own = make_task(f"gsm8k:template={file}", {})
    assert own.instruction(problem) == "Q: How many? {x}\nA:" and own.config()["template_text"] == file.read_text()
    file.write_text("Q:")
    wrong = {f"template={file}": r"lacks \{question\}", "style=compact": "has no style 'compact'"}
    wrong["template=box"] = "cannot read the template .boxed, tags or a file. box"
    for spec, message in wrong.items():
        with pytest.raises(UserError, match=message):
            make_task(f"math500:{spec}", {})
