"""GSM8K and MATH500: problems from files and the hub, splits, prompts, rewards."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from unmask import Task, UserError, make_task
from unmask.tasks.math.gsm8k import GSM8K
from unmask.tasks.math.math500 import MATH500

FORM = "steps\n</reasoning>\n<answer>\n{}\n</answer>"


def gsm8k(answer: str) -> Any:
    return GSM8K().made("How many?", answer, None)


def math500(answer: str) -> Any:
    return MATH500().made("How many?", answer, None)


def gsm8k_row(i: int) -> dict[str, str]:
    return {
        "question": f"A box holds {i} eggs. And two?",
        "answer": f"Two hold 2*{i}=<<2*{i}={2 * i}>>{2 * i}.\n#### {2 * i:,}",
    }


def math_row(i: int) -> dict[str, str]:
    return {"problem": f"What is $\\frac{{1}}{{{i}}}$?", "solution": f"It is \\boxed{{\\frac{{1}}{{{i}}}}}."}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Both tasks as folders with 400 training problems and 5 test problems."""
    for name, row in (("gsm8k", gsm8k_row), ("math500", math_row)):
        (tmp_path / name).mkdir()
        lines = [json.dumps(row(i)) for i in range(1, 406)]
        (tmp_path / name / "train.jsonl").write_text("\n".join(lines[:400]) + "\n")
        rows = [json.loads(line) for line in lines[400:]]
        if name == "math500":
            rows = [{"question": r["problem"], "ground_truth_answer": r["solution"][13:-2]} for r in rows]
        (tmp_path / name / "test.json").write_text(json.dumps(rows))
    return {name: tmp_path / name for name in ("gsm8k", "math500")}


@pytest.mark.parametrize("name", ["gsm8k", "math500"])
def test_splits_of_a_folder(folders: dict[str, Path], name: str) -> None:
    task = make_task(f"{name}:data={folders[name]}", {})
    train, validation, test = (task.problems(s, None, seed=1) for s in ("train", "validation", "test"))
    assert len(train) + len(validation) == 400 and 20 < len(validation) < 65 and len(test) == 5
    assert not {p.id for p in train} & {p.id for p in validation}
    other = task.problems("train", None, seed=2)
    assert {p.id for p in other} == {p.id for p in train} and other != train
    assert task.problems("validation", None, seed=2) == validation
    assert task.problems("train", 7, seed=1) == train[:7]
    assert [p.question for p in test] == [
        (gsm8k_row if name == "gsm8k" else math_row)(i)[key(name)] for i in range(401, 406)
    ]
    assert all(p.response and task.grade(p, p.response).solved for p in train[:20] + validation[:20])
    assert {train[0].id} == {p.id for p in task.problems("train", None, seed=9) if p.question == train[0].question}


def key(name: str) -> str:
    return "question" if name == "gsm8k" else "problem"


def test_problems_of_the_published_forms(tmp_path: Path) -> None:
    task = GSM8K()
    problem = task.problem({"question": "Q?", "answer": "Half is 4/2=<<4/2=2>>2.\nSo 1,002.\n#### 1,002"})
    assert problem.truth == {"answer": "1002", "stated": "1,002"}
    assert problem.response == "\nHalf is 4/2=2.\nSo 1,002.\n</reasoning>\n<answer>\n\\boxed{1002}\n</answer>"
    tags = GSM8K(prompt="tags").problem({"question": "Q?", "answer": "So 7.\n#### 7"})
    assert tags.response == "\nSo 7.\n</reasoning>\n<answer>\n7\n</answer>"
    hub = {
        "problem": "Q?",
        "solution": "x \\boxed{9}",
        "answer": "8",
        "subject": "Algebra",
        "level": 2,
        "unique_id": "a",
    }
    assert MATH500().problem(hub).truth == {"answer": "8"}
    local = MATH500().problem({"question": "Q?", "ground_truth_answer": "8"})
    assert (local.id, local.response) == (MATH500().problem(hub).id, None)  # one identity, wherever it comes from
    for braceless in ("so $\\boxed 8$.", "so $\\fbox{8}$."):
        assert MATH500().problem({"problem": "Q?", "solution": braceless}).truth == {"answer": "8"}
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([hub]), tmp_path / "t.parquet")
    assert make_task(f"math500:data={tmp_path}/t.parquet", {}).problems("test", None) == [MATH500().problem(hub)]


def test_a_copy_of_a_hub_data_set_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "main").mkdir()
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n"
        "  - split: test\n    path: main/test-*\n---\n"
    )
    for split, rows in (("train", range(1, 60)), ("test", range(60, 63))):
        table = pyarrow.Table.from_pylist([gsm8k_row(i) for i in rows])
        parquet.write_table(table, tmp_path / "main" / f"{split}-00000-of-00001.parquet")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    task = make_task(f"gsm8k:data={tmp_path}", {})
    assert [p.question for p in task.problems("test", None)] == [gsm8k_row(i)["question"] for i in range(60, 63)]
    assert len(task.problems("train", None)) + len(task.problems("validation", None)) == 59


def test_the_hub_is_the_default_source(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    asked = []

    def load(name: str, configuration: str | None, split: str) -> list[dict[str, str]]:
        asked.append((name, configuration, split))
        return [(gsm8k_row if name == "openai/gsm8k" else math_row)(i) for i in range(1, 101)]

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    for name in ("gsm8k", "math500"):
        task = make_task(name, {})
        assert len(task.problems("test", None)) == 100 and len(task.problems("test", 3)) == 3
        assert len(task.problems("train", None)) + len(task.problems("validation", None)) == 100
        with pytest.raises(UserError, match=r"problems, not 5000: ask for fewer"):
            task.problems("train", 5000)
    assert set(asked) == {
        ("openai/gsm8k", "main", "test"),
        ("openai/gsm8k", "main", "train"),
        ("HuggingFaceH4/MATH-500", None, "test"),
        ("ankner/math-500", None, "train"),
    }


def test_no_network_is_one_sentence_and_fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets
    import huggingface_hub

    was = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for name, source in (("gsm8k", "openai/gsm8k"), ("math500", "HuggingFaceH4/MATH-500")):
        start = time.perf_counter()
        with pytest.raises(UserError) as raised:
            make_task(name, {}).problems("test", 3)
        assert time.perf_counter() - start < 10
        message = str(raised.value)
        assert message.startswith(f"the data set {source} cannot be had from the hub (") and "\n" not in message
        assert message.endswith(f"give a local file or folder as {name}:data=PATH")
    assert was == (huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.jsonl", '{"question": "Q?", "answer": "7"}\n', r"a\.jsonl:1 is no problem of task gsm8k"),
        ("a.jsonl", '{"question": "Q?", "answer": "#### 7"}\n[1]\n', r"a\.jsonl:2 is \[1\]: write a JSON object"),
        ("a.jsonl", "{\n", r"a\.jsonl:1 is not JSON"),
        ("a.json", "7", r"a\.json:1 is 7: write a JSON object"),
        ("a.json", "[]", r"a\.json holds no rows"),
        ("a.parquet", "x", "cannot read the data file"),
        ("a.txt", "x", r"give \.json, \.jsonl, \.parquet or a folder"),
    ],
)
def test_faulty_files_are_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        make_task(f"gsm8k:data={tmp_path / file}", {}).problems("test", None)


def test_faulty_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds test problems: split 'train'"):
        make_task(f"gsm8k:data={tmp_path}/a.jsonl", {}).problems("train", 3)
    with pytest.raises(UserError, match=r"there is no data file .*a\.jsonl"):
        make_task(f"gsm8k:data={tmp_path}/a.jsonl", {}).problems("test", 3)
    with pytest.raises(UserError, match=r"give a folder with test\.jsonl, \.json or \.parquet"):
        make_task(f"gsm8k:data={tmp_path}", {}).problems("test", 3)


@pytest.mark.parametrize("name", ["gsm8k", "math500"])
def test_prompts(tmp_path: Path, name: str) -> None:
    problem = gsm8k("3")
    boxed, tags = (make_task(f"{name}:prompt={p}", {}) for p in ("boxed", "tags"))
    assert make_task(name, {}) == boxed and boxed.prefill == tags.prefill == "<reasoning>"
    assert "\\boxed{" in boxed.instruction(problem) and "\\boxed" not in tags.instruction(problem)
    for task in (boxed, tags):
        text = task.instruction(problem)
        assert text.endswith(problem.question) and "<reasoning>\n" in text and "\n</answer>" in text
    file = tmp_path / "prompt.txt"
    file.write_text("Q: {question} {x}\nA:")
    own = make_task(f"{name}:prompt={file}", {})
    assert own.instruction(problem) == "Q: How many? {x}\nA:"
    assert own.config()["template"] == "Q: {question} {x}\nA:" and "template" not in boxed.config()
    file.write_text("Q:")
    with pytest.raises(UserError, match=r"lacks \{question\}"):
        make_task(f"{name}:prompt={file}", {})
    with pytest.raises(UserError, match="'box': give boxed or tags, or a text file that exists"):
        make_task(f"{name}:prompt=box", {})
    with pytest.raises(UserError, match="has no style 'compact'"):
        make_task(f"{name}:style=compact", {})


def paid(task: Task, problem: Any, completion: str) -> dict[str, float]:
    """Weight times value of every reward."""
    return {
        name: weight * float(function([""], [completion], problem=[problem])[0] or 0.0)
        for name, (function, weight) in task.rewards().items()
    }


@pytest.mark.parametrize(
    ("completion", "correct", "integer", "strict", "soft", "tags"),
    [
        ("\na\nb\n</reasoning>\n<answer>\n7\n</answer>", 2, 0.5, 0.5, 0.5, 0.5),
        ("\na\n</reasoning>\n<answer>\n7\n</answer>\n<|eot_id|>x", 2, 0.5, 0.5, 0.5, 0.5),
        ("\na\n</reasoning>\n<answer>\n8\n</answer>\n", 0, 0.5, 0.5, 0.5, 0.5),
        ("\na\n</reasoning>\n<answer>\n$7\n</answer>\n", 2, 0, 0.5, 0.5, 0.5),
        ("\na\n</reasoning>\n<answer>\n7\n</answer>\nmore", 2, 0.5, 0, 0.5, 0.496),
        ("a</reasoning> <answer>7</answer>", 2, 0.5, 0, 0.5, 0),
        ("a</reasoning> so <answer>7</answer>", 2, 0.5, 0, 0, 0),
        ("\na\n</reasoning>\n<answer>\n7", 0, 0, 0, 0, 0.375),
        ("\na\n</reasoning>\n</reasoning>\n<answer>\n7\n</answer>", 2, 0.5, 0.5, 0.5, 0.375),
        ("", 0, 0, 0, 0, 0),
    ],
)
def test_gsm8k_rewards_by_hand(
    completion: str, correct: float, integer: float, strict: float, soft: float, tags: float
) -> None:
    found = paid(make_task("gsm8k:prompt=tags", {}), gsm8k("7"), completion)
    expected = [correct, integer, strict, soft, tags]
    assert list(found.values()) == pytest.approx(expected), found


@pytest.mark.parametrize(
    ("completion", "correct", "form"),
    [
        ("a</reasoning><answer>\\boxed{1.5}</answer>", 2, 1),
        ("a</reasoning><answer>\\frac{3}{2}</answer>", 2, 0.75),
        ("\\boxed{3}</reasoning><answer>4</answer>", 0, 0.75),
        ("so \\boxed{\\frac32}", 2, 0.5),
        ("so 3/2", 0, 0.25),
    ],
)
def test_math_rewards_by_hand(completion: str, correct: float, form: float) -> None:
    assert list(paid(make_task("math500", {}), math500("\\frac{3}{2}"), completion).values()) == [correct, form]


def test_completions_made_elsewhere(tmp_path: Path) -> None:
    task = make_task("gsm8k", {})
    row = {"question": "Q?", "completion": FORM.format("\\boxed{1,200}"), "ground_truth": 1200.0}
    assert task.grade(task.completion_truth(row), row["completion"]).solved  # type: ignore[arg-type]
    published = make_task("gsm8k:extraction=published", {})
    for grader in (task, published):  # no truth, no right answer
        assert not grader.grade(grader.completion_truth({**row, "ground_truth": None}), "\\boxed{3}").solved
    task = make_task("math500", {})
    assert task.completion_truth({"question": "Q?", "ground_truth": "\\frac14"}).truth == {"answer": "\\frac14"}
