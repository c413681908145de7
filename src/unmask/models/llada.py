"""LLaDA: a bidirectional Llama-shaped transformer with the published config fields and state-dict keys.

A checkpoint such as ``GSAI-ML/LLaDA-8B-Instruct`` loads into this class unchanged. Departures from its published code, each
on purpose: a boolean padding mask that stays bidirectional, rotary tables computed from the config in every forward pass
(nothing to load, nothing to corrupt on a meta device), the head at chosen positions only, and a cache of keys and values for
windows of the row. Left out: alibi, attention biases, layer norms other than RMSNorm.
"""

from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.flex_attention import compile_friendly_flex_attention
from transformers.modeling_layers import GradientCheckpointingLayer

from unmask.models.backbone import HeadAtPositions, KVCache, Trunk, Visible

# A published config that asks for one of these is another architecture; running it here would give wrong logits silently.
_UNSUPPORTED = {
    "alibi": False,
    "rope": True,
    "block_type": "llama",
    "layer_norm_type": "rms",
    "include_bias": False,
    "include_qkv_bias": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "activation_type": "silu",
}


@strict
class LLaDAConfig(PretrainedConfig):
    """Shape of a LLaDA model, in the field names of the published ``config.json``.

    ``n_kv_heads`` below ``n_heads`` is grouped-query attention. ``task_defaults`` maps a task name to the parameters that
    a checkpoint was trained for (used by the shipped ``tiny``; absent from published checkpoints). ``block_length``: attention
    is block-causal, in blocks of so many tokens. Raises ValueError if a field asks for a variant that this class does not
    implement.
    """

    model_type = "llada"
    attribute_map = {  # noqa: RUF012  (transformers reads this class attribute)
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    d_model: int = 4096
    n_heads: int = 32
    n_kv_heads: int | None = None
    n_layers: int = 32
    mlp_hidden_size: int | None = None
    mlp_ratio: int = 4
    vocab_size: int = 126464
    embedding_size: int | None = None
    max_sequence_length: int = 4096
    rope_theta: float | int = 500000.0
    rms_norm_eps: float = 1e-5
    weight_tying: bool = False
    mask_token_id: int | None = None
    init_std: float | int = 0.02
    task_defaults: dict[str, Any] | None = None
    block_length: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for field, supported in _UNSUPPORTED.items():
            value = kwargs.get(field, supported)
            if value is not None and value != supported:
                raise ValueError(f"LLaDA config has {field}={value!r}; only {field}={supported!r} is implemented")
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.mlp_hidden_size = self.mlp_hidden_size or self.mlp_ratio * self.d_model
        self.embedding_size = self.embedding_size or self.vocab_size
        self.task_defaults = self.task_defaults or {}
        super().__post_init__(**{**kwargs, "tie_word_embeddings": False})
        if self.d_model % self.n_heads or self.n_heads % self.n_kv_heads:
            shape = f"d_model={self.d_model}, n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}"
            must = "n_heads must divide d_model and n_kv_heads must divide n_heads"
            raise ValueError(f"LLaDA config has {shape}; {must}")


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 and returned in the input's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., size) -> (..., size)
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * x32).to(x.dtype)


def rotary_table(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles in float32. position_ids (B, T) or (1, T) -> two of (B, 1, T, head_dim)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[:, :, None].float() * theta**-exponent  # (B, T, head_dim/2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding in float32 (the half-split layout). x (B, H, T, D) -> same shape and dtype."""
    x32 = x.float()
    first, second = x32.chunk(2, dim=-1)
    return (x32 * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class LLaDABlock(GradientCheckpointingLayer):
    """Pre-norm attention and SwiGLU feed-forward, with the published parameter names (``ff_proj`` is the gate)."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.layer = layer
        d, self.head_dim = config.d_model, config.d_model // config.n_heads
        self.groups = config.n_heads // config.n_kv_heads
        self.config = config
        self.attn_norm = RMSNorm(d, config.rms_norm_eps)
        self.q_proj = nn.Linear(d, config.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d, config.n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d, config.n_kv_heads * self.head_dim, bias=False)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.ff_norm = RMSNorm(d, config.rms_norm_eps)
        self.ff_proj = nn.Linear(d, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(d, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, d, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, visible: Visible, cache: KVCache | None = None
    ) -> Tensor:  # (B, T, d) -> (B, T, d)
        x = x + self.attention(self.attn_norm(x), cos, sin, visible, cache)
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))

    def attention(self, h: Tensor, cos: Tensor, sin: Tensor, visible: Visible, cache: KVCache | None) -> Tensor:
        batch, length, _ = h.shape
        split = (batch, length, -1, self.head_dim)
        q, k, v = (f(h).view(split).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))  # (B, H, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        if self.groups > 1:
            k, v = k.repeat_interleave(self.groups, dim=1), v.repeat_interleave(self.groups, dim=1)
        if isinstance(visible, BlockMask):
            out: Any = compile_friendly_flex_attention(q, k, v, training=self.training, block_mask=visible)
        elif self.config._attn_implementation == "eager":
            scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
            if visible is not None:
                scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
            out = scores.float().softmax(-1).to(v.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.attn_out(out.transpose(1, 2).reshape(batch, length, -1))


class LLaDAPreTrainedModel(PreTrainedModel):
    config_class = LLaDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0.0, self.config.init_std)
        elif isinstance(module, RMSNorm):
            module.weight.fill_(1.0)


class LLaDAModel(Trunk, LLaDAPreTrainedModel):  # type: ignore[misc]
    """The trunk: token ids to final hidden states."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.transformer = nn.ModuleDict()
        self.transformer["wte"] = nn.Embedding(config.embedding_size, config.d_model)
        self.transformer["blocks"] = nn.ModuleList(LLaDABlock(config, n) for n in range(config.n_layers))
        self.transformer["ln_f"] = RMSNorm(config.d_model, config.rms_norm_eps)
        if not config.weight_tying:  # the head lives inside the trunk in the published layout
            self.transformer["ff_out"] = nn.Linear(config.d_model, config.embedding_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer["wte"]

    def run_layers(self, x: Tensor, position_ids: Tensor, visible: Visible, cache: KVCache | None) -> Tensor:
        cos, sin = rotary_table(position_ids, self.config.d_model // self.config.n_heads, self.config.rope_theta)
        for block in cast(nn.ModuleList, self.transformer["blocks"]):
            x = block(x, cos, sin, visible, cache)
        return self.transformer["ln_f"](x)


class LLaDAModelLM(HeadAtPositions, LLaDAPreTrainedModel):  # type: ignore[misc]
    """Trunk and head. The class name is the one in the ``architectures`` field of published checkpoints."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.model.transformer["wte" if self.config.weight_tying else "ff_out"]

    def untie(self) -> None:
        if self.config.weight_tying:
            weight = cast(Tensor, self.get_output_embeddings().weight).detach().clone()
            self.model.transformer["ff_out"] = head = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta")
            head.weight = nn.Parameter(weight)
            self.config.weight_tying = False

    def head(self, hidden: Tensor) -> Tensor:
        if self.config.weight_tying:
            return F.linear(hidden, cast(Tensor, self.get_output_embeddings().weight))
        return super().head(hidden)


AutoConfig.register("llada", LLaDAConfig)
AutoModel.register(LLaDAConfig, LLaDAModelLM)
AutoModelForMaskedLM.register(LLaDAConfig, LLaDAModelLM)
