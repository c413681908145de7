"""How likely a text is under a masked diffusion model: a bound by sampled masks, and whether greedy filling writes it.

The model gives no log p(y | x) in closed form. LLaDA (arXiv 2502.09992, Eq. 6 and Algorithm 3) evaluates with a lower bound:
with l uniform in 1..L, and M drawn from the sets of l of the L positions of y,

    log p(y | x) >= E [ (L / l) * sum over i in M of log p(y_i | x, y with M masked) ]

It equals the mean, over all orders, of writing y one token at a time. The context x is never masked.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unmask.decoding import Decoder, decode
from unmask.decoding.score import score_states
from unmask.errors import UserError
from unmask.models.masked_lm import MaskedLM

Pair = tuple[list[int], list[int]]  # token ids of a context and of the continuation behind it


def content_seed(seed: int, *content: Any) -> int:
    """A seed below 2^62 that depends on nothing but ``seed`` and the content (JSON values)."""
    digest = hashlib.sha256(json.dumps([seed, *content], sort_keys=True, default=str).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def mask_sets(length: int, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sets of positions to mask, (R, L) bool, and the weights (R,) float64 with which their log-probabilities sum to the bound.

    Where all 2^L - 1 sets are no more than ``samples``, these are all of them and the bound is exact. Else l runs over an even
    grid that one draw shifts, so that every l is met equally often, and the positions are drawn without replacement.
    """
    if 2**length - 1 <= samples:
        masks = (torch.arange(1, 2**length)[:, None] >> torch.arange(length)) % 2 == 1
        counts = masks.sum(1)
        alike = torch.tensor([math.comb(length, n) for n in counts.tolist()])
        return masks, 1 / (counts * alike).double()
    generator = torch.Generator().manual_seed(seed)
    grid = (torch.arange(samples) + torch.rand((), generator=generator, dtype=torch.float64)) / samples
    counts = (grid * length).long().clamp(max=length - 1) + 1
    rank = torch.rand(samples, length, generator=generator).argsort(1).argsort(1)
    return rank < counts[:, None], length / (counts * samples).double()


@torch.no_grad()
def bounds(
    lm: MaskedLM, pairs: Sequence[Pair], samples: int, seed: int, batch_size: int, cfg_scale: float = 0.0
) -> list[float]:
    """Lower bounds on log p(continuation | context) in nats, of pairs with continuations of one length.

    Args:
        samples: mask sets a pair. seed: with the pair's content it decides which, whatever else is in the batch.
        batch_size: rows of one forward pass; rows that masking makes equal are computed once.
        cfg_scale: classifier-free guidance, as in ``Decoder``.

    Raises:
        UserError: where the model's logits are not finite.
    """
    length = len(pairs[0][1])
    if not length:
        return [0.0] * len(pairs)
    ids, visible = (t.cpu() for t in lm.encode([context + continuation for context, continuation in pairs]))
    found = [mask_sets(length, samples, content_seed(seed, *pair)) for pair in pairs]
    masks, weights = (torch.cat(parts) for parts in zip(*found, strict=True))
    owner = torch.arange(len(pairs)).repeat_interleave(len(masks) // len(pairs))
    width, total = ids.shape[1], torch.zeros(len(pairs), dtype=torch.float64)
    for part in torch.arange(len(masks)).split(batch_size):
        rows, seen = ids[owner[part]], visible[owner[part]]
        row, column = masks[part].nonzero(as_tuple=True)
        column = column + width - length
        targets = rows[row, column].to(lm.device)
        rows[row, column] = lm.mask_id
        distinct, home = torch.cat([rows, seen.long()], 1).unique(dim=0, return_inverse=True)
        distinct, scored = distinct.to(lm.device), (home[row].to(lm.device), column.to(lm.device))
        rows, seen = distinct[:, :width], distinct[:, width:].bool()
        mask, prompt = None if seen.all() else seen, width - length
        logprob, _ = score_states(lm, rows, mask, scored, targets, prompt=prompt, w=cfg_scale)
        total.index_add_(0, owner[part][row], weights[part][row] * logprob.cpu().double())
    if not total.isfinite().all():
        raise UserError("the model's log-probabilities are not finite: try dtype=float32, or check its weights")
    return total.tolist()


def is_greedy(lm: MaskedLM, pairs: Sequence[Pair], cfg_scale: float = 0.0) -> list[bool]:
    """Whether greedy decoding of as many tokens, one a pass and the surest first, writes the continuation.

    The pairs' continuations are of one length; equal contexts are decoded once.
    """
    length = len(pairs[0][1])
    if not length:
        return [True] * len(pairs)
    contexts = list(dict.fromkeys(tuple(context) for context, _ in pairs))
    prompt, visible = lm.encode(contexts, length, empty=True)
    decoder = Decoder(max_new_tokens=length, steps=length, cfg_scale=cfg_scale)
    written = dict(zip(contexts, decode(lm, prompt, visible, decoder).tokens.tolist(), strict=True))
    return [written[tuple(context)] == continuation for context, continuation in pairs]
