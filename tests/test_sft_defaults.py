"""What a supervised run takes where its file leaves a setting open, and what it refuses or warns of beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel

from checkpoints import write_llada, write_qwen3_a2d
from conftest import SHAPE
from test_sft_data import chat, no_shared_cache  # noqa: F401  (a fixture for every test)
from unmask import UserError, load
from unmask.config import read_config
from unmask.training.config import SFTConfig
from unmask.training.sft import train

SMALL: dict[str, Any] = {"validation_share": 0.1, "max_steps": 2, "per_device_train_batch_size": 2, "bf16": False, "report_to": []}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"optimizer": "adamw", "learning_rate": 1e-5, "prompt_masking": 0.0, "warmup_steps": 0}),
        ({"lora_r": 2}, {"optimizer": "adamw", "learning_rate": 1e-4, "prompt_masking": 0.0}),
        ({"lora_r": 2, "optimizer": "muon", "learning_rate": 3e-3}, {"optimizer": "muon", "learning_rate": 3e-3}),
        ({"optimizer": "muon", "prompt_masking": 0.5, "warmup_steps": 1}, {"optimizer": "muon", "prompt_masking": 0.5}),
        ({"max_length": 64}, {"max_length": 64}),
        ({"model": None, "new_model": SHAPE}, {"optimizer": "muon", "learning_rate": 2e-3, "prompt_masking": 0.25}),
    ],
)
def test_what_is_left_open_suits_the_run_and_is_written(
    given: dict[str, Any], expected: dict[str, Any], tmp_path: Path, toy_folder: str
) -> None:
    data = chat(tmp_path)
    c = SFTConfig(**{"output_dir": str(tmp_path / "run"), "data": data, "model": toy_folder, **SMALL, **given})
    train(c)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert expected == {name: written[name] for name in expected}
    longest = max(len(r) for r in _rows(toy_folder, data))
    assert written["max_length"] == given.get("max_length", longest)
    train(read_config(SFTConfig, tmp_path / "run" / "config.yaml"))  # what is written is the same run
    train(c)


def _rows(model: str, data: str) -> list[list[int]]:
    from unmask.training.sft_data import read_chat

    found = read_chat(load(model), data, 1024, "refuse", 0.0)
    return [[*r["prompt"], *r["response"]] for r in found.training]


def test_flags_decide_before_defaults_do(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("output: x\ntasks: [sudoku]\nmodel: tiny\nsteps: 2\n")
    assert read_config(SFTConfig, file, ["--lora-r", "2"]).resolved().learning_rate == 1e-4
    assert read_config(SFTConfig, file).resolved().learning_rate == 1e-5


@pytest.mark.parametrize(("warmup", "warned"), [(3, False), (4, True), (100, True), (None, False)])
@pytest.mark.parametrize("command", ["sft", "rl"])
def test_a_run_that_ends_in_its_warm_up_says_so(
    command: str, warmup: int | None, warned: bool, tmp_path: Path, toy_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common: dict[str, Any] = {"output_dir": str(tmp_path / "run"), "model": toy_folder, "max_steps": 4, "bf16": False}
    common |= {} if warmup is None else {"warmup_steps": warmup}
    if command == "sft":
        train(SFTConfig(**{**SMALL, **common, "data": chat(tmp_path)}))
    else:
        from unmask.rl.config import DiffusionGRPOConfig
        from unmask.rl.run import train as train_rl

        small = {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 4, "validation_problems": 1}
        tasks = ["sudoku:style=compact"]
        train_rl(DiffusionGRPOConfig(**common, **small, tasks=tasks, problems=2, eval_steps=4, save_steps=4, report_to=[]))  # type: ignore[arg-type]
    assert (f"all 4 updates fall into the warm-up of {warmup}" in capsys.readouterr().err) == warned


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 2, "lora_target_modules": "nothing"}, "does not fit the model"),
        ({"lora_r": 2, "lora_target_modules": "("}, "does not fit the model"),
        ({"dtype": "bfloat16"}, "would be trained in bfloat16"),
        ({"max_length": 4096}, "lower it"),
        ({"per_device_train_batch_size": 64}, "do not fill a batch of 64"),
    ],
)
def test_what_the_config_shows_is_refused_before_the_folder_is_made(
    changes: dict[str, Any], message: str, tmp_path: Path, toy_folder: str
) -> None:
    values = {**SMALL, "output_dir": str(tmp_path / "run"), "data": chat(tmp_path), "model": toy_folder, **changes}
    with pytest.raises(UserError, match=message):
        train(SFTConfig(**values))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["llada", "qwen3"])
def test_a_trained_adapter_on_tied_ends_is_exported_as_trained(family: str, tmp_path: Path) -> None:
    if family == "llada":
        base = write_llada(tmp_path / "base", weight_tying=True)
    else:
        base = write_qwen3_a2d(tmp_path / "base")
    values = {**SMALL, "output_dir": str(tmp_path / "run"), "data": chat(tmp_path), "model": base, "max_steps": 4}
    targets = ".*(lm_head|wte|_proj)"
    final = train(SFTConfig(**values, lora_r=2, lora_target_modules=targets, learning_rate=0.1))
    lm = load(base, "float32")
    ids, mask = lm.encode(["hello there", "an in"])
    before = lm.model(ids, mask).logits
    model: Any = PeftModel.from_pretrained(lm.model, tmp_path / "run" / "checkpoint-4").eval()  # type: ignore[arg-type]
    with torch.no_grad():
        trained = model(input_ids=ids, attention_mask=mask).logits
    assert (trained - before).abs().max() > 0.1
    assert torch.allclose(load(str(final)).model(ids, mask).logits, trained, atol=1e-3)
