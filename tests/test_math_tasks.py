"""GSM8K and MATH500: problems from files and the hub, splits, prompts, rewards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from test_answers import FORM, solved
from unmask import UserError, make_task
from unmask.tasks.math.gsm8k import GSM8K
from unmask.tasks.math.math500 import MATH500

NAMES = ("gsm8k", "math500")


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
    assert task.problems("validation", None, seed=2) == validation
    assert task.problems("train", 7, seed=1) == train[:7]
    assert all(p.response and task.grade(p, p.response).solved for p in train[:20] + validation[:20])


def test_problems_of_the_published_forms(tmp_path: Path) -> None:
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


def test_a_copy_of_a_hub_data_set_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "main").mkdir()
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n"
        "  - split: test\n    path: main/test-*\n---\n"
    )
    for split, rows in (("train", range(1, 60)), ("test", range(60, 63))):
        table = pyarrow.Table.from_pylist([row("gsm8k", i) for i in rows])
        parquet.write_table(table, tmp_path / "main" / f"{split}-00000-of-00001.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    task = make_task(f"gsm8k:data={tmp_path}", {})
    assert [p.question for p in task.problems("test", None)] == [row("gsm8k", i)["question"] for i in range(60, 63)]
    assert len(task.problems("train", None)) + len(task.problems("validation", None)) == 59
    file = tmp_path / "main" / "test-00000-of-00001.parquet"
    assert make_task(f"gsm8k:data={file}", {}).problems("test", None) == task.problems("test", None)


def test_the_hub_is_the_default_source(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

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


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.jsonl", '{"question": "Q?", "answer": "7"}\n', r"a\.jsonl:1 is no problem of task gsm8k"),
        ("a.jsonl", '{"question": "Q?", "answer": "#### 7"}\n[1]\n', r"a\.jsonl:2 is not a JSON object"),
        ("a.jsonl", '{"question": "\\ud800", "answer": "#### 7"}\n', r"a\.jsonl:1 is not a JSON object"),
        ("a.json", "7", r"a\.json:1 is not a JSON object"),
        ("a.json", "[]", r"a\.json holds no rows"),
        ("a.parquet", "x", "cannot read the data file"),
        ("a.jsonl", None, r"cannot read .*a\.jsonl"),
        (".", None, r"no \.json, \.jsonl, \.parquet file of the test split .*: use a folder with train"),
    ],
)
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
    for spec, message in (
        (f"template={file}", r"lacks \{question\}"),
        ("template=box", "cannot read the template .boxed, tags or a file. box"),
        ("style=compact", "has no style 'compact'"),
    ):
        with pytest.raises(UserError, match=message):
            make_task(f"math500:{spec}", {})


# fmt: off
PAID = [  # template, truth, completion, what each reward pays
    ("gsm8k:template=tags", "7", "\na\nb\n</reasoning>\n<answer>\n7\n</answer>", [2, 0.5, 0.5, 0.5, 0.5]),
    ("gsm8k:template=tags", "7", "\na\n</reasoning>\n<answer>\n7\n</answer>\n<|eot_id|>x", [2, 0.5, 0.5, 0.5, 0.5]),
    ("gsm8k:template=tags", "7", "\na\n</reasoning>\n<answer>\n8\n</answer>\n", [0, 0.5, 0.5, 0.5, 0.5]),
    ("gsm8k:template=tags", "7", "\na\n</reasoning>\n<answer>\n$7\n</answer>\n", [2, 0, 0.5, 0.5, 0.5]),
    ("gsm8k:template=tags", "7", "\na\n</reasoning>\n<answer>\n7\n</answer>\nmore", [2, 0.5, 0, 0.5, 0.496]),
    ("gsm8k:template=tags", "7", "a</reasoning> <answer>7</answer>", [2, 0.5, 0, 0.5, 0]),
    ("gsm8k:template=tags", "7", "a</reasoning> so <answer>7</answer>", [2, 0.5, 0, 0, 0]),
    ("gsm8k:template=tags", "7", "\na\n</reasoning>\n<answer>\n7", [0, 0, 0, 0, 0.375]),
    ("gsm8k:template=tags", "7", "\na\n</reasoning>\n</reasoning>\n<answer>\n7\n</answer>", [2, 0.5, 0.5, 0.5, 0.375]),
    ("gsm8k:template=tags", "7", "", [0, 0, 0, 0, 0]),
    ("math500", "\\frac{3}{2}", "a</reasoning><answer>\\boxed{1.5}</answer>", [2, 1]),
    ("math500", "\\frac{3}{2}", "a</reasoning><answer>\\frac{3}{2}</answer>", [2, 0.75]),
    ("math500", "\\frac{3}{2}", "\\boxed{3}</reasoning><answer>4</answer>", [0, 0.75]),
    ("math500", "\\frac{3}{2}", "so \\boxed{\\frac32}", [2, 0.5]),
    ("math500", "\\frac{3}{2}", "so 3/2", [0, 0.25]),
]
# fmt: on


@pytest.mark.parametrize(("spec", "answer", "completion", "paid"), PAID)
def test_rewards_by_hand(spec: str, answer: str, completion: str, paid: list[float]) -> None:
    task: Any = make_task(spec, {})
    problem = task.make_problem("How many?", answer)
    assert [weight * judge(problem, completion) for judge, weight in task.rewards().values()] == pytest.approx(paid)


def test_completions_made_elsewhere() -> None:
    assert solved("gsm8k", FORM.format("\\boxed{1,200}"), 1200.0)
    for spec in ("gsm8k", "gsm8k:extraction=published"):  # no truth, no right answer
        assert not solved(spec, "\\boxed{3}", None)
    task = make_task("math500", {})
    assert task.completion_truth({"question": "Q?", "ground_truth": "\\frac14"}).truth == {"answer": "\\frac14"}
