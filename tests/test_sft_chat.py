"""Fine-tuning on chat data: what is learned, adapters, accumulation, resume, the recipe, the way in from Python."""

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

from conftest import SHAPE, toy
from test_sft_data import WIDTH, chat, turns
from unmask import SFTConfig, SFTTrainer, UserError, load
from unmask.config import read_config
from unmask.models.adapters import LORA_TARGETS, adapter_config, add_adapter
from unmask.training.noise import sample_times
from unmask.training.sft import train

ROOT = Path(__file__).parent.parent


def config(output: Path, data: str | None = None, **changes: Any) -> SFTConfig:
    values: dict[str, Any] = {"max_length": WIDTH, "validation_share": 0.1, "max_steps": 4, "learning_rate": 1e-2}
    values |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "warmup_steps": 0, "bf16": False}
    values |= {"logging_steps": 1, "eval_steps": 2, "save_steps": 2, "report_to": []}
    return SFTConfig(output_dir=output, data=data, **{**values, **changes})


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eos_in_loss", [True, False])
def test_loss_and_gradient_by_hand(tmp_path: Path, eos_in_loss: bool) -> None:
    """Each row alone, without padding: response, end of turn and filling are masked and learned, the prompt never is.

    The softmax by hand runs over the whole vocabulary, the mask token included.
    """
    lm = toy()
    trainer = SFTTrainer(lm, config(tmp_path / "t", chat(tmp_path), eos_in_loss=eos_in_loss))
    rows: Any = trainer.train_dataset
    batch = trainer.data_collator(rows[:4])
    lengths = [(len(r["prompt"]), len(r["response"])) for r in rows[:4]]
    assert len({p for p, _ in lengths}) > 2
    t = torch.tensor([0.3, 0.9, 0.5, 0.7])
    found = trainer.loss_at(lm.model, batch, t, WIDTH, 0.0, torch.Generator().manual_seed(3))
    found.backward()
    gradient = {n: p.grad.clone() for n, p in lm.model.named_parameters() if p.grad is not None}

    generator = torch.Generator().manual_seed(3)
    torch.rand(4, generator=generator)  # which rows mask their prompt: none
    draws = torch.rand(4, WIDTH, generator=generator)
    lm.model.zero_grad()
    total, tokens = torch.zeros(()), 0
    kinds = set()
    for i, (prompt, response) in enumerate(lengths):
        ids = batch["ids"][i]
        assert ids[:prompt].tolist() == rows[i]["prompt"].tolist()
        assert ids[prompt + response - 1] == lm.eot_id and set(ids[prompt + response :].tolist()) == {lm.eos_id}
        hidden = [j for j in range(prompt, WIDTH) if draws[i, j] < t[i]]
        last = WIDTH if eos_in_loss else prompt + response
        masked = [j for j in hidden if j < last]
        kinds |= {int(ids[j]) for j in masked} & {lm.eos_id, lm.eot_id}
        tokens += last - prompt
        noisy = ids.clone()
        noisy[hidden] = lm.mask_id
        total = total + F.cross_entropy(lm.model(noisy[None]).logits[0][masked], ids[masked], reduction="sum") / t[i]
    (total / tokens).backward()
    assert kinds == ({lm.eos_id, lm.eot_id} if eos_in_loss else {lm.eot_id})
    assert float(found.detach()) == pytest.approx(float(total.detach()) / tokens, rel=1e-5)
    for name, p in lm.model.named_parameters():
        assert p.grad is not None and torch.allclose(gradient[name], p.grad, rtol=1e-3, atol=1e-5), name
    lm.model.zero_grad()
    nothing = trainer.loss_at(lm.model, batch, torch.full((4,), 1e-9), WIDTH, 0.0, generator)
    nothing.backward()  # nothing is masked
    assert float(nothing.detach()) == 0.0 and not any(p.grad.any() for p in lm.model.parameters())  # type: ignore[union-attr]


def test_micro_batches_draw_from_one_generator_in_turn(tmp_path: Path) -> None:
    """The gradient of an update of 2 micro-batches: the mean of their losses, noise of the step's generator in sequence."""
    lm = toy()
    seen: list[dict[str, Any]] = []
    gradients: list[dict[str, Any]] = []

    class Grads(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gradients.append({n: p.grad.clone() for n, p in lm.model.named_parameters()})

    class Seen(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append({k: v.clone() for k, v in inputs.items()})
            return super().compute_loss(model, inputs, *args, **kwargs)

    extra = {"save_strategy": "no", "eval_strategy": "no", "max_grad_norm": 0.0}
    c = config(tmp_path / "t", chat(tmp_path), seed=7, learning_rate=1e-30, max_steps=2, trainer_args=extra)
    t = Seen(lm, c, callbacks=[Grads()])
    t.train()
    assert len(seen) == 4 and len(gradients) == 2
    for step in (0, 1):
        generator = torch.Generator().manual_seed((7 * 1_000_003 + step) * 1009)
        lm.model.zero_grad()
        for batch in seen[2 * step : 2 * step + 2]:
            (t.loss_at(lm.model, batch, sample_times(2, generator), WIDTH, 0.0, generator) / 2).backward()
        for name, p in lm.model.named_parameters():
            assert p.grad is not None and torch.allclose(gradients[step][name], p.grad, rtol=1e-4, atol=1e-6), name


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_an_adapter_run_resumes_exactly_and_ends_merged(
    tmp_path: Path, toy_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With dropout, accumulation and more than one epoch: killed and resumed is uninterrupted, bit for bit."""
    settings: dict[str, Any] = {"model": toy_folder, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.3}
    settings |= {"max_steps": 8, "save_steps": 5}
    data = chat(tmp_path)
    final = train(config(tmp_path / "whole", data, **settings))
    assert "11 training and 1 validation rows, 0 of them cut" in capsys.readouterr().err
    part = config(tmp_path / "part", data, **settings)
    shutil.rmtree(train(part))
    shutil.rmtree(tmp_path / "part" / "checkpoint-8")  # as if killed after update 5, in the second epoch of three
    again = train(part)
    whole, resumed = (load_file(f / "model.safetensors") for f in (final, again))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole) and whole.keys() == resumed.keys()
    shutil.rmtree(again)  # a finished run is only finished again
    assert all(torch.equal(whole[k], v) for k, v in load_file(train(part) / "model.safetensors").items())

    assert not (final / "adapter_config.json").exists()
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
    c = config(tmp_path / "run", chat(tmp_path, 24), model=toy_folder, save_steps=100, **half)
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
    c = config(tmp_path / "run", lora_r=16, lr_scheduler_type="linear", activation_checkpointing=True, **sizes)
    trainer = SFTTrainer(lm, c, [{"messages": turns("say", "it is so")}] * 8)
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


# ---- the recipe ------------------------------------------------------------------------------------------------------


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
