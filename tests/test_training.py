"""Supervised training on tasks and on chat data: the loss by hand, exact resume, Muon, adapters, defaults and mistakes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import TrainerCallback

from conftest import SHAPE, saved, toy
from test_sft_data import WIDTH, chat, turns
from unmask import SFTConfig, SFTTrainer, UserError, load, make_task
from unmask.config import read_config
from unmask.models.adapters import LORA_TARGETS, adapter_config, add_adapter
from unmask.training.noise import corrupt, sample_times
from unmask.training.optim import MuonAdamW
from unmask.training.sft import train

ROOT = Path(__file__).parent.parent
TASKS: dict[str, dict[str, Any]] = {
    "sudoku": {"style": "compact", "max_empty": 6, "min_empty": 4},
    "countdown": {"style": "compact", "max_value": 6},
}
PLAIN: dict[str, Any] = {"bf16": False, "report_to": []}
SHORT = {"validation_share": 0.1, "max_steps": 2, "per_device_train_batch_size": 2, **PLAIN}


def config(output: Path, **changes: Any) -> SFTConfig:
    values: dict[str, Any] = {"new_model": {**SHAPE, "init_std": 0.02}, "task_defaults": TASKS, "tasks": list(TASKS)}
    values |= {"problems": [24, 12], "validation_problems": 8, "canvas": [96, 128], "max_steps": 6, "save_steps": 3}
    values |= {"per_device_train_batch_size": 8, "warmup_steps": 2, "logging_steps": 2, "eval_steps": 3, **PLAIN}
    return SFTConfig(output_dir=str(output), **{**values, **changes})


def same(one: Path, two: Path) -> bool:
    """The weights in the files of two models are the same to the bit."""
    a, b = (load_file(folder / "model.safetensors") for folder in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


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
    noise = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1))
    noisy, masked = corrupt(ids, torch.full((400, 1), 0.3), noise, maskable, 7)
    assert not masked[:, :50].any()
    assert torch.equal(noisy == 7, masked) and torch.equal(noisy[~masked], ids[~masked])
    assert abs(float(masked[:, 50:].float().mean()) - 0.3) < 0.01


def test_task_defaults_are_those_of_the_model_and_the_run(tmp_path: Path) -> None:
    """A new task beside the model's own; it is trained as it will be asked for. An adapter's final checkpoint has them too."""
    lm = toy(task_defaults=TASKS)
    model, added = saved(lm, tmp_path / "model"), {"chain_sum": {"style": "compact"}, "sudoku": {"max_empty": 5}}
    few: dict[str, Any] = {
        "problems": [8],
        "validation_problems": 2,
        "max_steps": 1,
        "save_steps": 1,
        "warmup_steps": 0,
    }
    few |= {
        "new_model": None,
        "model": model,
        "tasks": ["chain_sum"],
        "task_defaults": added,
        "canvas": [128],
        "lora_r": 2,
    }
    final = load(str(train(config(tmp_path / "run", **few))))
    assert final.task_defaults == {
        **TASKS,
        "sudoku": {**TASKS["sudoku"], "max_empty": 5},
        "chain_sum": {"style": "compact"},
    }
    for wrong, message in (
        ({"chain_sums": {}}, "did you mean 'chain_sum'"),
        ({"sudoku": {"styl": "compact"}}, "did you mean 'style'"),
        ({"sudoku": "compact"}, "task_defaults of sudoku is 'compact': write a table"),
    ):
        with pytest.raises(UserError, match=message):
            train(config(tmp_path / "wrong", **{**few, "task_defaults": wrong}))


def test_resume_equals_uninterrupted(tmp_path: Path) -> None:
    whole = train(config(tmp_path / "whole"))
    part = train(config(tmp_path / "part"))
    shutil.rmtree(part)  # as if killed after step 3
    shutil.rmtree(tmp_path / "part" / "checkpoint-6")
    assert same(whole, train(config(tmp_path / "part")))
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
    c = read_config(SFTConfig, ROOT / "configs" / "tiny" / "sft.yaml")
    shape = {**c.new_model, "d_model": 16, "n_layers": 1, "n_heads": 2, "mlp_hidden_size": 16}
    sizes: dict[str, Any] = {"problems": [8], "validation_problems": 4, "max_steps": 2, "new_model": shape}
    sizes |= {"per_device_train_batch_size": 4, "report_to": [], "compile": False, "output_dir": str(tmp_path / "run")}
    assert (train(dataclasses.replace(c, **sizes)) / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"optimizer": "adamw", "learning_rate": 1e-5, "prompt_masking": 0.0, "warmup_steps": 0}),
        ({"lora_r": 2, "max_length": 64}, {"optimizer": "adamw", "learning_rate": 1e-4, "max_length": 64}),
        ({"optimizer": "muon", "prompt_masking": 0.5, "warmup_steps": 1}, {"optimizer": "muon", "prompt_masking": 0.5}),
        ({"model": None, "new_model": SHAPE}, {"optimizer": "muon", "learning_rate": 2e-3, "prompt_masking": 0.25}),
    ],
)
def test_what_is_left_open_suits_the_run(given: Any, expected: Any, tmp_path: Path, toy_folder: str) -> None:
    c = SFTConfig(output_dir=tmp_path / "run", data=chat(tmp_path), **{"model": toy_folder, **SHORT, **given})
    model: Any = toy_folder if c.new_model is None else toy()
    found = SFTTrainer(model, c).config  # what ``config.yaml`` says of the run
    assert expected == {name: getattr(found, name) for name in expected}
    assert found.max_length is not None and found.max_length >= 20
    assert SFTTrainer(model, found).config == found  # what is written is the same run


def test_muon_is_not_for_engines_that_cut_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="which FSDP cuts: set it to adamw"):
        SFTTrainer(toy(), config(tmp_path, optimizer="muon"))
    trainer = SFTTrainer(toy(), config(tmp_path))
    assert trainer.config.optimizer == "adamw" and "trains with AdamW" in trainer.notice
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    trainer = SFTTrainer(toy(), config(tmp_path))
    assert trainer.config.optimizer == "muon" and not trainer.notice


@pytest.mark.parametrize("warmup", [1, 2])
def test_a_run_that_ends_in_its_warm_up_says_so(warmup: int, tmp_path: Path, toy_folder: str, capsys: Any) -> None:
    run = {"model": toy_folder, "warmup_steps": warmup, "max_steps": 2}
    train(chat_config(tmp_path / "run", chat(tmp_path), **run))
    assert (f"all 2 updates fall into the warm-up of {warmup}" in capsys.readouterr().err) == (warmup == 2)


def test_other_arguments_of_the_trainer(tmp_path: Path) -> None:
    def made(**extra: float) -> SFTTrainer:
        return SFTTrainer(toy(), chat_config(tmp_path, chat(tmp_path), trainer_args=extra))

    assert made(adam_epsilon=1e-6).args.adam_epsilon == 1e-6
    with pytest.raises(UserError, match="did you mean 'adam_epsilon'"):
        made(adam_epsilom=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "x.jsonl"}, "either tasks .* or data"),
        ({"num_train_epochs": 2.0}, "max_steps=6 and num_train_epochs=2.0: set one"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
        ({"optimizer": "sgd"}, "unknown optimizer .*muon"),
        ({"adam_beta2": 1.5}, "adam_beta2 is 1.5"),
        ({"report_to": ["nowhere"]}, "unknown logger in report_to 'nowhere'"),
        ({"model": "tiny"}, "either model .* or new_model"),
        ({"lora_r": 2}, "a new_model trains whole"),
        ({"lora_r": 0, "new_model": None}, "lora_r is 0"),
        ({"canvas": [16]}, "raise canvas"),
        ({"tasks": ["sudoku:style=paper"], "problems": [4]}, "no worked responses"),
        ({"new_model": {"n_layer": 2}}, "did you mean 'n_layers'"),
        ({"tasks": [], "data": "DATA", "max_length": 4096}, r"max_length is 4096, but .* takes 1024 tokens: lower it"),
        ({"tasks": []}, "nothing to train on: choose tasks"),
        ({"problems": [1, 2, 3]}, "one for each of the 2 tasks"),
        ({"per_device_train_batch_size": 64}, "do not fill a batch of 64"),
    ],
)
def test_what_the_config_shows_is_refused_early(changes: Any, message: str, tmp_path: Path, toy_folder: str) -> None:
    """That is before the folder is made."""
    if changes.get("data") == "DATA":
        changes = {**changes, "new_model": None, "model": toy_folder, "data": chat(tmp_path)}
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(config(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()


def chat_config(output: Path, data: str | None = None, **changes: Any) -> SFTConfig:
    values: dict[str, Any] = {**SHORT, "max_length": WIDTH, "max_steps": 4, "learning_rate": 1e-2, "warmup_steps": 0}
    values |= {"gradient_accumulation_steps": 2, "logging_steps": 1, "eval_steps": 2, "save_steps": 2}
    return SFTConfig(output_dir=output, data=data, **{**values, **changes})


@pytest.mark.parametrize(("kind", "eos_in_loss"), [("chat", True), ("chat", False), ("tasks", True)])
def test_loss_and_gradient_by_hand(tmp_path: Path, kind: str, eos_in_loss: bool) -> None:
    """Each row alone, without padding: response, end of turn and filling are masked and learned, the prompt never is.

    The softmax by hand runs over the whole vocabulary, the mask token included.
    """
    lm = toy()
    if kind == "chat":
        trainer = SFTTrainer(lm, chat_config(tmp_path / "t", chat(tmp_path), eos_in_loss=eos_in_loss))
    else:
        c = config(tmp_path, new_model=None, problems=[8, 4], canvas=[128])
        trainer = SFTTrainer(lm, c, [make_task(name, TASKS) for name in TASKS])
    rows: Any = trainer.train_dataset
    assert kind == "chat" or (len(rows) == 16 and rows[1] is rows[9])  # the smaller set repeats
    batch = trainer.data_collator(rows[:4])
    width = batch["ids"].shape[1]
    t = torch.tensor([[0.3], [0.9], [0.5], [0.7]])
    found = trainer.loss_at(lm.model, batch, t, max(trainer.canvases), 0.0, torch.Generator().manual_seed(3))
    found.backward()
    gradient = {n: p.grad.clone() for n, p in lm.model.named_parameters() if p.grad is not None}

    generator = torch.Generator().manual_seed(3)
    torch.rand(4, generator=generator)  # which rows mask their prompt: none
    draws = torch.rand(4, width, generator=generator)
    lm.model.zero_grad()
    total, tokens, kinds = torch.zeros(()), 0, set()
    for i, row in enumerate(rows[:4]):
        ids, prompt, response = batch["ids"][i], row["prompt"].tolist(), row["response"].tolist()
        first = len(prompt) if kind == "chat" else trainer.prompt_width  # prompts of tasks are padded on the left
        begin, end = first - len(prompt), first + len(response)
        assert ids[begin:end].tolist() == prompt + response and response[-1] == lm.eot_id
        assert set(ids[end:].tolist()) == {lm.eos_id}
        hidden = [j for j in range(first, width) if draws[i, j] < t[i]]
        last = width if eos_in_loss else end
        masked = [j for j in hidden if j < last]
        kinds |= {int(ids[j]) for j in masked} & {lm.eos_id, lm.eot_id}
        tokens += last - first
        noisy = ids.clone()
        noisy[hidden] = lm.mask_id
        logits = lm.model(noisy[None, begin:]).logits[0][[j - begin for j in masked]]
        total = total + F.cross_entropy(logits, ids[masked], reduction="sum") / t[i]
    (total / tokens).backward()
    assert kinds == ({lm.eos_id, lm.eot_id} if eos_in_loss else {lm.eot_id})
    assert float(found.detach()) == pytest.approx(float(total.detach()) / tokens, rel=1e-5)
    for name, p in lm.model.named_parameters():
        assert p.grad is not None and torch.allclose(gradient[name], p.grad, rtol=1e-3, atol=1e-5), name
    lm.model.zero_grad()
    nothing = trainer.loss_at(lm.model, batch, torch.full((4, 1), 1e-9), max(trainer.canvases), 0.0, generator)
    nothing.backward()  # nothing is masked
    assert float(nothing.detach()) == 0.0 and not any(p.grad.any() for p in lm.model.parameters())  # type: ignore[union-attr]


def test_micro_batches_draw_from_one_generator_in_turn(tmp_path: Path) -> None:
    """The gradient of an update of 2 micro-batches: the mean of their losses, noise of the step's generator in sequence."""
    lm = toy()
    seen: list[dict[str, Any]] = []
    gradients: list[list[torch.Tensor]] = []

    class Seen(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append({k: v.clone() for k, v in inputs.items()})
            return super().compute_loss(model, inputs, *args, **kwargs)

    extra = {"save_strategy": "no", "eval_strategy": "no", "max_grad_norm": 0.0}
    c = chat_config(tmp_path / "t", chat(tmp_path), seed=7, learning_rate=1e-30, max_steps=2, trainer_args=extra)
    watch = TrainerCallback()
    watch.on_pre_optimizer_step = lambda *_, **__: gradients.append([p.grad.clone() for p in lm.model.parameters()])
    t = Seen(lm, c, callbacks=[watch])
    t.train()
    assert len(seen) == 4 and len(gradients) == 2
    for step in (0, 1):
        generator = torch.Generator().manual_seed((7 * 1_000_003 + step) * 1009)
        lm.model.zero_grad()
        for batch in seen[2 * step : 2 * step + 2]:
            (t.loss_at(lm.model, batch, sample_times(2, generator)[:, None], WIDTH, 0.0, generator) / 2).backward()
        for found, p in zip(gradients[step], lm.model.parameters(), strict=True):
            assert torch.allclose(found, p.grad, rtol=1e-4, atol=1e-6)


def test_an_adapter_run_resumes_exactly_and_ends_merged(tmp_path: Path, toy_folder: str, capsys: Any) -> None:
    """With dropout, accumulation and more than one epoch: killed and resumed is uninterrupted, bit for bit."""
    settings: dict[str, Any] = {"model": toy_folder, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.3}
    settings |= {"max_steps": 8, "save_steps": 5}
    data = chat(tmp_path)
    final = train(chat_config(tmp_path / "whole", data, **settings))
    assert "11 training and 1 validation rows, 0 of them cut" in capsys.readouterr().err
    part = chat_config(tmp_path / "part", data, **settings)
    shutil.rmtree(train(part))
    shutil.rmtree(tmp_path / "part" / "checkpoint-8")  # as if killed after update 5, in the second epoch of three
    again = train(part)
    assert same(final, again)
    shutil.rmtree(again)  # a finished run is only finished again
    assert same(final, train(part))

    assert not (final / "adapter_config.json").exists()
    whole = load_file(final / "model.safetensors")
    low = load_file(tmp_path / "whole" / "checkpoint-8" / "adapter_model.safetensors")
    moved = 0
    for key, weight in load_file(Path(toy_folder) / "model.safetensors").items():
        stem = f"base_model.model.{key.removesuffix('.weight')}.lora_"
        if f"{stem}A.weight" in low:
            change = low[f"{stem}B.weight"] @ low[f"{stem}A.weight"] * (8 / 4)
            assert change.abs().max() > 1e-4 and torch.allclose(whole[key], weight + change, atol=1e-6), key
            moved += 1
        else:
            assert torch.equal(whole[key], weight), key
    adapter = json.loads((tmp_path / "whole" / "checkpoint-8" / "adapter_config.json").read_text())
    assert adapter["lora_dropout"] == 0.3 and Path(adapter["base_model_name_or_path"]) == Path(toy_folder)
    assert moved == 7 * SHAPE["n_layers"]  # type: ignore[operator]


def test_accumulation_is_part_of_the_run(tmp_path: Path, toy_folder: str) -> None:
    """The number of updates of epochs, and the learning rate that ends at zero on the last of them."""
    half: dict[str, Any] = {"max_steps": None, "num_train_epochs": 1.5, "lr_scheduler_type": "linear"}
    c = chat_config(tmp_path / "run", chat(tmp_path, 24), model=toy_folder, save_steps=100, **half)
    train(c)
    state = json.loads((tmp_path / "run" / "checkpoint-9" / "trainer_state.json").read_text())
    # 22 training rows are 11 batches, hence 6 updates an epoch (the last of one batch), 9 in all.
    assert state["global_step"] == state["max_steps"] == math.ceil(1.5 * math.ceil(11 / 2)) == 9
    rates = [e["learning_rate"] for e in state["log_history"] if "learning_rate" in e]
    assert rates == pytest.approx([1e-2 * (9 - i) / 9 for i in range(9)])
    assert [e["step"] for e in state["log_history"] if "eval_loss" in e] == [2, 4, 6, 8, 9]
    with pytest.raises(UserError, match="run with other per_device_train_batch_size, gradient_accumulation_steps"):
        train(dataclasses.replace(c, per_device_train_batch_size=1, gradient_accumulation_steps=4))


def test_fine_tuning_from_python_learns_when_to_stop(tmp_path: Path, toy_folder: str) -> None:
    """One exchange, learned by an adapter: greedy decoding gives it back with its end of turn and the filling behind it."""
    lm = load(toy_folder)
    sizes: dict[str, Any] = {"max_length": 24, "validation_share": 0.0, "per_device_train_batch_size": 8}
    sizes |= {"gradient_accumulation_steps": 1, "max_steps": 100, "logging_steps": 100, "save_steps": 100}
    sizes |= {"lora_r": 16, "lr_scheduler_type": "linear", "activation_checkpointing": True}
    trainer = SFTTrainer(lm, chat_config(tmp_path / "run", **sizes), [{"messages": turns("say", "it is so")}] * 8)
    trainer.train()
    out = trainer.lm.generate("say", decoder="full:steps=19", max_new_tokens=19)
    expected = "it is so<|eot_id|>" + "<|endoftext|>" * 10
    assert out.trajectory.tokens[0].tolist() == lm.tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_adapters_reach_every_matrix_of_every_block() -> None:
    adapted = [n for n, _ in add_adapter(toy(), adapter_config(2, 4), 0).model.named_parameters() if "lora_A" in n]
    names = {n.rsplit(".lora_A", 1)[0].removeprefix("base_model.model.") for n in adapted}
    assert names == {n for n, m in toy().model.named_modules() if isinstance(m, torch.nn.Linear) and ".blocks." in n}
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert re.fullmatch(LORA_TARGETS, f"model.layers.11.{name}")
    for name in ("lm_head", "model.transformer.ff_out", "model.layers.1.input_layernorm", "model.embed_tokens"):
        assert not re.fullmatch(LORA_TARGETS, name)


def test_the_s1k_recipe_is_the_published_one() -> None:
    """d1's settings."""
    c = read_config(SFTConfig, ROOT / "configs" / "llada" / "sft_s1k.yaml")
    published: dict[str, Any] = {"model": "GSAI-ML/LLaDA-8B-Instruct", "data": "simplescaling/s1K", "dtype": "bfloat16"}
    published |= {"max_length": 4096, "overlong": "truncate", "validation_share": 0.01, "num_train_epochs": 20}
    published |= {"lora_r": 128, "lora_alpha": 256, "lora_dropout": 0.05, "bf16": True, "max_grad_norm": 1.0}
    published |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "learning_rate": 1e-5}
    published |= {"lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": 0.1, "adam_beta2": 0.999}
    published |= {"optimizer": "adamw", "prompt_masking": 0.0, "eos_in_loss": True}
    assert {name: getattr(c, name) for name in published} == published
    names = [n for n, m in toy().model.named_modules() if isinstance(m, torch.nn.Linear)]
    reached = {n.rsplit(".", 1)[1] for n in names if re.fullmatch(c.lora_target_modules, n)}
    assert reached == {"q_proj", "k_proj", "v_proj"}
