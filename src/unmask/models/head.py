"""The output head, a piece of the vocabulary at a time: [positions, vocabulary] need not be whole anywhere.

One pass over the vocabulary gives what decoding and training ask of a distribution. A piece stays in the processor's cache, so
the pass costs little more than the matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

BUCKET = 64  # tokens; every piece but the last is a multiple of it
MASKED_LOGIT = -1e30  # the mask token's logit: probability 0, and finite, so that 0 * logit is 0
CPU_CHUNK = (512, 2**19)  # rows and logits of a piece on a CPU: 2 MiB in float32
GPU_CHUNK = (8192, 2**27)  # elsewhere: few, large kernels


@dataclass(frozen=True)
class Head:
    """Logits of hidden states at temperature 1; the mask token's probability is 0.

    A linear head without bias is applied piece by piece. One of another kind (adapted, quantized) is a black box: it is called
    once, for the whole vocabulary.
    """

    apply: Callable[[Tensor], Tensor]  # hidden states (N, d) to logits (N, V)
    mask_id: int  # the token that is never predicted
    weight: Tensor | None  # (V, d), or None for a black box

    @classmethod
    def of(cls, module: nn.Module, apply: Callable[[Tensor], Tensor], mask_id: int) -> Head:
        """The head of a model: its output embedding, and the function that applies it."""
        weight: Any = getattr(module, "weight", None)
        kind = type(module).__bases__[1] if isinstance(module, FSDPModule) else type(module)
        plain = kind in (nn.Linear, nn.Embedding) and getattr(module, "bias", None) is None
        here = type(weight) is nn.Parameter and weight.is_floating_point() and weight.dim() == 2 and not weight.is_meta
        return cls(apply, mask_id, weight if plain and here else None)

    def parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """(N, …) in as many parts as one pass takes at a time; a black box takes it as it is."""
        return (rows,) if self.weight is None else rows.split(_sizes(rows)[0])

    def pieces(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first token, logits (N, c)) over the vocabulary, at least float32; the reader may overwrite them."""
        if self.weight is None:
            yield 0, self._finished(0, self.apply(hidden))
            return
        width = max(1, _sizes(hidden)[1] // max(1, len(hidden)) // BUCKET) * BUCKET
        for a in range(0, len(self.weight), width):
            yield a, self._finished(a, F.linear(hidden, self.weight[a : a + width].to(hidden.dtype)))

    def _finished(self, a: int, logits: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if a <= self.mask_id < a + logits.shape[1]:
            logits[:, self.mask_id - a] = MASKED_LOGIT
        return logits

    def bucket_logits(self, hidden: Tensor, bucket: Tensor) -> Tensor:
        """Logits of the 64 tokens from ``64 * bucket`` on, of a head with a weight: (N, d), (N,) int64 -> (N, 64).

        The mask token and tokens beyond the vocabulary have logit -inf.
        """
        assert self.weight is not None
        token = bucket[:, None] * BUCKET + torch.arange(BUCKET, device=bucket.device)
        some = max(1, _sizes(hidden)[1] // (BUCKET * hidden.shape[1]))  # rows whose (64, d) weights make one piece
        parts = []
        for t, h in zip(token.split(some), hidden.split(some), strict=True):
            weight = self.weight[t.clamp(max=len(self.weight) - 1)].to(h.dtype)
            parts.append((weight @ h[:, :, None])[:, :, 0])
        found = torch.cat(parts) if parts else hidden.new_zeros(0, BUCKET)
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        return found.masked_fill((token >= len(self.weight)) | (token == self.mask_id), -torch.inf)


def run_gathered(module: nn.Module, fn: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """``fn(hidden)`` where the module's weight is whole: with FSDP, as if it were the module's own forward pass."""
    if not isinstance(module, FSDPModule):
        return fn(hidden)
    module.forward = fn  # type: ignore[attr-defined]  # the hooks around it gather the weight and reduce its gradient
    try:
        return module(hidden)  # type: ignore[operator]
    finally:
        del module.forward


def _sizes(rows: Tensor) -> tuple[int, int]:
    return CPU_CHUNK if rows.device.type == "cpu" else GPU_CHUNK


def token_logprob(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[tokens], accurate near probability 1, where many positions would otherwise tie at exactly 0.

    Written as -log(1 + sum of the others' odds). logits (..., V) float, tokens (...) int64 -> (...).
    """
    chosen = logits.gather(-1, tokens[..., None])
    others = logits.scatter(-1, tokens[..., None], -torch.inf).logsumexp(-1)
    return -F.softplus(others - chosen[..., 0])


def score_tokens(head: Head, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given tokens, differentiable, and the entropy of their distributions (no gradient), in nats.

    hidden (N, d), tokens (N,) int64 -> two (N,), float32 (float64 where the model is). Neither logits nor probabilities are
    kept for the backward pass; it computes every piece again.
    """
    if head.weight is None:
        _, logits = next(head.pieces(hidden))
        with torch.no_grad():
            entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
        return token_logprob(logits, tokens), entropy
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    hidden = hidden.to(torch.get_autocast_dtype(device) if autocast else head.weight.dtype)
    with torch.autocast(device, enabled=False):
        return _ScoreTokens.apply(hidden, head.weight, tokens, head)  # type: ignore[no-any-return, no-untyped-call]


class _ScoreTokens(torch.autograd.Function):
    """A linear head, log-softmax and gather as one operation."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        found = [_score(head, h, t) for h, t in zip(head.parts(hidden), head.parts(tokens), strict=True)]
        logprob, entropy, normalizer = (torch.cat(x) for x in zip(*found, strict=True))
        ctx.save_for_backward(hidden, weight, tokens, normalizer)
        ctx.head = head
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """d log p(token) / d logits = onehot(token) - p."""
        hidden, weight, tokens, normalizer = ctx.saved_tensors
        to_hidden, to_weight, *_unused = ctx.needs_input_grad
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_weight = torch.empty_like(weight) if to_weight else None
        grad_hidden = []
        parts = zip(*(ctx.head.parts(x) for x in (hidden, tokens, normalizer, grad)), strict=True)
        for number, (h, t, z, g) in enumerate(parts):
            total = torch.zeros(h.shape, dtype=wide, device=h.device)
            for a, logits in ctx.head.pieces(h):
                at, inside = within(t[:, None], a, logits)
                d = logits.sub_(z[:, None]).exp_().mul_(-g[:, None])
                d = d.scatter_add_(1, at, g[:, None] * inside).to(h.dtype)
                b = a + d.shape[1]
                if to_hidden:
                    total += d @ weight[a:b].to(h.dtype)
                if grad_weight is not None:
                    _add_product(grad_weight[a:b], d.T, h, first=number == 0)
            grad_hidden.append(total.to(h.dtype))
        return (torch.cat(grad_hidden) if to_hidden else None), grad_weight, None, None


def _add_product(out: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """out += left @ right, or = where it is the first; in place, since ``out`` may be as large as the head."""
    if out.dtype != left.dtype:  # under autocast
        product = (left @ right).to(out.dtype)
        out.copy_(product) if first else out.add_(product)
    elif first:
        torch.mm(left, right, out=out)
    else:
        out.addmm_(left, right)


def within(tokens: Tensor, a: int, piece: Tensor) -> tuple[Tensor, Tensor]:
    """Where tokens (of any shape) are in a piece that starts at ``a``: index, clamped into it, and whether inside."""
    at = tokens - a
    return at.clamp(0, piece.shape[1] - 1), (at >= 0) & (at < piece.shape[1])


def _score(head: Head, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability and entropy of some rows, and the normalizer log(sum(exp(logits))). Three (N,)."""
    tops, others, masses, products = [], [], [], []
    chosen = torch.zeros((), device=hidden.device)
    for a, logits in head.pieces(hidden):
        at, inside = within(tokens[:, None], a, logits)
        chosen = torch.where(inside[:, 0], logits.gather(1, at)[:, 0], chosen.to(logits))
        top = logits.amax(1)
        weight = logits.sub_(top[:, None]).exp()
        products.append(torch.linalg.vecdot(weight, logits))  # sum of e^x x
        own = weight.gather(1, at) * inside
        rest = (weight.scatter_add_(1, at, -own)).sum(1)
        others.append(rest)
        masses.append(rest + own[:, 0])
        tops.append(top)
    share, top = rescale(tops)
    odds = (share * torch.stack(others, 1)).sum(1).log() - (chosen.double() - top)  # of all other tokens
    mass = torch.stack(masses, 1)
    total = (share * mass).sum(1)
    # p log p with p = share e^x / total, summed piece by piece.
    spread = (share * torch.stack(products, 1)).sum(1) - (torch.special.entr(share) * mass).sum(1)
    entropy = total.log() - spread / total
    return (-F.softplus(odds)).to(chosen), entropy.to(chosen), (top + total.log()).to(chosen)


def rescale(tops: list[Tensor]) -> tuple[Tensor, Tensor]:
    """From every piece's largest logit to its sums' factor on the scale of the largest of all, (N, pieces), and that, (N,)."""
    stacked = torch.stack(tops, 1).double()
    top = stacked.amax(1)
    return (stacked - top[:, None]).exp(), top
