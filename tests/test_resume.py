"""Resuming from a checkpoint: damaged files, another model, copies under other names, a folder that is gone."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from test_sft_data import chat
from unmask import DiffusionGRPOConfig, DiffusionGRPOTrainer, SFTConfig, SFTTrainer, UserError
from unmask.training.run_folder import run

SMALL: dict[str, Any] = {"per_device_train_batch_size": 2, "eval_steps": 9, "save_steps": 1, "bf16": False}
RL: dict[str, Any] = {"num_generations": 2, "num_iterations": 2, "max_completion_length": 4, "problems": 2}


def start(kind: str, output: Path, model: str, data: str, callbacks: Any = None) -> Path:
    settings = {**SMALL, "output_dir": output, "max_steps": 4, "report_to": []}
    if "lora" in kind:
        settings["lora_r"] = 2
    if kind == "sft":
        config = SFTConfig(data=data, validation_share=0.1, **settings)
        return run(SFTTrainer(model, config, callbacks=callbacks))
    rl = DiffusionGRPOConfig(tasks=["sudoku:style=compact"], validation_problems=1, **RL, **settings)
    return run(DiffusionGRPOTrainer(model, None, rl, callbacks=callbacks))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, toy_folder: str) -> Callable[[str], Path]:
    """The folder of a run of four updates, stopped after the third was saved."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("stopped") / "run"
            start(kind, made[kind], toy_folder, chat(made[kind].parent))
            shutil.rmtree(made[kind] / "final")
            shutil.rmtree(made[kind] / "checkpoint-4")
        return made[kind]

    return folder


@dataclass
class Malicious:
    """A pickle that writes a file where it is executed."""

    mark: Path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "malicious": lambda file: file.write_bytes(pickle.dumps(Malicious(file.parent.parent / "executed"))),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "one byte": lambda file: file.write_bytes(file.read_bytes()[:-1] + b"?"),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize(
    ("kind", "file", "damage"),
    [
        ("sft", "optimizer.pt", "malicious"),
        ("sft", "model.safetensors", "truncated"),
        ("sft", "trainer_state.json", "one byte"),
        ("sft", "checksums.json", "truncated"),
        ("rl lora", "rollout-0.safetensors", "missing"),
    ],
)
def test_a_damaged_checkpoint_is_one_sentence_and_executes_nothing(
    kind: str, file: str, damage: str, tmp_path: Path, toy_folder: str, stopped: Callable[[str], Path]
) -> None:
    output, data = tmp_path / "run", str(stopped(kind).parent / "chat.jsonl")
    shutil.copytree(stopped(kind), output)
    DAMAGE[damage](output / "checkpoint-3" / file)
    with pytest.raises(UserError) as caught:
        start(kind, output, toy_folder, data)
    said = str(caught.value)
    assert said.startswith(f"{output}/checkpoint-3/{file} ") and f"remove {output}/checkpoint-3, and" in said
    assert "\n" not in said and not (output / "executed").exists()
    if damage == "truncated":
        shutil.rmtree(output / "checkpoint-3")  # the fix that the sentence names
        assert (start(kind, output, toy_folder, data) / "config.json").is_file()


def test_a_checkpoint_of_another_model_is_one_sentence(
    tmp_path: Path, toy_folder: str, model: str, stopped: Callable[[str], Path]
) -> None:
    shutil.copytree(stopped("sft"), tmp_path / "run")
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(UserError, match="run is not of this model"):
        start("sft", tmp_path / "run", model, str(stopped("sft").parent / "chat.jsonl"))


def test_copies_under_other_names_neither_count_nor_vanish(
    tmp_path: Path, toy_folder: str, stopped: Callable[[str], Path]
) -> None:
    output, names = tmp_path / "run", ("checkpoint-best", "checkpoint-3 (copy)", "checkpoint-", "checkpoint--1")
    shutil.copytree(stopped("sft"), output)
    for name in names:
        shutil.copytree(output / "checkpoint-3", output / name)
    cut = shutil.copytree(output / "checkpoint-3", output / "checkpoint-9")  # as if cut off while it was written
    (cut / "checksums.json").unlink()
    assert (start("sft", output, toy_folder, str(stopped("sft").parent / "chat.jsonl")) / "config.json").is_file()
    there = {p.name for p in output.glob("checkpoint-*")}
    assert there == {*names, "checkpoint-3", "checkpoint-4", "checkpoint-9"}


class Remover(TrainerCallback):
    """Removes the run's folder after the second update, at one moment or another."""

    def __init__(self, moment: str) -> None:
        setattr(self, moment, self.remove)

    def remove(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            shutil.rmtree(args.output_dir)


@pytest.mark.parametrize(("kind", "moment"), [("sft", "on_step_begin"), ("rl", "on_log")])
def test_a_folder_that_is_gone_ends_the_run(kind: str, moment: str, tmp_path: Path, toy_folder: str) -> None:
    with pytest.raises(UserError, match="was removed while the run wrote to it"):
        start(kind, tmp_path / "run", toy_folder, chat(tmp_path), [Remover(moment)])
