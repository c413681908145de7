"""The forward (masking) process and the training loss of masked diffusion language models.

LLaDA (arXiv 2502.09992), Eq. 3: with t ~ U(0, 1) and every response token masked independently with probability t,

    loss = - E_t [ (1/t) * sum_i 1[x_t^i = MASK] log p(x_0^i | x_t) ] / L

of one response of L tokens, which bounds the negative log-likelihood per token. Here the sum of a batch is divided by all its
maskable tokens, and t is stratified over the batch, which keeps the expectation and lowers its variance.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample_times(batch: int, generator: torch.Generator, t_min: float = 1e-3) -> Tensor:
    """Masking times in [t_min, 1), stratified over the batch and in random order. Returns (batch,) float32 on the CPU."""
    grid = (torch.arange(batch) + torch.rand((), generator=generator)) / batch
    return t_min + (1 - t_min) * grid[torch.randperm(batch, generator=generator)]


def corrupt(ids: Tensor, t: Tensor, noise: Tensor, maskable: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """Mask each maskable token with probability ``t``.

    Args:
        ids: (B, T) int64. t: (B, 1) or (B, T) float32. noise: (B, T) float32, uniform in [0, 1). maskable: (B, T) bool.

    Returns:
        The corrupted ids (B, T) and the bool mask (B, T) of what was replaced.
    """
    masked = (noise < t) & maskable
    return ids.masked_fill(masked, mask_id), masked
