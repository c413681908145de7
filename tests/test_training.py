"""Noise and supervised training: the loss by hand, exact resume, Muon in one optimiser."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional as F

from conftest import SHAPE, toy
from unmask import UserError, load
from unmask.config import read_config
from unmask.training.noise import corrupt, diffusion_loss, sample_times
from unmask.training.optim import MuonAdamW
from unmask.training.sft import Collate, Examples, SFTConfig, train

TASKS = {
    "sudoku": {"style": "compact", "max_empty": 6, "min_empty": 4},
    "countdown": {"style": "compact", "max_value": 6},
}


def config(output: Path, **changes: object) -> SFTConfig:
    shape = {**SHAPE, "init_std": 0.02, "task_defaults": TASKS}
    values = {
        "output_dir": str(output),
        "tasks": ["sudoku", "countdown"],
        "new_model": shape,
        "problems": [24, 12],
        "validation_problems": 8,
        "canvas": [96, 128],
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "warmup_steps": 2,
        "logging_steps": 2,
        "eval_steps": 3,
        "save_steps": 3,
        "report_to": [],
        "bf16": False,
    }
    return SFTConfig(**{**values, **changes})  # type: ignore[arg-type]


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
    t = torch.full((400,), 0.3)
    noisy, masked = corrupt(ids, t, maskable, 7, torch.Generator().manual_seed(1))
    assert not masked[:, :50].any()
    assert torch.equal(noisy == 7, masked) and torch.equal(noisy[~masked], ids[~masked])
    assert abs(float(masked[:, 50:].float().mean()) - 0.3) < 0.01


def test_loss_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 3.0, 0.0]])
    targets, t = torch.tensor([0, 2, 1]), torch.tensor([0.5, 0.5, 0.25])
    by_hand = 0.0
    for row, y, time in zip(logits.tolist(), targets.tolist(), t.tolist(), strict=True):
        p = torch.tensor(row, dtype=torch.float64).exp()
        by_hand += -float((p[y] / p.sum()).log()) / time
    logprob = logits.log_softmax(-1)[torch.arange(3), targets]
    assert float(diffusion_loss(logprob, t, 20)) == pytest.approx(by_hand / 20, rel=1e-6)


def test_collation_and_loss_regions() -> None:
    lm = toy(task_defaults=TASKS)
    rows = Examples(lm, ["sudoku", "countdown"], "train", [4, 2], 0)
    assert len(rows) == 8 and rows[1] == rows[5]  # the smaller set repeats
    batch = Collate(lm, rows.prompt_width, 128)([rows[i] for i in range(4)])
    for i in range(4):
        start = rows.prompt_width - len(rows[i]["prompt"])
        assert batch["visible"][i].tolist() == [False] * start + [True] * (len(rows[i]["prompt"]) + 128)
        response = batch["ids"][i, rows.prompt_width :].tolist()
        n = len(rows[i]["response"])
        assert response[:n] == rows[i]["response"] and response[n - 1] == lm.eot_id
        assert set(response[n:]) == {lm.eos_id}


@pytest.mark.parametrize("eos_in_loss", [True, False])
def test_trainer_loss_equals_restatement(tmp_path: Path, eos_in_loss: bool) -> None:
    """The trainer's loss of a batch, row by row: only canvas tokens (with or without filling), weighted by 1/t."""
    from transformers import TrainingArguments

    from unmask.training.sft import DiffusionTrainer

    lm = toy(task_defaults=TASKS)
    c = config(tmp_path, eos_in_loss=eos_in_loss)
    rows = Examples(lm, c.tasks, "train", [4, 4], 0)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = DiffusionTrainer(lm, c, rows.prompt_width, args=arguments)
    batch = Collate(lm, rows.prompt_width, 128)([rows[i] for i in range(4)])
    t = torch.tensor([0.2, 0.9, 0.5, 0.7])
    found = trainer.loss_at(lm.model, batch, t, 128, 0.0, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    torch.rand(4, generator=generator)  # the draw that decides on prompt masking
    draws = torch.rand(4, rows.prompt_width + 128, generator=generator)
    total, tokens = 0.0, 0
    for i in range(4):
        hidden = [j for j in range(rows.prompt_width, rows.prompt_width + 128) if draws[i, j] < t[i]]
        last = rows.prompt_width + (128 if eos_in_loss else len(rows[i]["response"]))
        masked = [j for j in hidden if j < last]
        tokens += last - rows.prompt_width
        noisy = batch["ids"][i].clone()
        noisy[hidden] = lm.mask_id
        logits = lm.model(noisy[None], batch["visible"][i][None]).logits[0]
        loss = F.cross_entropy(logits[masked], batch["ids"][i, masked], reduction="sum").detach()
        total += float(loss) / float(t[i])
    assert float(found.detach()) == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resume_equals_uninterrupted(tmp_path: Path, optimizer: str) -> None:
    whole = load_file(train(config(tmp_path / "whole", optimizer=optimizer)) / "model.safetensors")
    part = train(config(tmp_path / "part", optimizer=optimizer))
    shutil.rmtree(part)  # as if killed after step 3
    shutil.rmtree(tmp_path / "part" / "checkpoint-6")
    again = load_file(train(config(tmp_path / "part", optimizer=optimizer)) / "model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    assert load(str(tmp_path / "part" / "final")).model.config.task_defaults == TASKS


def test_a_run_folder_belongs_to_one_run(tmp_path: Path) -> None:
    train(config(tmp_path))
    with pytest.raises(UserError, match="run with other canvas, steps, seed"):
        train(config(tmp_path, seed=1, max_steps=9, canvas=[128]))
    cut = tmp_path / "checkpoint-9"  # a checkpoint cut off while it was written is passed over
    shutil.copytree(tmp_path / "checkpoint-6", cut)
    (cut / "trainer_state.json").unlink()
    assert (train(config(tmp_path)) / "model.safetensors").exists()
    with pytest.raises(UserError, match="cannot write"):
        train(config(Path("/proc/nothing")))
    with pytest.raises(UserError, match="did you mean 'n_layers'"):
        train(config(tmp_path / "b", new_model={"n_layer": 2}))


def test_training_learns(tmp_path: Path) -> None:
    """Forty steps on one problem a task bring the loss down by more than half."""
    c = config(
        tmp_path, problems=[1], per_device_train_batch_size=2, max_steps=40, learning_rate=5e-3, warmup_steps=5, eval_steps=40, save_steps=40
    )
    train(c)
    state = yaml.safe_load((tmp_path / "checkpoint-40" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


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


def test_every_config_loads_and_runs(tmp_path: Path) -> None:
    """Each file in configs/, at toy size for two steps."""
    configs = Path(__file__).parent.parent.glob("configs/**/*.yaml")
    files = sorted(f for f in configs if "new_model:" in f.read_text())  # test_rl_runs has the others
    assert files
    for number, file in enumerate(files):
        c = read_config(SFTConfig, file)
        assert c.new_model is not None
        small = dataclasses.replace(
            c,
            output_dir=str(tmp_path / str(number)),
            new_model={**c.new_model, "d_model": 16, "n_layers": 1, "n_heads": 2, "mlp_hidden_size": 16},
            problems=[8],
            validation_problems=4,
            max_steps=2,
            per_device_train_batch_size=4,
            compile=False,
            report_to=[],
        )
        assert (train(small) / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: x\ntasks: [sudoku]\nnew_model: {}\nstep: 3", "did you mean 'steps'"),
        ("output: x\ntasks: [sudoku]\nnew_model: {}\nsteps: many", "steps in .* is 'many'"),
        ("output: x\ntasks: [sudoku]\nnew_model: {}\nsteps: 0", "steps is 0"),
        ("output: x\ntasks: [sudoku]", "give either model"),
        ("output: x\ntasks: [sudoku]\nnew_model: {}\nproblems: [1, 2]", "one for each of the 1 tasks"),
        ("output: x\ntasks: [sudoku]\nnew_model: {}\noptimizer: sgd", "give muon or adamw"),
        ("tasks: [sudoku]\nnew_model: {}", "lacks output"),
        ("- a\n- b", "not a table"),
        ("a: [", "not YAML"),
    ],
)
def test_wrong_configs_name_the_fix(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_config(SFTConfig, file)


def test_too_long_responses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="raise canvas"):
        train(config(tmp_path, canvas=[16]))
    with pytest.raises(UserError, match="no worked responses"):
        train(config(tmp_path, tasks=["sudoku:style=paper"], problems=[4]))
