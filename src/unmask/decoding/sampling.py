"""From logits to candidates: float32 throughout, one uniform number a position, reproducible row by row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Streams of random numbers that one step draws for each position.
TOKEN, ORDER = 0, 1
GOLDEN = -0x61C8864680B583EB  # splitmix64's increment as a signed integer


def _mix(z: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64 (multiplication wraps)."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def uniform_noise(seeds: Tensor, step: int, positions: Tensor, stream: int) -> Tensor:
    """Uniform numbers in [0, 1) that depend on nothing but a row's seed, the step, the position and the stream.

    So a row is decoded alike in whatever batch it stands. seeds (B,) int64, positions (B, K) int64 -> (B, K) float64.
    """
    z = _mix(seeds + GOLDEN * torch.full_like(seeds, 2 * step + stream + 1))
    z = _mix(z[:, None] + GOLDEN * (positions + 1))
    return ((z >> 11) & 0x1FFFFFFFFFFFFF).double() * 2.0**-53


@dataclass(frozen=True)
class Candidates:
    """One candidate token a position, with what confidences need.

    Attributes:
        logits: (B, K, V) float32, at temperature 1.
        tokens: (B, K) int64. logprob: (B, K) float32, log-probability of ``tokens`` at temperature 1.
    """

    logits: Tensor
    tokens: Tensor
    logprob: Tensor


def token_logprob(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[tokens], accurate near probability 1, where many positions would otherwise tie at exactly 0.

    Written as -log(1 + sum of the others' odds). logits (..., V) float32, tokens (...) int64 -> (...) float32.
    """
    chosen = logits.gather(-1, tokens[..., None])
    others = logits.scatter(-1, tokens[..., None], -torch.inf).logsumexp(-1)
    return -torch.nn.functional.softplus(others - chosen[..., 0])


def sample(logits: Tensor, temperature: float, noise: Tensor) -> Tensor:
    """Tokens from softmax(logits / temperature) by inverse CDF: float32 weights, float64 sums, one uniform a position.

    (The reference draws V Gumbel numbers in bfloat16 and so over-samples the top token.)
    logits (..., V), noise (...) in [0, 1) -> (...) int64. A token of logit -inf is never drawn.
    """
    scaled = logits.float() / temperature
    weight = (scaled - scaled.amax(-1, keepdim=True)).exp()
    cdf = weight.cumsum(-1, dtype=torch.float64)
    total = cdf[..., -1]
    target = torch.minimum(noise * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(cdf, target[..., None], right=True)
    # A parallel sum need not be monotone; should it point at an impossible token, the most likely one stands in.
    possible = weight.gather(-1, token) > 0
    return torch.where(possible, token, weight.argmax(-1, keepdim=True))[..., 0]


def candidates(logits: Tensor, temperature: float, noise: Tensor | None) -> Candidates:
    """The most likely token of every position (temperature 0), or one sampled with ``noise``."""
    logits = logits.float()
    tokens = logits.argmax(-1) if noise is None else sample(logits, temperature, noise)
    return Candidates(logits, tokens, token_logprob(logits, tokens))
