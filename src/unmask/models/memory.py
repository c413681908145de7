"""How much memory decoding and training need, before anything is loaded: arithmetic from the configuration and the adapter.

    decoding = weights + activations + head
    training = weights + gradients + optimizer + reference + activations + head + views

A weight has e bytes (an adapter's 4), a product c (2 under autocast to bfloat16, else e); a pass has N = rows (P + L) tokens;
the n layers have width d, feed-forward width f, queries q and keys kv wide (heads times head size).

- weights: parameters times e. reference: as many again, where all of them are trained and ``beta`` > 0.
- gradients, optimizer: trained parameters times their bytes, once (once more in DDP's buckets) and twice (AdamW).
- head: three float32 pieces of the logits, and the gradient of the whole head where it is trained.
- views: token ids of every step of every completion, the only term with the number of steps S and the group size G.
- activations in decoding: N (2 e d + max(3 e f, (4 e + 16) q)): residual stream, norm, and a layer's widest moment: gate, up
  and product, or queries, keys, values and output with a rotation in float32.
- activations in training: n N s + N (3 c f + 8 d) + casts: what the layers keep for their backward pass, the gradients in the
  layer where it begins, and copies of weights in c bytes. With checkpointing every layer keeps e d, and one at a time s.

For a token, a layer keeps s = b (2 d, and q + kv where they are normed) + c (4 q + 3 f) + inputs: two values a norm (b = 8; 4
of frozen norms); queries, keys, values and output of the attention; gate, activation and up; the inputs of the matrices,
c (2 d + f), or c (5 d + f) where each keeps a copy cast for it, with an adapter of rank r c (5 d + f + q + 7 r).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from unmask.models.adapters import LORA_TARGETS, adapter_size
from unmask.models.head import CPU_CHUNK, GPU_CHUNK
from unmask.models.masked_lm import MaskedLM

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by purpose; the peak is their sum."""

    weights: float
    activations: float
    head: float
    gradients: float = 0.0
    optimizer: float = 0.0
    reference: float = 0.0
    views: float = 0.0

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Workload:
    """What is asked of the model."""

    dtype: torch.dtype  # of the weights
    rows: int  # of one forward pass
    prompt: int  # tokens of a row, P
    length: int  # and of its canvas, L
    lora: int = 0  # rank of the adapter that is trained, 0 for all weights
    targets: str = LORA_TARGETS  # its modules, a regular expression
    autocast: bool = True  # to bfloat16
    checkpointing: bool = False  # of activations, a block at a time
    reference: bool = False  # whether beta > 0
    completions: int = 1  # in one update, on one process
    steps: int = 1
    processes: int = 1  # of the run
    cuda: bool = False  # whether pieces are those of a GPU

    @property
    def tokens(self) -> int:
        """Of one forward pass, N."""
        return self.rows * (self.prompt + self.length)


def _widths(config: Any) -> tuple[int, int, int, int]:
    """d, f, q and kv of a model's layers; f is that of the experts that a token has, where there are any."""
    heads, keys = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    width, chosen = config.intermediate_size, getattr(config, "num_experts_per_tok", 0)
    if chosen:
        width = config.moe_intermediate_size * (chosen + getattr(config, "n_shared_experts", 0))
    return config.hidden_size, width, heads * size, keys * size


def _pieces(work: Workload, vocabulary: int) -> float:
    """Three float32 pieces of the logits: what one piece is turned into while it is read."""
    rows, logits = GPU_CHUNK if work.cuda else CPU_CHUNK
    positions = min(rows, work.rows * work.length)
    return 3 * 4.0 * min(max(logits, positions), positions * vocabulary)


def decoding_memory(lm: MaskedLM, work: Workload) -> MemoryEstimate:
    """Bytes for decoding ``rows`` rows at a time; ``lm`` may be without weights (``load_meta``)."""
    e, (d, f, q, _) = work.dtype.itemsize, _widths(lm.model.config)
    return MemoryEstimate(
        weights=e * sum(p.numel() for p in lm.model.parameters()),
        activations=work.tokens * (2 * e * d + max(3 * e * f, (4 * e + 16) * q)),
        head=_pieces(work, lm.model.config.vocab_size),
    )


def training_memory(lm: MaskedLM, work: Workload) -> MemoryEstimate:
    """Bytes for reinforcement learning on one process, the rollout included (it needs less than the update).

    Raises UserError where an adapter's ``targets`` match no matrix of the model.
    """
    e = work.dtype.itemsize
    parameters = sum(p.numel() for p in lm.model.parameters())
    adapter = adapter_size(lm.model, work.lora, work.targets) if work.lora else 0
    trained = 4 * adapter if work.lora else e * parameters
    head: Any = lm.model.get_output_embeddings()
    return MemoryEstimate(
        weights=e * parameters + 4 * adapter,
        activations=_training_activations(lm, work, adapter),
        head=_pieces(work, lm.model.config.vocab_size) + (0 if work.lora else e * head.weight.numel()),
        gradients=trained * min(2, work.processes),
        optimizer=2 * trained,
        reference=e * parameters if work.reference and not work.lora else 0.0,
        views=float(work.completions * work.steps * (8 * (work.prompt + work.length) + work.length)),
    )


def _training_activations(lm: MaskedLM, work: Workload, adapter: int) -> float:
    """What the layers keep for their backward pass, its gradients, and copies of weights that autocast makes.

    A block-causal model runs every state's canvas beside the finished row.
    """
    tokens = work.tokens if lm.block_length is None else work.tokens + work.rows * (work.length + lm.block_length - 1)
    d, f, q, kv = _widths(lm.model.config)
    n, r = lm.model.config.num_hidden_layers, work.lora
    e = work.dtype.itemsize
    c = 2 if work.autocast else e
    normed = 2 * d + (q + kv) * any("q_norm" in name for name, _ in lm.model.named_parameters())
    if r:
        inputs = (c if work.autocast else 4) * ((2 * d if c == 4 else 5 * d + q) + f + 7 * r)
    else:
        inputs = c * ((2 if c == e else 5) * d + f)
    kept = (4 if r else 8) * normed + c * (4 * q + 3 * f) + inputs
    gradients = 3 * c * f + 8 * d
    base_casts = c * n * d * (2 * q + 2 * kv + 3 * f) if c != e else 0
    if r:
        trained_casts, frozen_casts = c * adapter if work.autocast else 0, base_casts
    else:
        trained_casts, frozen_casts = base_casts, 0
    if not work.checkpointing:
        return tokens * (n * kept + gradients) + trained_casts + frozen_casts
    one_layer = tokens * (kept + gradients) + (trained_casts + frozen_casts) / n
    return tokens * n * e * d + max(trained_casts, one_layer)  # the first are kept until the forward pass has ended
