"""``final``: its card, that it opens without unmask as its family allows, and that what is merged has the same logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel

from checkpoints import WRITERS, write_dream, write_llada, write_qwen3_a2d
from conftest import SHAPE
from test_sft_data import chat
from unmask import DiffusionGRPOConfig, SFTConfig, load
from unmask.rl.run import train as train_rl
from unmask.training.run_folder import export
from unmask.training.sft import train

SMALL: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 2, "eval_steps": 2, "save_steps": 2}
SMALL |= {"bf16": False, "report_to": []}


def write_qwen3(folder: Path) -> str:
    """A converted checkpoint that kept its parent's name, and names Python files that are not there."""
    write_qwen3_a2d(folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"architectures": ["Qwen3ForCausalLM"], "auto_map": {"AutoModel": "modeling.Nothing"}}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen3", **names}))
    return str(folder)


FAMILIES: dict[str, tuple[Any, str | None, int | None]] = {  # the class that opens it elsewhere; the adapter's rank
    "llada": (write_llada, None, None),
    "Dream": (write_dream, "Qwen2ForCausalLM", 2),
    "a2d-qwen3": (write_qwen3_a2d, "Qwen3ForCausalLM", None),
    "qwen3": (write_qwen3, "AutoModelForCausalLM", 2),
}
ELSEWHERE = """
import sys, transformers
from peft import LoraConfig, get_peft_model
for opener, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    model = getattr(transformers, opener).from_pretrained(folder, dtype="float32")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    print(float(sum(p.detach().double().sum() for n, p in model.named_parameters() if "lora" not in n)))
assert "unmask" not in sys.modules
"""


def test_final_opens_elsewhere(tmp_path: Path) -> None:
    opened = []
    for family, (write, opener, rank) in FAMILIES.items():
        base, output = write(tmp_path / family), str(tmp_path / f"{family}-run")
        values = {"data": chat(tmp_path), "model": base, "validation_share": 0.1, "lora_r": rank, **SMALL}
        final = train(SFTConfig(output_dir=output, **values))
        config = json.loads((final / "config.json").read_text())
        assert config["model_type"] == family and "auto_map" not in config
        assert "auto_map" not in json.loads((final / "tokenizer_config.json").read_text())
        lm = load(str(final), "float32")
        assert lm.model.config.model_type == family
        if family != "qwen3":  # that is transformers' own, with causal attention
            assert type(AutoConfig.from_pretrained(final)) is type(lm.model.config)
            found = AutoModel.from_pretrained(final, dtype="float32")
            assert all(torch.equal(a, b) for a, b in zip(found.parameters(), lm.model.parameters(), strict=True))
        card = (final / "README.md").read_text(encoding="utf-8")
        assert (opener or "Python files").removeprefix("AutoModelFor") in card
        if opener is not None:
            opened.append((opener, str(final), float(sum(p.detach().double().sum() for p in lm.model.parameters()))))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", ELSEWHERE, *(text for o in opened for text in o[:2])]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert [float(line) for line in done.stdout.split()] == pytest.approx([o[2] for o in opened], rel=1e-6)


@pytest.mark.parametrize("command", ["sft from nothing without validation", "rl"])
def test_the_card_says_what_was_done(command: str, tmp_path: Path, toy_folder: str) -> None:
    output = str(tmp_path / "my-run")
    if command == "rl":
        few = {"num_generations": 2, "max_completion_length": 4, "problems": 2, "validation_problems": 1, "lora_r": 2}
        few |= {"model": toy_folder, "tasks": ["sudoku:style=compact"], "learning_rate": 1e-3, **SMALL}
        final = train_rl(DiffusionGRPOConfig(output_dir=output, **few))
    else:
        final = train(SFTConfig(output_dir=output, data=chat(tmp_path), validation_share=0.0, new_model=SHAPE, **SMALL))
    _, head, body = (final / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    front = yaml.safe_load(head)
    assert front.get("base_model") == (None if "nothing" in command else toy_folder)
    assert front["library_name"] == "transformers" and {"unmask", command.split()[0]} <= set(front["tags"])
    assert ("lora" in front["tags"]) == (command == "rl")
    assert body.startswith("\n# my-run\n") and f"`unmask {command.split()[0]}`" in body and "unmask.load" in body
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert recipe["max_steps"] == 2 and recipe["learning_rate"] == {"rl": 1e-3, "sft": 1e-5}.get(command, 2e-3)
    state = json.loads((tmp_path / "my-run" / "checkpoint-2" / "trainer_state.json").read_text())
    last = [line for line in state["log_history"] if "eval_loss" in line or "eval_reward" in line]
    assert bool(last) == ("without" not in command)
    for name, value in last[-1].items() if last else ():
        assert not name.startswith("eval_") or f"| {name.removeprefix('eval_')} | {value:.4g} |" in body
    assert "Validation after update 2" in body or "No validation" in body


HEAD = r".*(lm_head|transformer\.ff_out)"
EMBEDDINGS = r".*(embed_tokens|wte)"
LAYERS = r".*(blocks|layers)\.\d+\..*(_proj|attn_out|ff_out)"
ADAPTERS: dict[str, dict[str, Any]] = {
    "layers": {"target_modules": LAYERS},
    "head": {"target_modules": f"{LAYERS}|{HEAD}"},
    "embeddings": {"target_modules": EMBEDDINGS},
    "both": {"target_modules": f"{LAYERS}|{HEAD}|{EMBEDDINGS}"},
    "both, DoRA": {"target_modules": f"{LAYERS}|{HEAD}|{EMBEDDINGS}", "use_dora": True},
    "both, rsLoRA": {"target_modules": f"{LAYERS}|{HEAD}|{EMBEDDINGS}", "use_rslora": True},
    "whole head": {"target_modules": LAYERS, "modules_to_save": ["lm_head", "transformer.ff_out"]},
    "whole embeddings": {"target_modules": LAYERS, "modules_to_save": ["embed_tokens", "wte"]},
    "some tokens": {"target_modules": LAYERS, "trainable_token_indices": [300, 301, 302]},
    "both, tied": {"target_modules": f"{LAYERS}|{HEAD}|{EMBEDDINGS}", "ensure_weight_tying": True},
}


CASES = [(family, True, adapter) for family in ("llada", "qwen3-a2d") for adapter in ADAPTERS]
CASES += [(family, False, adapter) for family in ("llada", "dream") for adapter in ("both, DoRA", "whole head")]


@pytest.mark.parametrize(("family", "tied", "adapter"), CASES)
def test_merged_equals_unmerged(family: str, tied: bool, adapter: str, tmp_path: Path) -> None:
    tie = {"weight_tying" if family == "llada" else "tie_word_embeddings": tied}
    base = WRITERS[family](tmp_path / "base", **tie)
    lm = load(base, "float32")
    ids, mask = lm.encode(["hello there", "an in"])
    settings = dict(ADAPTERS[adapter])
    if "trainable_token_indices" in settings and family == "llada":  # peft looks for embed_tokens
        settings["trainable_token_indices"] = {"wte": settings["trainable_token_indices"]}
    torch.manual_seed(3)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # peft's, of tied weights
        before = lm.model(ids, mask).logits
        model: Any = get_peft_model(lm.model, LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, **settings))
        for name, p in model.named_parameters():  # as if trained
            if p.requires_grad and "magnitude" not in name:
                p += 0.1 * torch.randn_like(p)
        expected = model(input_ids=ids, attention_mask=mask).logits
        assert (expected - before).abs().max() > 1
        model.save_pretrained(tmp_path / "adapter")
        model.save_pretrained(tmp_path / "alone", save_embedding_layers=False)
    merged, alone = (load(base, "float32", adapter=str(tmp_path / name)) for name in ("adapter", "alone"))
    again = load(str(export(merged, tmp_path / "plain")))
    for found in (merged, alone, again):
        assert torch.allclose(found.model(ids, mask).logits, expected, atol=1e-3)
