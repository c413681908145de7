"""Confidence: which candidates to commit first. Scores lie in [0, 1] (float64), so that a factor below 1 always lowers them.

EOSER (arXiv 2509.23924, section 3.1) multiplies the score of end-of-sequence candidates by
gamma_s = gamma_min + (1 - gamma_min) * progress_s; logits and sampled tokens stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from unmask.decoding.sampling import Candidates

Confidence = Callable[[Candidates, "Tensor | None"], Tensor]
"""(candidates, uniform noise (B, K) for ``random``, else None) -> scores (B, K) float64 in [0, 1]."""


def low_confidence(c: Candidates, noise: Tensor | None) -> Tensor:
    """Probability of the candidate at temperature 1 (``low-confidence remasking`` in LLaDA's words)."""
    return c.logprob.double().exp()


def random(c: Candidates, noise: Tensor | None) -> Tensor:
    """Uniform noise: positions in random order."""
    if noise is None:
        raise ValueError("random confidence needs noise")
    return noise


def margin(c: Candidates, noise: Tensor | None) -> Tensor:
    """Difference between the two largest probabilities."""
    top = c.logits.topk(2, dim=-1)
    return (top.values.double() - c.logits.logsumexp(-1, keepdim=True).double()).exp().diff(dim=-1)[..., 0].neg()


def entropy(c: Candidates, noise: Tensor | None) -> Tensor:
    """1 - H / log V: one for a certain position, zero for a uniform one."""
    logp = c.logits.log_softmax(-1)
    h = -(logp.exp() * logp.clamp(min=-1e4)).sum(-1)
    return 1 - h.double() / math.log(c.logits.shape[-1])


CONFIDENCES: dict[str, Confidence] = {
    "low-confidence": low_confidence,
    "random": random,
    "margin": margin,
    "entropy": entropy,
}


def reject_eos(scores: Tensor, tokens: Tensor, end_ids: Tensor, gamma: Tensor | float) -> Tensor:
    """EOSER: end candidates keep the share ``gamma`` of their score. scores, tokens (B, K); gamma a number or (B, 1)."""
    return torch.where(torch.isin(tokens, end_ids), scores * gamma, scores)


def suppress_eos(scores: Tensor, tokens: Tensor, end_ids: Tensor) -> Tensor:
    """The hard control: an end candidate is committed only once no other candidate is left.

    End candidates score next to nothing, below every other one, but keep their order among themselves (float64 has the range).
    """
    return torch.where(torch.isin(tokens, end_ids), scores * 1e-100, scores.clamp(min=1e-99))
