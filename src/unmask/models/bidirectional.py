"""Backbones of transformers under diffusion's attention: full (Dream, A2D, LLaDA-MoE) or block-causal (SDAR, LLaDA2, …).

The layers, norms, experts and rotary tables are those of transformers' Qwen2, Qwen3, Llama, Qwen3-MoE and GLM-4-MoE; only
the way through them is ours: no causal mask, a padding mask, a cache of windows. Rotary tables are computed when the model is
built.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Split, WeightConverter, WeightRenaming
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from unmask.models.backbone import HeadAtPositions, KVCache, Trunk, Visible

# The layers' name of their cache, since transformers 5.24.
_CACHE = "cache" if "cache" in inspect.signature(LlamaDecoderLayer.forward).parameters else "past_key_values"


class FullAttention(Trunk):
    """The trunk of a transformers model with full attention, or of one with block-causal attention."""

    layers: Sequence[nn.Module]
    norm: nn.Module
    rotary_emb: nn.Module

    def run_layers(self, x: Tensor, position_ids: Tensor, visible: Visible, cache: KVCache | None) -> Tensor:
        if (
            isinstance(visible, Tensor) and self.config._attn_implementation == "eager"
        ):  # it adds the mask to the scores
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


class _Published:
    """A configuration that is read and saved under the names that the published files have for its fields.

    Raises ValueError where the file asks for a variant that the parent does not implement.
    """

    published: ClassVar[Mapping[str, str]] = {}  # to the parent's names
    unsaid: ClassVar[Mapping[str, Any]] = {}  # what files may leave to their code
    fixed: ClassVar[Mapping[str, Any]] = {}  # what their code does, whatever the file says
    implemented: ClassVar[Mapping[str, Any]] = {}  # the one value of each field, or none at all

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        said = {k: v for k, v in config_dict.items() if v is not None or k not in ("rope_scaling", *cls.unsaid)}
        for field, value in cls.implemented.items():
            if (found := said.get(field)) not in (None, value):
                raise ValueError(f"config.json has {field}={found!r}; only {value!r} is implemented")
        return super().from_dict({**cls.unsaid, **said, **cls.fixed, "attention_dropout": 0.0}, **kwargs)  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        names = {own: name for name, own in self.published.items()}
        return {names.get(key, key): value for key, value in super().to_dict().items()}  # type: ignore[misc]


_PARENTS = ("Qwen2", "Qwen3", "Llama")
_EXPERTS = get_checkpoint_conversion_mapping("qwen3_moe")
"""How published experts, a matrix each, become transformers' stacks of all experts of a layer."""
_LLADA2_KEYS = [
    WeightRenaming(r"^model\.word_embeddings\.", "model.embed_tokens."),
    WeightRenaming(r"\.attention\.query_layernorm\.", ".self_attn.q_norm."),
    WeightRenaming(r"\.attention\.key_layernorm\.", ".self_attn.k_norm."),
    WeightRenaming(r"\.attention\.dense\.", ".self_attn.o_proj."),
    WeightRenaming(r"\.mlp\.gate\.expert_bias", ".mlp.gate.e_score_correction_bias"),
    WeightConverter(
        "attention.query_key_value.weight",
        ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
        [Split(dim=0)],
    ),
    *_EXPERTS,
]


def _model(
    name: str,
    parent: str,
    model_type: str | None = None,
    block: str | None = None,
    keys: list[Any] | None = None,
    config: Mapping[str, Any] | None = None,
    **attributes: Any,
) -> Any:
    """A parent's model under diffusion's attention, as a class of this name.

    Args:
        model_type: of a configuration of its own, by default the parent's; ``config``: what differs in it (``_Published``).
        block: where attention is block-causal, the field of the configuration that holds the block length.
        keys: transformers' conversions of the published weights, back on saving.
        attributes: ``shifted``; ``mask_token``, or its id, where no file names it; ``aliases``, its architecture's other names.
    """
    parents, pretrained, base = (
        getattr(transformers, parent + part) for part in ("Config", "PreTrainedModel", "Model")
    )
    if model_type is not None:
        own = {"model_type": model_type, **(config or {})}
        own["attribute_map"] = {**parents.attribute_map, **own.get("published", {})}
        if block not in (None, "block_length"):
            own["attribute_map"]["block_length"] = block
        parents = type(name.removesuffix("Model").removesuffix("LMHead") + "Config", (_Published, parents), own)
    if keys is not None:
        register_checkpoint_conversion_mapping(name, keys)
    trunk = type(f"Full{parent}", (FullAttention, base), {})
    return type(
        name, (_MaskedHead, pretrained), {"config_class": parents, "trunk": trunk, "block": block, **attributes}
    )


_SDAR: dict[str, Any] = {"block": "block_size", "config": {"unsaid": {"block_size": 4}}, "mask_token": "<|MASK|>"}
DreamModel = _model("DreamModel", "Qwen2", "Dream", shifted=True)
MODELS = (
    # Dream (arXiv 2508.15487), DiffuCoder (2506.20639): a hidden state predicts the next position.
    DreamModel,
    # A2D (dLLM, arXiv 2602.22661)
    *(_model(f"A2D{parent}LMHeadModel", parent, f"a2d-{parent.lower()}") for parent in _PARENTS),
    # iLLaDA
    _model("ILLaDAForCausalLM", "Llama", "illada", mask_token="<[MASK]>"),
    # SDAR (arXiv 2510.06303), TraDo (2509.06949), DiRL: other block lengths than 4 stand in the repository's name.
    _model("SDARForCausalLM", "Qwen3", "sdar", **_SDAR),
    _model("SDARMoeForCausalLM", "Qwen3Moe", "sdar_moe", keys=_EXPERTS, **_SDAR),
    # Fast-dLLM v2 (arXiv 2509.26328): shifted; a block's first token follows from the block before alone.
    _model("Fast_dLLM_QwenForCausalLM", "Qwen2", "Fast_dLLM_Qwen", "bd_size", shifted=True, mask_token="|<MASK>|"),
    # Stable-DiffCoder (arXiv 2601.15892) has Llama's model type; block length and mask id stand in its code.
    _model(
        "StableDiffcoderForCausalLM",
        "Llama",
        "llama",
        "block_length",
        config={"unsaid": {"block_length": 4}},
        mask_token=5,
        aliases=("SeedDiffcoderForCausalLM",),
    ),
    # LLaDA2.0, 2.1 (arXiv 2512.15745): the block length stands in their code. 2.1's editing of committed tokens is left out.
    _model(
        "LLaDA2MoeModelLM",
        "Glm4Moe",
        "llada2_moe",
        "block_length",
        keys=_LLADA2_KEYS,
        config={
            "published": {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"},
            "unsaid": {"block_length": 32, "use_qk_norm": True},
            "implemented": {"score_function": "sigmoid", "use_bias": False, "use_qkv_bias": False, "norm_head": False},
        },
        mask_token="<|mask|>",
    ),
    # LLaDA-MoE (arXiv 2509.24389) has LLaDA's model type.
    _model(
        "LLaDAMoEModelLM",
        "Qwen3Moe",
        "llada",
        keys=_EXPERTS,
        config={
            "published": {"expert_intermediate_size": "moe_intermediate_size"},
            "fixed": {"norm_topk_prob": False},
            "implemented": {"moe_router_enable_expert_bias": False, "qk_layernorm": True, "clip_qkv": None},
        },
        mask_token="<|mask|>",
        aliases=("LLaDAMoEModel",),
    ),
)
# Converted checkpoints that kept their parent's name; what is saved of them opens wherever the parent does.
UNDER_PARENTS_NAME = tuple(_model(f"{parent}ForCausalLM", parent) for parent in _PARENTS)
for _class in MODELS:
    if _class.config_class.model_type not in ("llada", "llama"):  # which open as what they are
        AutoConfig.register(_class.config_class.model_type, _class.config_class)
        AutoModel.register(_class.config_class, _class)
        AutoModelForMaskedLM.register(_class.config_class, _class)
