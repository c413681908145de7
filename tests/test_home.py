"""``~`` is the home folder in every path of a run file, a flag, a spec or a Python call."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from test_sft_data import chat
from unmask import load, make_decoder
from unmask.cli import main
from unmask.config import build, read_config
from unmask.rl.config import DiffusionGRPOConfig
from unmask.tasks import make_task
from unmask.training.config import SFTConfig
from unmask.training.sft import train

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


@pytest.mark.parametrize(("command", "as_flags"), [("sft", False), ("rl", True), ("rl with an adapter", False)])
def test_a_training_is_one_folder(command: str, as_flags: bool, home: Path) -> None:
    paths = {"output_dir": "~/run", "model": "~/model"} | ({"data": "~/chat.jsonl"} if command == "sft" else {})
    settings = {"base": "~/base.yaml"} | ({"validation_share": 0.1} if command == "sft" else RL)
    settings |= {"validation_problems": 1} if command != "sft" else {}
    settings |= {"lora_r": 2} if "adapter" in command else {}
    inside = {k: "~/elsewhere" if k == "output_dir" else "nothing" for k in paths} if as_flags else paths
    flags = [f"--{k.replace(chr(95), chr(45))}={v}" for k, v in paths.items()] if as_flags else []
    for _ in range(2):  # the second goes on in the same folder
        assert main([command.split()[0], write(home, **settings, **inside), *flags]) == 0
    found = {p.name for p in (home / "run").iterdir()}
    assert {"config.yaml", "checkpoint-2", "final"} <= found and not (home / "elsewhere").exists()
    assert yaml.safe_load((home / "run" / "config.yaml").read_text())["output_dir"] == str(home / "run")
    assert main(["export", "~/run/checkpoint-2", "~/plain"]) == 0 and (home / "plain" / "config.json").is_file()
    if "adapter" in command:
        assert main(["eval", "--model=~/model", "--adapter=~/run/checkpoint-2", "--output=~/eval", *EVAL]) == 0
        assert load("~/model", adapter="~/run/checkpoint-2").name == f"{home}/model + {home}/run/checkpoint-2"


def test_evaluations_reports_and_studies(home: Path) -> None:
    assert main(["eval", "--model=~/model", "--output=~/eval", *EVAL]) == 0
    assert main(["report", "~/eval", "--output=~/report"]) == 0
    assert (home / "eval" / "summary.json").is_file() and (home / "report").is_dir()
    tables = [{"task": "sudoku:style=compact", "model": "~/model", "decoder": "~/ass.yaml", "limit": 1}]
    assert main(["study", write(home, output="~/study", evaluate=tables)]) == 0
    assert (home / "study" / "table.md").is_file()
    (home / "prompt.txt").write_text("Solve {question}")
    task = make_task("gsm8k:template=~/prompt.txt,data=~/gsm8k.jsonl", {})
    assert task.data == str(home / "gsm8k.jsonl")
    assert make_decoder("~/ass.yaml").name == "ass" and make_decoder("~/ass.yaml:temperature=1").temperature == 1
    built = build(SFTConfig, {"output_dir": "x", "tasks": ["a"], "model": "~/m", "max_steps": 1}, "x")
    read = read_config(SFTConfig, write(home, base="~/base.yaml", output_dir="~/a", data="~/b", model="~/c"))
    assert (built.model, read.data) == (f"{home}/m", f"{home}/b")
    assert DiffusionGRPOConfig(output_dir="~/run", tasks=["sudoku"]).output_dir == f"{home}/run"
    final = train(SFTConfig(output_dir="~/api", data="~/chat.jsonl", model="~/model", **SMALL))
    assert final.parent == home / "api"
