"""Forward passes under guidance, and the log-probabilities of given tokens: the one place that scores tokens in states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from unmask.decoding.trajectory import Trajectory
from unmask.errors import UserError
from unmask.models.backbone import KVCache
from unmask.models.head import Head, score_tokens
from unmask.models.masked_lm import MaskedLM

Result = TypeVar("Result")


def forward_with_guidance(
    lm: MaskedLM,
    ids: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor,
    fn: Callable[[Head, Tensor], Result],
    *,
    prompt: int,
    w: float,
    cache: KVCache | None = None,
    window: Tensor | None = None,
    clean: Tensor | None = None,
) -> Result:
    """``lm.forward_head`` under classifier-free guidance: logits u + (w + 1)(c - u), u from the row with its prompt masked.

    The head is linear, so the hidden states are mixed and the head is applied once. The first ``prompt`` columns of ids (B, T)
    are the prompt; the rest as in ``MaskedLM.forward_head``. A guided cache holds the rows of c, then those of u.
    """
    if w == 0:
        return lm.forward_head(ids, attention_mask, positions, fn, cache, window, clean)

    def with_unprompted(rows: Tensor, prompt: int) -> Tensor:
        both = rows.repeat(2, 1)
        both[len(rows) :, : max(prompt, 0)] = lm.mask_id
        return both

    width = ids.shape[1] if window is None else window.shape[1]
    positions = torch.cat([positions, positions + len(ids) * width])
    if clean is None:
        ids = with_unprompted(ids, prompt)
    else:
        ids = with_unprompted(ids, prompt - clean.shape[1] + ids.shape[1])
        clean = with_unprompted(clean, prompt)
    both_mask = None if attention_mask is None else attention_mask.repeat(2, 1)
    if window is not None and len(window) > 1:
        window = window.repeat(2, 1)

    def mixed(head: Head, hidden: Tensor) -> Result:
        c, u = hidden.to(torch.promote_types(hidden.dtype, torch.float32)).chunk(2)
        return fn(head, (u + (w + 1) * (c - u)).to(hidden.dtype))

    return lm.forward_head(ids, both_mask, positions, mixed, cache, window, clean)


def score_states(
    lm: MaskedLM,
    ids: Tensor,
    attention_mask: Tensor | None,
    at: tuple[Tensor, Tensor],
    tokens: Tensor,
    *,
    prompt: int,
    w: float,
    clean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``tokens`` at masks of the states ``ids``, and the entropy there (no gradient), in nats; two (N,).

    at: rows and columns, (N,) int64 each. clean: (B, T) int64, block-causal models only: the rows as each block of ``ids`` sees
    the blocks before it; its blocks may then be in states of different times. The rest as in ``forward_with_guidance``.
    """
    if clean is not None:  # the prompt's whole blocks are in no state but the clean one
        assert lm.block_length is not None
        spare = max(0, prompt - lm.block_length + 1)
        ids, at = ids[:, spare:], (at[0], at[1] - spare)
    positions, scored = at[0] * ids.shape[1] + at[1], partial(score_tokens, tokens=tokens)
    return forward_with_guidance(lm, ids, attention_mask, positions, scored, prompt=prompt, w=w, clean=clean)


@torch.no_grad()
def score_each_state(
    lm: MaskedLM, trajectory: Trajectory, fn: Callable[..., Result], *, masked: bool = False
) -> Iterator[tuple[Tensor, Tensor, Result]]:
    """``fn`` on the state before each step, one forward pass a step (two with guidance), each of whole rows.

    Yields rows and columns of the canvas, (N,) int64 each, row-major, and what ``fn`` returned.

    Args:
        fn: (head, hidden states (N, d), tokens=(N,) that the trajectory ends with there) -> its result.
        masked: look at all masked positions instead of those that the step commits.

    Raises UserError for a trajectory whose canvas changed its length, which its states do not say.
    """
    if trajectory.decoder.get("initial_length"):
        raise UserError("the canvas changed its length, so its states are not known: leave initial_length out")
    width = trajectory.prompt.shape[1]
    for s in range(trajectory.steps):
        state = trajectory.state(s)
        ids = torch.cat([trajectory.prompt, state], dim=1)
        row, column = (state == lm.mask_id if masked else trajectory.committed(s)).nonzero(as_tuple=True)
        scored = partial(fn, tokens=trajectory.tokens[row, column])
        at, w = row * ids.shape[1] + width + column, trajectory.decoder["cfg_scale"]
        yield row, column, forward_with_guidance(lm, ids, trajectory.visible, at, scored, prompt=width, w=w)


def replay(lm: MaskedLM, trajectory: Trajectory) -> Tensor:
    """``logprob`` recomputed on every ``state(s)``, (B, L) float32; equal, unless a cache made it an approximation."""
    out = torch.zeros_like(trajectory.logprob)
    for row, column, (logprob, _) in score_each_state(lm, trajectory, score_tokens):
        out[row, column] = logprob.to(out)
    return out
