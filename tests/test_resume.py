"""Resuming from a checkpoint: damaged files, another model, copies under other names, a folder that is gone."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from test_sft_data import chat
from unmask import DiffusionGRPOConfig, DiffusionGRPOTrainer, SFTConfig, SFTTrainer, UserError
from unmask.training.run_folder import run

SMALL: dict[str, Any] = {"per_device_train_batch_size": 2, "eval_steps": 9, "save_steps": 1, "max_steps": 4}
SMALL |= {"bf16": False, "report_to": []}
RL: dict[str, Any] = {"num_generations": 2, "num_iterations": 2, "max_completion_length": 4, "problems": 2}
Start = Callable[..., Path]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, toy_folder: str) -> Start:
    """Runs four updates, or what a folder lacks of them."""
    data = chat(tmp_path_factory.mktemp("data"))

    def started(
        kind: str, output: Path, model: str = toy_folder, callbacks: Any = None, begin: Callable[[Any], Any] = run
    ) -> Any:
        settings = {**SMALL, "output_dir": output, "lora_r": 2 if "lora" in kind else None}
        if kind == "sft":
            return begin(SFTTrainer(model, SFTConfig(data=data, validation_share=0.1, **settings), callbacks=callbacks))
        rl = DiffusionGRPOConfig(tasks=["sudoku:style=compact"], validation_problems=1, **RL, **settings)
        return begin(DiffusionGRPOTrainer(model, None, rl, callbacks=callbacks))

    return started


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Start:
    """Copies the folder of a run of four updates that was stopped after the third was saved."""

    @functools.cache
    def made(kind: str) -> Path:
        output = tmp_path_factory.mktemp("stopped") / "run"
        shutil.rmtree(start(kind, output))
        shutil.rmtree(output / "checkpoint-4")
        return output

    return lambda kind, output: shutil.copytree(made(kind), output)


MALICIOUS = "cos\nsystem\n(S'touch {}'\ntR."  # a pickle that writes a file where it is executed
DAMAGE: dict[str, Callable[[Path], Any]] = {
    "malicious": lambda file: file.write_text(MALICIOUS.format(file.parent.parent / "executed")),
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
    kind: str, file: str, damage: str, tmp_path: Path, start: Start, stopped: Start
) -> None:
    output = stopped(kind, tmp_path / "run")
    DAMAGE[damage](output / "checkpoint-3" / file)
    with pytest.raises(UserError) as caught:
        start(kind, output)
    said = str(caught.value)
    assert said.startswith(f"{output}/checkpoint-3/{file} ") and f"remove {output}/checkpoint-3, and" in said
    assert "\n" not in said and not (output / "executed").exists()
    if damage == "truncated":
        shutil.rmtree(output / "checkpoint-3")  # the fix that the sentence names
        assert (start(kind, output) / "config.json").is_file()


def test_another_trainings_checkpoints_are_neither_resumed_nor_lost(
    tmp_path: Path, model: str, start: Start, stopped: Start
) -> None:
    (stopped("sft", tmp_path / "run") / "config.yaml").unlink()  # as a training in Python leaves it
    before = {p.name for p in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match="run holds checkpoints of another training: choose another --output-dir"):
        start("sft", tmp_path / "run")
    with pytest.raises(UserError, match="run holds checkpoints already: pass resume_from_checkpoint=True, or"):
        start("sft", tmp_path / "run", begin=lambda trainer: trainer.train())
    with pytest.raises(UserError, match="is not of this model"):
        start("sft", tmp_path / "run", model, begin=lambda trainer: trainer.train(resume_from_checkpoint=True))
    assert before <= {p.name for p in (tmp_path / "run").iterdir()}
    assert start("sft", tmp_path / "run", begin=lambda t: t.train(resume_from_checkpoint=True)).global_step == 4


def test_other_weights_or_data_behind_the_same_names_do_not_resume(tmp_path: Path, toy_folder: str) -> None:
    data, model = Path(chat(tmp_path)), shutil.copytree(toy_folder, tmp_path / "model")
    config = SFTConfig(data=str(data), validation_share=0.1, output_dir=str(tmp_path / "run"), **SMALL)
    shutil.rmtree(run(SFTTrainer(str(model), config)))
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    for file, name in ((data, "training data"), (model / "model.safetensors", "model's weights")):
        before = file.read_bytes()
        if file == data:
            file.write_bytes(b"".join(before.splitlines(keepends=True)[::-1]))
        else:
            save_file({k: 1.5 * v for k, v in load_file(file).items()}, file, {"format": "pt"})
        with pytest.raises(UserError, match=f"^the {name} changed since the run in .*/run began: choose another"):
            run(SFTTrainer(str(model), config))
        file.write_bytes(before)
    assert (run(SFTTrainer(str(model), config)) / "model.safetensors").is_file()


def test_copies_under_other_names_neither_count_nor_vanish(tmp_path: Path, start: Start, stopped: Start) -> None:
    output, names = tmp_path / "run", ("checkpoint-best", "checkpoint-3 (copy)", "checkpoint-", "checkpoint--1")
    stopped("sft", output)
    for name in names:
        shutil.copytree(output / "checkpoint-3", output / name)
    cut = shutil.copytree(output / "checkpoint-3", output / "checkpoint-9")  # as if cut off while it was written
    (cut / "checksums.json").unlink()
    assert (start("sft", output) / "config.json").is_file()
    assert {p.name for p in output.glob("checkpoint-*")} == {*names, "checkpoint-3", "checkpoint-4", "checkpoint-9"}


@pytest.mark.parametrize(("kind", "moment"), [("sft", "on_step_begin"), ("rl", "on_log")])
def test_a_folder_that_is_gone_ends_the_run(kind: str, moment: str, tmp_path: Path, start: Start) -> None:
    """It is removed after the second update, at one moment or another."""

    def remove(args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            shutil.rmtree(args.output_dir)

    remover = TrainerCallback()
    setattr(remover, moment, remove)
    with pytest.raises(UserError, match="was removed while the run wrote to it"):
        start(kind, tmp_path / "run", callbacks=[remover])
