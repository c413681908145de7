"""``~`` is the home folder in every path of a run file, a flag, a spec or a Python call."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.__main__ import main as benchmark
from test_sft_data import chat
from unmask import load, make_decoder
from unmask.cli import main
from unmask.tasks import make_task
from unmask.training.config import SFTConfig

SMALL: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 2, "eval_steps": 2, "save_steps": 1}
SMALL |= {"bf16": False, "report_to": []}
RL = {"num_generations": 2, "max_completion_length": 4, "tasks": ["sudoku:style=compact"], "problems": 2}
EVAL = ["--limit", "1", "--max-new-tokens", "8", "--task", "sudoku:style=compact", "--decoder", "~/ass.yaml"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_folder: str) -> Path:
    """A home folder with a model, data and decoder in it, away from the working folder, which must stay empty."""
    home, work = tmp_path / "home", tmp_path / "work"
    for folder in (home, work):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    shutil.copytree(toy_folder, home / "model")
    shutil.copy(chat(tmp_path), home / "chat.jsonl")
    (home / "ass.yaml").write_text("preset: ass\n")
    (home / "base.yaml").write_text(yaml.safe_dump(SMALL))
    yield home
    assert not list(work.iterdir())  # nothing beside the home folder, above all no folder called ~


def write(home: Path, **settings: Any) -> str:
    (home / "run.yaml").write_text(yaml.safe_dump(settings))
    return "~/run.yaml"


@pytest.mark.parametrize("command", ["sft", "rl"])
def test_a_training_is_one_folder(command: str, home: Path) -> None:
    """Paths in the file for ``sft``, as flags for ``rl`` with an adapter."""
    paths = {"output_dir": "~/run", "model": "~/model"}
    base = {"base": "~/base.yaml"}
    file, flags = write(home, **base, **paths, data="~/chat.jsonl", validation_share=0.1), []
    if command == "rl":
        flags = ["--output-dir=~/run", "--model=~/model"]
        file = write(home, **base, **RL, output_dir="~/elsewhere", validation_problems=1, lora_r=2)
    for _ in range(2):  # the second resumes in the same folder
        assert main([command, file, *flags]) == 0
    found = {p.name for p in (home / "run").iterdir()}
    assert {"config.yaml", "checkpoint-2", "final"} <= found and not (home / "elsewhere").exists()
    assert yaml.safe_load((home / "run" / "config.yaml").read_text())["output_dir"] == str(home / "run")
    assert main(["export", "~/run/checkpoint-2", "~/plain"]) == 0 and (home / "plain" / "config.json").is_file()
    if command == "rl":
        assert main(["eval", "--model=~/model", "--adapter=~/run/checkpoint-2", "--output=~/eval", *EVAL]) == 0
        assert load("~/model", adapter="~/run/checkpoint-2").name == f"{home}/model + {home}/run/checkpoint-2"


def test_evaluations_and_reports(home: Path) -> None:
    assert main(["eval", "--model=~/model", "--output=~/eval", *EVAL]) == 0
    assert benchmark(["report", "~/eval", "--output=~/report"]) == 0
    assert (home / "eval" / "summary.json").is_file() and (home / "report").is_dir()
    (home / "prompt.txt").write_text("Solve {question}")
    task = make_task("gsm8k:template=~/prompt.txt,data=~/gsm8k.jsonl", {})
    assert task.data == str(home / "gsm8k.jsonl")
    assert make_decoder("~/ass.yaml").name == "ass" and make_decoder("~/ass.yaml:temperature=1").temperature == 1
    assert SFTConfig(output_dir="~/run", tasks=["sudoku"], max_steps=1, model="tiny").output_dir == f"{home}/run"
