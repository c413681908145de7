"""Going on from a checkpoint: damaged and foreign files, copies under other names, a folder that is gone."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from test_sft_data import chat, no_shared_cache  # noqa: F401  (a fixture for every test)
from unmask import UserError
from unmask.rl.run import RLConfig
from unmask.rl.run import train as train_rl
from unmask.training import run_folder as runs
from unmask.training.sft import SFTConfig, train

SMALL: dict[str, Any] = {"batch_size": 2, "eval_every": 9, "save_every": 1, "bf16": False, "report_to": []}
RL: dict[str, Any] = {"num_generations": 2, "num_iterations": 2, "max_completion_length": 4, "problems": 2}


def run(kind: str, output: Path, model: str, data: str, **changes: Any) -> Path:
    settings = {**SMALL, "output": str(output), "model": model, "steps": 3, **changes}
    if "lora" in kind:
        settings["lora_r"] = 2
    if kind.startswith("sft"):
        optimizer = {"optimizer": "muon"} if "muon" in kind else {}
        return train(SFTConfig(data=data, validation_share=0.1, **optimizer, **settings))
    return train_rl(RLConfig(tasks=["sudoku:style=compact"], validation_problems=1, **RL, **settings))


KINDS = ("sft", "sft muon", "sft lora", "rl", "rl lora")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, toy_folder: str) -> Callable[[str], Path]:
    """The folder of a run of three updates, stopped after the third was saved."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("finished") / "run"
            run(kind, made[kind], toy_folder, chat(made[kind].parent))
            shutil.rmtree(made[kind] / "final")
            shutil.rmtree(made[kind] / "checkpoint-2")
        return made[kind]

    return folder


class Malicious:
    """A pickle that writes a file where it is executed."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def malicious(file: Path) -> None:
    file.write_bytes(pickle.dumps(Malicious(file.parent.parent / "executed")))


def malicious_torch(file: Path) -> None:
    torch.save({"state": Malicious(file.parent.parent / "executed")}, file)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def foreign(file: Path) -> None:
    """A sound file of its kind that does not belong."""
    if file.suffix == ".json":
        file.write_text(json.dumps({"strange": 1}))
    elif file.suffix == ".safetensors":
        save_file({"strange": torch.zeros(2)}, file)
    else:
        torch.save({"strange": torch.zeros(2)}, file)


def of_other_shapes(file: Path) -> None:
    if file.suffix == ".safetensors":
        save_file({k: torch.cat([v, v]) for k, v in load_file(file).items()}, file)
    elif file.suffix != ".json":
        double: Any = lambda v: (  # noqa: E731
            {k: double(x) for k, x in v.items()}
            if isinstance(v, dict)
            else [double(x) for x in v]
            if isinstance(v, list)
            else torch.cat([v, v])
            if isinstance(v, torch.Tensor) and v.ndim
            else v
        )
        torch.save(double(torch.load(file, weights_only=False)), file)
    else:
        file.write_text(file.read_text().replace('"global_step": 3', '"global_step": "three"'))


DAMAGE = {
    "malicious": malicious,
    "malicious torch": malicious_torch,
    "truncated": truncated,
    "empty": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
    "foreign": foreign,
    "other shapes": of_other_shapes,
}
FILES = {
    "sft": ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"),
    "sft muon": ("optimizer.pt",),
    "sft lora": ("optimizer.pt", "adapter_model.safetensors"),
    "rl": ("optimizer.pt", "rng_state.pth", "trajectory-0.safetensors", "rollout-0.safetensors"),
    "rl lora": ("scheduler.pt", "adapter_model.safetensors"),
}


CASES = [
    (kind, file, damage)
    for kind, files in FILES.items()
    for file in files
    for damage in (DAMAGE if kind == "sft" else ("malicious", "foreign"))
    if (file, damage) != ("scheduler.pt", "other shapes")  # nothing in it has a shape
    and (file, damage) != ("trainer_state.json", "missing")  # a checkpoint that was cut off, which is passed over
]


def longer(output: Path) -> None:
    """Make the folder that of a run of four updates."""
    text = (output / "config.yaml").read_text()
    (output / "config.yaml").write_text(text.replace("steps: 3", "steps: 4"))


@pytest.mark.parametrize(("kind", "file", "damage"), CASES)
def test_a_damaged_checkpoint_is_one_sentence_and_executes_nothing(
    kind: str, file: str, damage: str, tmp_path: Path, toy_folder: str, finished: Callable[[str], Path]
) -> None:
    data = str(finished(kind).parent / "chat.jsonl")
    output = tmp_path / "run"
    shutil.copytree(finished(kind), output)
    longer(output)
    DAMAGE[damage](output / "checkpoint-3" / file)
    with pytest.raises(UserError) as caught:
        run(kind, output, toy_folder, data, steps=4)
    said = str(caught.value)
    assert said.startswith(f"{output}/checkpoint-3/{file} is damaged, or not of this run (")
    assert f"remove {output}/checkpoint-3, and" in said and "\n" not in said and len(said) < 600
    assert not (output / "executed").exists()
    if damage == "truncated":
        shutil.rmtree(output / "checkpoint-3")  # the fix that the sentence names
        assert (run(kind, output, toy_folder, data, steps=4) / "config.json").is_file()


@pytest.mark.parametrize(
    ("kind", "file"), [("sft", "model.safetensors"), ("rl", "config.json"), ("sft lora", "adapter_config.json")]
)
def test_a_damaged_last_checkpoint_is_not_exported(
    kind: str, file: str, tmp_path: Path, toy_folder: str, finished: Callable[[str], Path]
) -> None:
    shutil.copytree(finished(kind), tmp_path / "run")
    truncated(tmp_path / "run" / "checkpoint-3" / file)
    with pytest.raises(UserError, match=f"{file}.* remove .*checkpoint-3"):
        run(kind, tmp_path / "run", toy_folder, str(finished(kind).parent / "chat.jsonl"))
    assert not (tmp_path / "run" / "final").exists()


NAMES = (
    "checkpoint-best",
    "checkpoint-2-best",
    "checkpoint-2 (copy)",
    "checkpoint-",
    "checkpoint--1",
    "checkpoint-1e3",
)


@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_copies_under_other_names_neither_count_nor_vanish(kind: str, tmp_path: Path, toy_folder: str) -> None:
    data, output = chat(tmp_path), tmp_path / "run"
    run(kind, output, toy_folder, data, steps=2)
    for name in NAMES:
        shutil.copytree(output / "checkpoint-2", output / name)
    (output / "checkpoint-9").write_text("a file")
    (output / "config.yaml").write_text((output / "config.yaml").read_text().replace("steps: 2", "steps: 6"))
    run(kind, output, toy_folder, data, steps=6)
    there = {p.name for p in output.glob("checkpoint-*") if p.is_dir()}
    assert there == {*NAMES, "checkpoint-5", "checkpoint-6"}
    state = json.loads((output / "checkpoint-6" / "trainer_state.json").read_text())
    steps = [line["step"] for line in state["log_history"] if "grad_norm" in line]
    assert not steps or steps[-1] <= 6


class Remover(TrainerCallback):
    """Removes the run's folder after an update, at one moment or another."""

    def __init__(self, moment: str) -> None:
        self.moment = moment

    def __getattribute__(self, name: str) -> Any:
        if name == object.__getattribute__(self, "moment"):
            return object.__getattribute__(self, "remove")
        return object.__getattribute__(self, name)

    def remove(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            shutil.rmtree(args.output_dir)


@pytest.mark.parametrize("moment", ["on_step_begin", "on_log", "on_save"])
@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_a_folder_that_is_gone_ends_the_run(
    kind: str, moment: str, tmp_path: Path, toy_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Check(runs.FolderCheck):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.remover = Remover(moment)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.remover.on_step_begin(args, state, control)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            super().on_step_end(args, state, control)
            self.remover.on_step_end(args, state, control)

        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.remover.on_log(args, state, control)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.remover.on_save(args, state, control)

    module = "unmask.training.sft" if kind == "sft" else "unmask.rl.run"
    monkeypatch.setattr(f"{module}.FolderCheck", Check)
    with pytest.raises(UserError, match="was removed while the run wrote to it"):
        run(kind, tmp_path / "run", toy_folder, chat(tmp_path), steps=4, **({"log_every": 1} if kind == "sft" else {}))
