"""Backbones of transformers run with full attention: Dream, and converted autoregressive checkpoints (A2D).

The layers, norms and rotary tables are those of transformers' Qwen2, Qwen3 and Llama; only the way through them is ours: no
causal mask, a padding mask that stays bidirectional, a cache of windows. Rotary tables are computed when the model is built.

Dream (arXiv 2508.15487; also DiffuCoder, arXiv 2506.20639) is a Qwen2 whose hidden state at a position predicts the next one.
A2D checkpoints (dLLM, arXiv 2602.22661) predict their own position.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from unmask.models.backbone import HeadAtPositions, KVCache, Trunk

# The layers' name of their cache, since transformers 5.24.
_CACHE = "cache" if "cache" in inspect.signature(LlamaDecoderLayer.forward).parameters else "past_key_values"


class FullAttention(Trunk):
    """The trunk of a transformers model with full attention, or of one with block-causal attention."""

    layers: Sequence[nn.Module]
    norm: nn.Module
    rotary_emb: nn.Module

    def run_layers(self, x: Tensor, position_ids: Tensor, visible: Tensor | None, cache: KVCache | None) -> Tensor:
        if visible is not None and self.config._attn_implementation == "eager":  # it adds the mask to the scores
            visible = torch.zeros_like(visible, dtype=x.dtype).masked_fill(~visible, torch.finfo(x.dtype).min)
        rotary = self.rotary_emb(x, position_ids)
        how = {
            "position_ids": position_ids,
            "position_embeddings": rotary,
            _CACHE: cache,
            "is_causal": False,
        }
        for layer in self.layers:
            x = layer(x, attention_mask=visible, **how)
        return self.norm(x)


class _MaskedHead(HeadAtPositions):
    """Trunk and ``lm_head``, under the keys of the published files."""

    trunk: ClassVar[type[PreTrainedModel]]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.model = self.trunk(config)
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[attr-defined]

    def untie(self) -> None:
        shared = {id(p) for p in self.model.embed_tokens.parameters()}
        for module in self.lm_head.modules():  # the head itself, or what an adapter put around it
            for name, p in module.named_parameters(recurse=False):
                if id(p) in shared:
                    setattr(module, name, nn.Parameter(p.detach().clone(), p.requires_grad))
        self.config.tie_word_embeddings = False  # type: ignore[attr-defined]


_PARENTS = ("Qwen2", "Qwen3", "Llama")


def _model(name: str, parent: str, model_type: str | None = None, **attributes: Any) -> Any:
    """A parent's model with full attention, as a class of this name; its configuration is the parent's, or of its own type."""
    config, pretrained, base = (getattr(transformers, parent + part) for part in ("Config", "PreTrainedModel", "Model"))
    if model_type is not None:
        own = name.removesuffix("Model").removesuffix("LMHead") + "Config"
        config = type(own, (config,), {"model_type": model_type})
    trunk = type(f"Full{parent}", (FullAttention, base), {})
    return type(name, (_MaskedHead, pretrained), {"config_class": config, "trunk": trunk, **attributes})


DreamModel = _model("DreamModel", "Qwen2", "Dream", shifted=True)
MODELS = (DreamModel, *(_model(f"A2D{parent}LMHeadModel", parent, f"a2d-{parent.lower()}") for parent in _PARENTS))
# Converted checkpoints that kept their parent's name; what is saved of them opens wherever the parent does.
UNDER_PARENTS_NAME = tuple(_model(f"{parent}ForCausalLM", parent) for parent in _PARENTS)
for _class in MODELS:
    AutoConfig.register(_class.config_class.model_type, _class.config_class)
    AutoModel.register(_class.config_class, _class)
    AutoModelForMaskedLM.register(_class.config_class, _class)
