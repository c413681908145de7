"""reasoning-gym as tasks: which data sets are refused, what a verifier may do, and what happens to one that takes forever."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from unmask import Problem, UserError, make_task
from unmask.tasks.base import stream_seed
from unmask.tasks.reasoning_gym import SIZES, WORKER

EXECUTE = ("intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration")
REFUSED = dict.fromkeys(EXECUTE, "would execute model text")
REFUSED |= {"complex_arithmetic": "pays 1 for the answer 'nan'"}
REFUSED |= {"game_of_life_halting": "pays 1 for the answer 'nonsense'"}
REFUSED |= {"composite": "refuses its parameters: Must specify at least one dataset"}
REFUSED |= {"countdown": "would execute model text: use task 'countdown' instead"}
# Half a second or more each; and those that pass an answer that is no match to eval.
SLOW = {"arc_agi", "codeio", "figlet_font", "group_anagrams", "knight_swap", "quantum_lock"}
EVALUATES = {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"}
FOREVER = {"coin_flip": "1e999999999", "rubiks_cube": "R99999999", "rush_hour": "A+999999999"}


@pytest.mark.parametrize("name", REFUSED)
def test_data_sets_that_cannot_be_graded_are_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=rf"reasoning_gym:{name}\b.*{REFUSED[name]}"):
        make_task(f"reasoning_gym:{name}", {})


def test_every_other_data_set_is_accepted_and_executes_nothing(tmp_path: Path) -> None:
    made, names = tmp_path / "made", set(DATASETS) - set(REFUSED) - set(SIZES) - SLOW
    assert names > EVALUATES
    for name in sorted(names):
        task = make_task(f"reasoning_gym:{name}", {})
        for code in (f"__import__('os').system('touch {made}')", write := f"open({str(made)!r}, 'w')", f"[{write}]"):
            assert task.ask("score", 0, 0, code) < 0.5, (name, code)
    assert not made.exists()


@pytest.mark.parametrize("name", SIZES)
def test_data_sets_that_build_a_list_answer_quickly(name: str) -> None:
    start = time.perf_counter()
    assert len(make_task(f"reasoning_gym:{name}", {}).problems("test", 5)) == 5
    assert time.perf_counter() - start < 10


def test_problems_are_those_of_the_data_set_and_its_verifier_grades_them() -> None:
    task = make_task("reasoning_gym:leg_counting,max_animals=4", {})
    source = reasoning_gym.create_dataset("leg_counting", seed=stream_seed(3), size=200, max_animals=4)
    test = [entry for entry in source if task.home_split(Problem("", entry["question"], {})) == "test"][:8]
    problems = task.problems("test", 8, seed=3)
    assert [p.question for p in problems] == [entry["question"] for entry in test]
    reward, weight = task.rewards()["leg_counting"]
    right = (f"<answer>{entry['answer']}</answer>" for entry in test)
    assert [weight * reward(*pair) for pair in zip(problems, right, strict=True)] == [1.0] * 8
    assert not task.grade(problems[0], "<answer>-1</answer>").solved


@pytest.mark.parametrize(("name", "answer"), FOREVER.items())
def test_an_answer_that_takes_forever_is_wrong_and_the_next_one_is_graded(name: str, answer: str) -> None:
    task = make_task(f"reasoning_gym:{name}", {})
    problem = task.problems("test", 1)[0]
    start = time.perf_counter()
    assert task.grade(problem, f"<answer>{answer}</answer>").points == 0.0
    assert time.perf_counter() - start < 10  # a half, and a machine at work
    assert task.grade(problem, "<answer>R</answer>").points < 0.5
    right = reasoning_gym.create_dataset("leg_counting", seed=0, size=1)[0]["answer"]
    assert make_task("reasoning_gym:leg_counting", {}).ask("score", 0, 0, right) == 1.0


def test_a_process_that_is_gone_is_replaced_by_one_with_the_same_problems() -> None:
    """Questions of ransom_note follow the order of a set, which differs from process to process in Python."""
    task: Any = make_task("reasoning_gym:ransom_note", {})
    before = [task.ask("question", 0, index) for index in range(3)]
    assert WORKER.process is not None
    WORKER.process.kill()
    WORKER.replies.cache_clear()
    assert [task.ask("question", 0, index) for index in range(3)] == before


TOY = """
import os, socket, subprocess, sys
from dataclasses import dataclass
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import register_dataset
from unmask.tasks import reasoning_gym as task
made = sys.argv[1]
ACTS = {
    "eval": lambda: eval("1"), "exec": lambda: exec("1"), "exit": lambda: sys.exit(0), "fork": lambda: os.fork(),
    "open": lambda: open(made, "w"), "os.open": lambda: os.open(made, os.O_CREAT | os.O_WRONLY),
    "mkdir": lambda: os.mkdir(made), "system": lambda: os.system(f"touch {made}"),
    "subprocess": lambda: subprocess.run(["touch", made]),
    "socket": lambda: socket.create_connection(("127.0.0.1", 9)), "nothing": lambda: float("nan"),
    "own": lambda: eval("6 * 7") / 42, "import": lambda: bool(__import__("colorsys")),
    "read": lambda: bool(open(os.devnull).close() is None),
}
@dataclass
class Config:
    seed: int = 0
    size: int = 1
class Toy(ProceduralDataset):
    def __getitem__(self, index):
        return {"question": "?", "answer": "own", "metadata": {"formula": "6 * 7"}}
    def score_answer(self, answer, entry):
        entry["answer"] = "spoiled"
        return ACTS[answer]() or 1.0
register_dataset("toy", Toy, Config)
answer = task.prepare()
task.bounded.limit_time = lambda seconds: None
assert answer("probe", "toy", []) == "", answer("probe", "toy", [])
print([name for name in ACTS if answer("score", "toy", [], 0, 0, name)], os.path.exists(made), eval("2 + 2"))
"""


def test_what_a_verifier_may_do(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TOY, str(tmp_path / "made")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['own', 'import', 'read'] False 4"
