"""The decoding loop. One for every decoder: the plan says how many and where, the confidence which, the model what."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from unmask.decoding.confidence import CONFIDENCES, reject_eos, suppress_eos
from unmask.decoding.decoder import Decoder
from unmask.decoding.sampling import ORDER, TOKEN, candidates, token_logprob, uniform_noise
from unmask.models.masked_lm import MaskedLM
from unmask.spec import UserError
from unmask.trajectory import Trajectory


class Streamer(Protocol):
    """The diffusion streamer protocol of transformers (``TextDiffusionStreamer``)."""

    def put(self, value: Tensor) -> None: ...
    def put_draft(self, value: Tensor, **kwargs: Any) -> None: ...
    def end(self) -> None: ...


def guided_logits(
    lm: MaskedLM, ids: Tensor, attention_mask: Tensor | None, positions: Tensor, prompt: int, w: float
) -> Tensor:
    """Logits under classifier-free guidance: u + (w + 1)(c - u), u from the row with its prompt masked.

    ids (B, T), of which the first ``prompt`` columns are the prompt; positions (B, K) or a bool mask (B, T). Returns
    float32 logits (B, K, V), or (N, V) for a mask.
    """
    if w == 0:
        return lm.logits(ids, attention_mask, positions)
    without = ids.clone()
    without[:, :prompt] = lm.mask_id
    both_mask = None if attention_mask is None else attention_mask.repeat(2, 1)
    both = lm.logits(torch.cat([ids, without]), both_mask, positions.repeat(2, 1))
    c, u = both.chunk(2)
    guided = u + (w + 1) * (c - u)
    guided[..., lm.mask_id] = -torch.inf  # inf - inf otherwise
    return guided


@torch.no_grad()
def decode(
    lm: MaskedLM,
    prompt: Tensor,
    prompt_mask: Tensor,
    decoder: Decoder,
    generator: torch.Generator | None = None,
    seeds: Tensor | None = None,
    streamer: Streamer | None = None,
) -> Trajectory:
    """Fill a canvas of masks after each prompt.

    Args:
        prompt: (B, P) int64, left-padded. prompt_mask: (B, P) bool, False = padding. (``MaskedLM.encode`` makes both.)
        decoder: what to do at each step.
        generator: source of one seed a row; needed where the decoder draws random numbers.
        seeds: (B,) int64, one seed a row, instead of a generator. A row's result depends on its own seed alone, not on
            the batch it stands in.
        streamer: shown every draft; for one row.

    Returns:
        The trajectory; prompt tokens are never altered.

    Raises:
        UserError: where randomness is needed but neither generator nor seeds is given, a prompt holds the mask token, or
            a streamer is given more than one row.
    """
    plan, batch, width = decoder.plan, prompt.shape[0], prompt.shape[1]
    length, device = plan.length, prompt.device
    if (prompt == lm.mask_id).logical_and(prompt_mask).any():
        raise UserError("a prompt holds the mask token: remove it")
    if streamer is not None and batch != 1:
        raise UserError(f"a streamer shows one row, not {batch}: decode one prompt at a time")
    random = decoder.temperature > 0 or decoder.confidence == "random"
    if seeds is None and random:
        if generator is None:
            raise UserError(f"decoder {decoder.name!r} draws random numbers: pass a torch.Generator")
        seeds = torch.randint(2**62, (batch,), generator=generator, device=generator.device)
    seeds = None if seeds is None else seeds.to(device)

    ids = torch.cat([prompt, torch.full((batch, length), lm.mask_id, device=device)], dim=1)
    attention_mask = None
    if not prompt_mask.all():
        attention_mask = torch.cat([prompt_mask, prompt_mask.new_ones(batch, length)], dim=1)
    step = torch.full((batch, length), -1, dtype=torch.int16, device=device)
    logprob = torch.zeros(batch, length, device=device)
    place = torch.arange(length, device=device)[None]
    end_ids = torch.tensor(lm.end_ids if decoder.eos_tokens == "eos+eot" else (lm.eos_id,), device=device)
    confidence = CONFIDENCES[decoder.confidence]
    if streamer is not None:
        streamer.put(prompt)

    # A row stands in the plan where its committed tokens put it. Without a threshold every row stands at step s.
    done = torch.tensor(plan.done, device=device)
    horizons = torch.tensor(plan.horizon, device=device)
    gammas = torch.tensor([decoder.gamma(p) for p in plan.progress], dtype=torch.float64, device=device)
    for s in range(plan.steps):
        masked = step < 0
        if decoder.threshold is None:
            quota: Tensor | int = plan.commits[s]
            horizon: Tensor | int = plan.horizon[s]
            gamma = gammas[s]
            open_positions, most = plan.horizon[s] - plan.done[s] + plan.commits[s], plan.commits[s]
        else:
            committed = length - masked.sum(1)
            if bool((committed == length).all()):
                break
            at = torch.searchsorted(done, committed, right=True).clamp(max=plan.steps - 1)
            quota, horizon, gamma = (done[at] - committed)[:, None], horizons[at][:, None], gammas[at][:, None]
            open_positions = most = int((masked & (place < horizon)).sum(1).max())
        is_open = masked & (place < horizon)
        positions = torch.where(is_open, place, place + length).sort(1).values[:, :open_positions]  # (B, K)
        valid = positions < length
        positions = positions % length

        logits = guided_logits(lm, ids, attention_mask, positions + width, width, decoder.cfg_scale)
        noise = uniform_noise(seeds, s, positions, TOKEN) if seeds is not None and decoder.temperature > 0 else None
        found = candidates(logits, decoder.temperature, noise)
        order = (
            uniform_noise(seeds, s, positions, ORDER) if seeds is not None and decoder.confidence == "random" else None
        )
        score = confidence(found, order)
        if decoder.eos == "reject":
            score = reject_eos(score, found.tokens, end_ids, gamma)
        elif decoder.eos == "suppress":
            score = suppress_eos(score, found.tokens, end_ids)

        best = score.masked_fill(~valid, -1.0).topk(most, dim=1)  # (B, most)
        chosen = (torch.arange(most, device=device)[None] < quota) & (best.values >= 0)
        if decoder.threshold is not None:
            chosen |= best.values >= decoder.threshold
        where = positions.gather(1, best.indices)
        # Unchosen entries write back what stands there.
        token = torch.where(chosen, found.tokens.gather(1, best.indices), ids.gather(1, where + width))
        ids.scatter_(1, where + width, token)
        logprob.scatter_(1, where, torch.where(chosen, found.logprob.gather(1, best.indices), logprob.gather(1, where)))
        step.scatter_(1, where, torch.where(chosen, torch.tensor(s, dtype=torch.int16), step.gather(1, where)))
        if streamer is not None:
            streamer.put_draft(ids[0, width:])
    if streamer is not None:
        streamer.put(ids[0, width:].cpu())
        streamer.end()
    return Trajectory(prompt, prompt_mask, ids[:, width:].clone(), step, logprob, lm.mask_id, decoder.config())


@torch.no_grad()
def replay(lm: MaskedLM, trajectory: Trajectory) -> Tensor:
    """Log-probabilities of all committed tokens, recomputed on ``state(s)``. (B, L) float32; equals ``logprob``."""
    width, length = trajectory.prompt.shape[1], trajectory.tokens.shape[1]
    every = torch.arange(length, device=trajectory.tokens.device)[None].expand_as(trajectory.tokens) + width
    out = torch.zeros_like(trajectory.logprob)
    for s in range(trajectory.steps):
        ids = torch.cat([trajectory.prompt, trajectory.state(s)], dim=1)
        logits = guided_logits(lm, ids, trajectory.visible, every, width, trajectory.decoder["cfg_scale"])
        out = torch.where(trajectory.committed(s), token_logprob(logits, trajectory.tokens), out)
    return out
