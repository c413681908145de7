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


@torch.no_grad()
def top_candidates_per_step(lm: MaskedLM, trajectory: Trajectory, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Before each step of a trajectory of one row, the likeliest tokens of its masked positions, from left to right.

    One forward pass a step (two with guidance), each of the whole row, also where a cache decoded.

    Yields:
        Token ids (M, K) int64, best first, and their probabilities at temperature 1 (M, K) float64; K is ``count``, or the
        vocabulary's size where that is less.
    """

    def likeliest(head: Head, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for h in hidden.split(ROWS):
            logits = torch.cat([piece for _, piece in head.pieces(h)], 1)
            best = logits.topk(min(count, logits.shape[1]))
            total = logits.logsumexp(1, keepdim=True).double()
            found.append((best.indices, (best.values.double() - total).exp()))
        tokens, probs = map(torch.cat, zip(*found, strict=True))
        return tokens, probs

    for _, _, (tokens, probs) in score_each_state(lm, trajectory, likeliest, masked=True):
        yield tokens.cpu(), probs.cpu()
