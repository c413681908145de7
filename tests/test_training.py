"""Noise and supervised training on tasks: the loss by hand, exact resume, Muon in one optimizer, defaults and mistakes."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from conftest import SHAPE, toy
from test_sft_data import chat
from unmask import SFTConfig, SFTTrainer, UserError, load, make_task
from unmask.config import read_config
from unmask.training.noise import corrupt, sample_times
from unmask.training.optim import MuonAdamW
from unmask.training.sft import train

TASKS: dict[str, dict[str, Any]] = {
    "sudoku": {"style": "compact", "max_empty": 6, "min_empty": 4},
    "countdown": {"style": "compact", "max_value": 6},
}
SHORT: dict[str, Any] = {"validation_share": 0.1, "max_steps": 2, "per_device_train_batch_size": 2, "bf16": False}
SHORT["report_to"] = []


def config(output: Path, **changes: Any) -> SFTConfig:
    values: dict[str, Any] = {
        "tasks": ["sudoku", "countdown"],
        "new_model": {**SHAPE, "init_std": 0.02, "task_defaults": TASKS},
        "problems": [24, 12],
        "validation_problems": 8,
        "canvas": [96, 128],
        **{"max_steps": 6, "per_device_train_batch_size": 8, "warmup_steps": 2, "logging_steps": 2, "eval_steps": 3},
        **{"save_steps": 3, "report_to": [], "bf16": False},
    }
    return SFTConfig(output_dir=str(output), **{**values, **changes})


def test_times_are_stratified() -> None:
    t = sample_times(64, torch.Generator().manual_seed(0))
    assert t.min() > 0 and t.max() < 1
    spread = t.sort().values.diff()
    assert torch.allclose(spread, torch.full((63,), (1 - 1e-3) / 64), atol=1e-6)
    means = torch.stack([sample_times(4, torch.Generator().manual_seed(s)).mean() for s in range(500)])
    assert abs(float(means.mean()) - 0.5) < 0.01


def test_corruption_masks_only_what_it_may_at_rate_t() -> None:
    ids = torch.randint(10, 50, (400, 200), generator=torch.Generator().manual_seed(0))
    maskable = torch.arange(200)[None].expand(400, -1) >= 50
    noisy, masked = corrupt(ids, torch.full((400,), 0.3), maskable, 7, torch.Generator().manual_seed(1))
    assert not masked[:, :50].any()
    assert torch.equal(noisy == 7, masked) and torch.equal(noisy[~masked], ids[~masked])
    assert abs(float(masked[:, 50:].float().mean()) - 0.3) < 0.01


def test_trainer_loss_equals_restatement(tmp_path: Path) -> None:
    """The loss of a batch of tasks, row by row: only canvas tokens, weighted by 1/t."""
    lm = toy()
    c = config(tmp_path, new_model=None, problems=[8, 4], canvas=[128])
    trainer = SFTTrainer(lm, c, [make_task(name, TASKS) for name in TASKS])
    rows: Any = trainer.train_dataset
    assert len(rows) == 16 and rows[1] is rows[9]  # the smaller set repeats
    batch = trainer.data_collator([rows[i] for i in range(4)])
    for i in range(4):
        prompt, response = rows[i]["prompt"].tolist(), rows[i]["response"].tolist()
        start = trainer.prompt_width - len(prompt)
        assert batch["visible"][i].tolist() == [False] * start + [True] * (len(prompt) + 128)
        ids = batch["ids"][i, start:].tolist()
        assert ids[: len(prompt) + len(response)] == prompt + response and response[-1] == lm.eot_id
        assert set(ids[len(prompt) + len(response) :]) == {lm.eos_id}
    t = torch.tensor([0.2, 0.9, 0.5, 0.7])
    found = trainer.loss_at(lm.model, batch, t, 128, 0.0, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    torch.rand(4, generator=generator)  # the draw that decides on prompt masking
    draws = torch.rand(batch["ids"].shape, generator=generator)
    total, first = 0.0, trainer.prompt_width
    for i in range(4):
        masked = [j for j in range(first, first + 128) if draws[i, j] < t[i]]
        noisy = batch["ids"][i].clone()
        noisy[masked] = lm.mask_id
        logits = lm.model(noisy[None], batch["visible"][i][None]).logits[0]
        total += float(F.cross_entropy(logits[masked], batch["ids"][i, masked], reduction="sum").detach()) / float(t[i])
    assert float(found.detach()) == pytest.approx(total / (4 * 128), rel=1e-4)


def test_resume_equals_uninterrupted(tmp_path: Path) -> None:
    whole = load_file(train(config(tmp_path / "whole")) / "model.safetensors")
    part = train(config(tmp_path / "part"))
    shutil.rmtree(part)  # as if killed after step 3
    shutil.rmtree(tmp_path / "part" / "checkpoint-6")
    again = load_file(train(config(tmp_path / "part")) / "model.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)
    assert load(str(part)).model.config.task_defaults == TASKS
    with pytest.raises(UserError, match="run with other seed, canvas, max_steps"):
        train(config(tmp_path / "part", seed=1, max_steps=9, canvas=[128]))


def test_muon_updates_matrices_only_and_restores_its_state() -> None:
    lm = toy()
    outside = {id(lm.model.get_input_embeddings().weight), id(lm.model.get_output_embeddings().weight)}
    optimizer = MuonAdamW(lm.model.parameters(), 1e-2, 0.0, outside)
    muon, adamw = optimizer.parts
    assert all(p.ndim == 2 and id(p) not in outside for g in muon.param_groups for p in g["params"])
    count = sum(len(g["params"]) for part in optimizer.parts for g in part.param_groups)
    assert count == len(list(lm.model.parameters()))
    ids, mask = lm.encode(["abc", "de"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (s + 1))
    for _ in range(2):
        lm.model(ids, mask).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert muon.param_groups[0]["lr"] == adamw.param_groups[0]["lr"] == pytest.approx(1e-2 / 3)
    other = MuonAdamW(lm.model.parameters(), 1e-2, 0.0, outside)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0] is other.parts[0].param_groups[0]
    assert other.param_groups[0]["lr"] == muon.param_groups[0]["lr"]


def test_the_config_of_the_shipped_model_runs(tmp_path: Path) -> None:
    c = read_config(SFTConfig, Path(__file__).parent.parent / "configs" / "tiny" / "sft.yaml")
    assert c.new_model is not None
    shape = {**c.new_model, "d_model": 16, "n_layers": 1, "n_heads": 2, "mlp_hidden_size": 16}
    sizes: dict[str, Any] = {
        "problems": [8],
        "validation_problems": 4,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
    }
    sizes |= {"output_dir": str(tmp_path / "run"), "report_to": [], "compile": False}
    small = dataclasses.replace(c, new_model=shape, **sizes)
    assert (train(small) / "model.safetensors").exists()


# ---- what a run takes where its file leaves a setting open -----------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"optimizer": "adamw", "learning_rate": 1e-5, "prompt_masking": 0.0, "warmup_steps": 0}),
        ({"lora_r": 2, "max_length": 64}, {"optimizer": "adamw", "learning_rate": 1e-4, "max_length": 64}),
        ({"optimizer": "muon", "prompt_masking": 0.5, "warmup_steps": 1}, {"optimizer": "muon", "prompt_masking": 0.5}),
        ({"model": None, "new_model": SHAPE}, {"optimizer": "muon", "learning_rate": 2e-3, "prompt_masking": 0.25}),
    ],
)
def test_what_is_left_open_suits_the_run(
    given: dict[str, Any], expected: dict[str, Any], tmp_path: Path, toy_folder: str
) -> None:
    values = {"output_dir": tmp_path / "run", "data": chat(tmp_path), "model": toy_folder, **SHORT, **given}
    c = SFTConfig(**values)
    model: Any = toy_folder if c.new_model is None else toy()
    found = SFTTrainer(model, c).config  # what ``config.yaml`` says of the run
    assert expected == {name: getattr(found, name) for name in expected}
    assert found.max_length is not None and found.max_length >= 20
    assert SFTTrainer(model, found).config == found  # what is written is the same run


@pytest.mark.parametrize(("warmup", "warned"), [(1, False), (2, True)])
def test_a_run_that_ends_in_its_warm_up_says_so(
    warmup: int, warned: bool, tmp_path: Path, toy_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train(SFTConfig(output_dir=tmp_path / "run", model=toy_folder, data=chat(tmp_path), warmup_steps=warmup, **SHORT))
    assert (f"all 2 updates fall into the warm-up of {warmup}" in capsys.readouterr().err) == warned


def test_other_arguments_of_the_trainer(tmp_path: Path, toy_folder: str) -> None:
    values: dict[str, Any] = {**SHORT, "model": toy_folder, "data": chat(tmp_path)}
    made = SFTTrainer(toy_folder, SFTConfig(output_dir=tmp_path, trainer_args={"adam_epsilon": 1e-6}, **values))
    assert made.args.adam_epsilon == 1e-6
    with pytest.raises(UserError, match="did you mean 'adam_epsilon'"):
        SFTTrainer(toy_folder, SFTConfig(output_dir=tmp_path, trainer_args={"adam_epsilom": 1e-6}, **values))


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output_dir: x\nmax_step: 3", "unknown key in .* did you mean 'max_steps'"),
        ("output_dir: x\nmax_steps: many", "max_steps in .* is 'many'"),
        ("output_dir: x\nmax_steps: 0", "max_steps is 0"),
        ("output_dir: x\noptimizer: sgd", "unknown optimizer .*muon"),
        ("tasks: [sudoku]", "lacks output_dir"),
    ],
)
def test_wrong_configs_name_the_fix(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_config(SFTConfig, file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "x.jsonl"}, "either tasks .* or data"),
        ({"num_train_epochs": 2.0}, "max_steps=6 and num_train_epochs=2.0: set one"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
        ({"adam_beta2": 1.5}, "adam_beta2 is 1.5"),
        ({"report_to": ["nowhere"]}, "unknown logger in report_to 'nowhere'"),
        ({"model": "tiny"}, "either model .* or new_model"),
        ({"lora_r": 2}, "a new_model trains whole"),
        ({"lora_r": 0, "new_model": None}, "lora_r is 0"),
    ],
)
def test_wrong_settings_name_the_fix(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"canvas": [16]}, "raise canvas"),
        ({"tasks": ["sudoku:style=paper"], "problems": [4]}, "no worked responses"),
        ({"new_model": {"n_layer": 2}}, "did you mean 'n_layers'"),
        ({"new_model": None}, "either model .* or new_model"),
        ({"tasks": [], "data": "DATA", "max_length": 4096}, r"max_length is 4096, but .* takes 1024 tokens: lower it"),
        ({"tasks": [], "data": "DATA", "validation_share": 1.0}, "leaves 0 rows to train on"),
        ({"tasks": []}, "nothing to train on: choose tasks"),
        ({"problems": [1, 2, 3]}, "one for each of the 2 tasks"),
        ({"lora_r": 2, "lora_target_modules": "nothing"}, "does not fit the model"),
        ({"dtype": "bfloat16"}, "would be trained in bfloat16"),
        ({"per_device_train_batch_size": 64}, "do not fill a batch of 64"),
        ({"output_dir": "/proc/nothing"}, "cannot write to /proc/nothing"),
    ],
)
def test_what_the_config_shows_is_refused_before_the_folder_is_made(
    changes: dict[str, Any], message: str, tmp_path: Path, toy_folder: str
) -> None:
    if {"lora_r", "dtype", "data"} & set(changes):
        changes = {"new_model": None, "model": toy_folder, "tasks": [f"{t}:style=compact" for t in TASKS], **changes}
    if "data" in changes:
        changes["data"] = chat(tmp_path)
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(config(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()
