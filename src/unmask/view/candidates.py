"""What the model held at every masked position before every step of a decode: the likeliest tokens and their probabilities."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from unmask.decoding.score import score_each_state
from unmask.decoding.trajectory import Trajectory
from unmask.models.head import Head
from unmask.models.masked_lm import MaskedLM

ROWS = 128  # at a time: their float32 logits over 126,464 tokens take 65 MB


def likeliest(head: Head, hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The most likely tokens, best first, and their probabilities at temperature 1.

    Args:
        hidden: (N, d) final hidden states.

    Returns:
        (N, K) int64 and (N, K) float64; K is ``count``, or the vocabulary's size where that is less.
    """
    found = []
    for h in hidden.split(ROWS):
        logits = torch.cat([piece for _, piece in head.pieces(h)], 1)
        best = logits.topk(min(count, logits.shape[1]))
        total = logits.logsumexp(1, keepdim=True).double()
        found.append((best.indices, (best.values.double() - total).exp()))
    chosen, probs = zip(*found, strict=True)
    return torch.cat(chosen), torch.cat(probs)


@torch.no_grad()
def top_candidates_per_step(lm: MaskedLM, trajectory: Trajectory, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Before each step of a trajectory of one row: ``likeliest`` at its masked positions (M, K), from left to right.

    One forward pass a step (two with guidance), each of the whole row, also where a cache decoded.
    """
    each = score_each_state(lm, trajectory, lambda head, hidden, tokens: likeliest(head, hidden, count), masked=True)
    for _, _, (tokens, probs) in each:
        yield tokens.cpu(), probs.cpu()
