"""Adapters: what is merged and exported gives the logits of the model that was trained, whatever the adapter changes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from checkpoints import write_dream, write_llada, write_qwen3_a2d
from unmask import load
from unmask.training.run_folder import export

FAMILIES = {"llada": write_llada, "dream": write_dream, "qwen3": write_qwen3_a2d}
_TIES = {"llada": "weight_tying"}
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], str]:
    return {
        (name, tied): write(tmp_path_factory.mktemp(name), **{_TIES.get(name, "tie_word_embeddings"): tied})
        for name, write in FAMILIES.items()
        for tied in (True, False)
    }


CASES = [(family, True, adapter) for family in ("llada", "qwen3") for adapter in ADAPTERS]
CASES += [(family, False, adapter) for family in ("llada", "dream") for adapter in ("both, DoRA", "whole head")]


@pytest.mark.parametrize(("family", "tied", "adapter"), CASES)
def test_merged_equals_unmerged(
    family: str, tied: bool, adapter: str, folders: dict[tuple[str, bool], str], tmp_path: Path
) -> None:
    lm = load(folders[family, tied], "float32")
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
    merged = load(folders[family, tied], "float32", adapter=str(tmp_path / "adapter"))
    alone = load(folders[family, tied], "float32", adapter=str(tmp_path / "alone"))
    again = load(str(export(merged, tmp_path / "plain")))
    for found in (merged, alone, again):
        assert torch.allclose(found.model(ids, mask).logits, expected, atol=1e-3)
