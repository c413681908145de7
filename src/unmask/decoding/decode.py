"""The decoding loop. One for every decoder: the plan says how many and where, the confidence which, the model what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from unmask.decoding.canvas import Canvases
from unmask.decoding.confidence import CONFIDENCES, exclude_eos, reject_eos, suppress_eos
from unmask.decoding.decoder import Decoder
from unmask.decoding.sampling import ORDER, TOKEN, Candidates, candidates, uniform_noise
from unmask.decoding.trajectory import Trajectory
from unmask.errors import UserError
from unmask.models.backbone import KVCache
from unmask.models.head import Head, score_tokens
from unmask.models.masked_lm import MaskedLM

Result = TypeVar("Result")


class Streamer(Protocol):
    """The diffusion streamer protocol of transformers (``TextDiffusionStreamer``)."""

    def put(self, value: Tensor) -> None: ...
    def put_draft(self, value: Tensor, **kwargs: Any) -> None: ...
    def end(self) -> None: ...


def forward_with_guidance(
    lm: MaskedLM,
    ids: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor,
    reduce: Callable[[Head, Tensor], Result],
    *,
    prompt: int,
    w: float,
    cache: KVCache | None = None,
    window: tuple[int, int] | None = None,
) -> Result:
    """``lm.forward_head`` under classifier-free guidance: logits u + (w + 1)(c - u), u from the row with its prompt masked.

    The head is linear, so the hidden states are mixed and the head is applied once. ids (B, T), of which the first ``prompt``
    columns are the prompt; the rest as in ``MaskedLM.forward_head``. A guided cache holds the rows of c, then those of u.
    """
    if w == 0:
        return lm.forward_head(ids, attention_mask, positions, reduce, cache, window)
    without = ids.clone()
    without[:, :prompt] = lm.mask_id
    both_mask = None if attention_mask is None else attention_mask.repeat(2, 1)
    start, stop = window or (0, ids.shape[1])
    both = torch.cat([positions, positions + len(ids) * (stop - start)])

    def mixed(head: Head, hidden: Tensor) -> Result:
        c, u = hidden.to(torch.promote_types(hidden.dtype, torch.float32)).chunk(2)
        return reduce(head, (u + (w + 1) * (c - u)).to(hidden.dtype))

    return lm.forward_head(torch.cat([ids, without]), both_mask, both, mixed, cache, window)


class Decoding:
    """A model and a decoder at work: ``advance`` takes every row one pass further.

    A row stands in the plan where its own committed tokens put it, so what it becomes does not depend on its neighbours.
    Without a threshold or early stop nothing here waits for the device.
    """

    def __init__(self, lm: MaskedLM, decoder: Decoder, early_stop: bool) -> None:
        self.lm, self.decoder, self.early_stop = lm, decoder, early_stop
        self.plan = plan = decoder.plan
        self.confidence = CONFIDENCES[decoder.confidence]
        self.most = max(plan.commits if decoder.threshold is None else plan.open)

        def constant(values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=lm.device)

        self.ends = constant(lm.end_ids)
        end_ids = lm.end_ids if decoder.eos_tokens == "eos+eot" else [lm.eos_id]
        self.rejected, self.excluded = constant(end_ids), end_ids if decoder.eos == "exclude" else ()
        self.place, self.rank = constant(range(plan.length)), constant(range(self.most))
        self.commits, self.done, self.horizon = map(constant, (plan.commits, plan.done, plan.horizon))
        self.gammas = constant([decoder.gamma(p) for p in plan.progress], torch.float64)
        self.cache: KVCache | None = None
        self.cached = -1  # the horizon of the block that the cache was made for

    def standing(self, rows: Canvases) -> tuple[Tensor, Tensor, Tensor]:
        """Every row's step in the plan (B,), how many tokens it must commit now (B,), and where it may (B, L) bool."""
        masked = rows.step < 0
        if self.decoder.threshold is None:
            at = rows.at
            quota = self.commits[at]
        else:
            committed = self.plan.length - masked.sum(1)
            at = torch.searchsorted(self.done, committed, right=True)
            quota = self.done[at] - committed
        return at, quota, masked & (self.place < self.horizon[at][:, None])

    @torch.no_grad()
    def advance(self, rows: Canvases) -> None:
        """One forward pass and its commits, in place."""
        decoder, batch, length = self.decoder, len(rows), self.plan.length
        at, quota, open_ = self.standing(rows)
        window, busy = self._block(rows, at)
        if busy is not None:
            open_ &= busy[:, None]
        if decoder.threshold is None:  # as many as the plan says: no need to look
            flat = torch.nonzero_static(open_.flatten(), size=sum(self.plan.open[s] for s in rows.passes))[:, 0]
        else:
            flat = open_.flatten().nonzero()[:, 0]
        row, column = flat // length, flat % length  # (N,) each
        noise = order = None
        if decoder.temperature > 0:
            noise = uniform_noise(rows.seeds[row], rows.at[row], column, TOKEN)
        if self.confidence.noisy:
            order = uniform_noise(rows.seeds[row], rows.at[row], column, ORDER)

        def reduce(head: Head, hidden: Tensor) -> Candidates:
            needs, top_p = self.confidence.needs, decoder.top_p
            return candidates(head, hidden, decoder.temperature, noise, needs, top_p, self.excluded)

        start, stop = window or (0, rows.ids.shape[1])
        positions = row * (stop - start) + column + rows.width - start
        found = forward_with_guidance(
            self.lm,
            rows.ids,
            rows.attention_mask,
            positions,
            reduce,
            prompt=rows.width,
            w=decoder.cfg_scale,
            cache=self.cache,
            window=window,
        )
        score = self.confidence.score(found, order).nan_to_num(0.0)  # every pass commits; ``split`` refuses the result
        if decoder.eos == "reject":
            score = reject_eos(score, found.tokens, self.rejected, self.gammas[at][row])
        elif decoder.eos == "suppress":
            score = suppress_eos(score, found.tokens, self.rejected)
        elif found.end is not None:
            score = exclude_eos(score, found.tokens, self.rejected, found.end)

        scores = torch.full((batch, length), -1.0, dtype=torch.float64, device=score.device)
        scores.view(-1)[flat] = score
        best = scores.topk(self.most, dim=1)
        chosen = self.rank < quota[:, None]
        if decoder.threshold is not None:
            chosen = chosen | (best.values >= decoder.threshold)
        commit = torch.zeros_like(open_).scatter_(1, best.indices, chosen & (best.values >= 0)).view(-1)[flat]
        # What is not committed is written back as it stands.
        cells = row * rows.ids.shape[1] + rows.width + column
        for target, where, value in (
            (rows.ids, cells, found.tokens),
            (rows.logprob, flat, found.logprob),
            (rows.step, flat, rows.at[row].to(torch.int16)),
        ):
            view = target.view(-1)
            view[where] = torch.where(commit, value.to(target.dtype), view[where])
        if busy is None:
            rows.at += 1
            rows.passes = [n + 1 for n in rows.passes]
        else:
            rows.at += busy
            rows.passes = rows.at.tolist()

    def _block(self, rows: Canvases, at: Tensor) -> tuple[tuple[int, int] | None, Tensor | None]:
        """The columns to compute in this pass (None: all), and which rows take part (None: all).

        Under a threshold, rows wait for each other at the end of a block, so that the cache is made anew for all of them.
        """
        if self.decoder.cache == "none":
            return None, None
        static = self.decoder.threshold is None  # then rows are always in the same block
        step = rows.passes[0] if static else int(at.min())
        start, horizon = self.plan.start[step], self.plan.horizon[step]
        busy = None if static else self.horizon[at] == horizon
        if self.cached != horizon:
            self.cached, self.cache = horizon, KVCache()
            return None, busy
        stop = horizon if self.decoder.cache == "dual" else self.plan.length
        return (rows.width + start, rows.width + stop), busy

    def finished(self, rows: Canvases) -> list[int]:
        """Rows that are done: committed whole, or with early stop up to their first end token."""
        if self.decoder.threshold is None and not self.early_stop:
            return [i for i, n in enumerate(rows.passes) if n == self.plan.steps]
        before_end = torch.ones_like(rows.step, dtype=torch.bool)
        if self.early_stop:
            before_end = torch.isin(rows.canvas, self.ends).cumsum(1) == 0
        unfinished = ((rows.step < 0) & before_end).any(1).tolist()
        return [i for i, more in enumerate(unfinished) if not more]

    def split(self, rows: Canvases, leave: list[int]) -> tuple[Canvases, Canvases]:
        """The rows that stay and those that leave. Raises UserError where the model gave no finite probabilities."""
        gone, device = set(leave), rows.ids.device
        if not rows.logprob.isfinite().all():
            raise UserError("the model's logits are not finite: try --dtype float32, or check the checkpoint's weights")
        stay = torch.tensor([i for i in range(len(rows)) if i not in gone], dtype=torch.int64, device=device)
        if not len(stay):
            self.cache, self.cached = None, -1
        elif self.cache is not None:
            self.cache.take(torch.cat([stay + i * len(rows) for i in range(self.decoder.copies)]))
        return rows.take(stay), rows.take(torch.tensor(leave, device=device))


def _seeds(decoder: Decoder, batch: int, generator: torch.Generator | None, seeds: Tensor | None) -> Tensor:
    """One seed a row; zeros where nothing is random. Raises UserError where randomness has no source."""
    if seeds is not None:
        return seeds
    if decoder.temperature == 0 and not CONFIDENCES[decoder.confidence].noisy:
        return torch.zeros(batch, dtype=torch.int64)
    if generator is None:
        raise UserError(f"decoder {decoder.name!r} draws random numbers: pass a torch.Generator")
    return torch.randint(2**62, (batch,), generator=generator, device=generator.device)


def decode(
    lm: MaskedLM,
    prompt: Tensor,
    prompt_mask: Tensor,
    decoder: Decoder,
    generator: torch.Generator | None = None,
    seeds: Tensor | None = None,
    streamer: Streamer | None = None,
    early_stop: bool = False,
) -> Trajectory:
    """Fill a canvas of masks after each prompt.

    Args:
        prompt: (B, P) int64, left-padded. prompt_mask: (B, P) bool, False = padding. (``MaskedLM.encode`` makes both.)
        decoder: what to do at each step.
        generator: source of one seed a row; needed where the decoder draws random numbers.
        seeds: (B,) int64, one seed a row, instead of a generator. A row's result depends on its own seed alone, not on
            the batch it stands in.
        streamer: shown every draft; for one row.
        early_stop: a row is finished once all is committed up to its first end token, since its text cannot change any
            more. It leaves the batch; the rest of its canvas stays masked, with step -1.

    Returns:
        The trajectory; prompt tokens are never altered.

    Raises:
        UserError: where randomness is needed but neither generator nor seeds is given, seeds are not one a row, a prompt
            holds the mask token, a streamer is given more than one row, or the model's logits are not finite.
    """
    batch = prompt.shape[0]
    if seeds is not None and len(seeds) != batch:
        raise UserError(f"{len(seeds)} seeds for {batch} prompts: give one each")
    if (prompt == lm.mask_id).logical_and(prompt_mask).any():
        raise UserError("a prompt holds the mask token: remove it")
    if streamer is not None and batch != 1:
        raise UserError(f"a streamer shows one row, not {batch}: decode one prompt at a time")
    seeds = _seeds(decoder, batch, generator, seeds).to(prompt.device)
    if streamer is not None:
        streamer.put(prompt)
    loop = Decoding(lm, decoder, early_stop)
    rows = Canvases.new(prompt, prompt_mask, decoder.plan.length, lm.mask_id, seeds, range(batch))
    parts: list[Canvases] = []
    while len(rows):
        loop.advance(rows)
        if streamer is not None:
            streamer.put_draft(rows.canvas[0])
        leave = loop.finished(rows)
        if leave:
            rows, done = loop.split(rows, leave)
            parts.append(done)
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.join(part, lm.pad_id)
    order = torch.tensor(whole.numbers, device=prompt.device).argsort()
    trajectory = whole.take(order).trajectory(lm.mask_id, decoder.config())
    if streamer is not None:
        streamer.put(trajectory.tokens[0].cpu())
        streamer.end()
    return trajectory


def decode_each(
    lm: MaskedLM,
    prompts: Sequence[str],
    decoder: Decoder,
    seeds: Tensor,
    batch_size: int,
    early_stop: bool = True,
    static_width: int = 0,
) -> Iterator[tuple[list[int], Trajectory]]:
    """Decode any number of prompts with a batch that stays full: a finished row makes room for the next prompt.

    Prompts of similar length next to each other waste least on padding.

    Args:
        prompts: texts for ``MaskedLM.encode``. seeds: (len(prompts),) int64.
        batch_size: rows of one forward pass.
        early_stop: as in ``decode``.
        static_width: for a compiled model: prompts are padded to this many tokens and the batch is filled up with rows that
            nobody asked for, so that every forward pass has one shape.

    Yields:
        (indexes into ``prompts``, their trajectory) of rows that finish together.

    Raises:
        UserError: as ``decode``, and for a batch size below 1.
    """
    if batch_size < 1 or len(seeds) != len(prompts):
        raise UserError(
            f"batch_size is {batch_size}, with {len(seeds)} seeds for {len(prompts)} prompts: give one each"
        )
    loop = Decoding(lm, decoder, early_stop)
    rows: Canvases | None = None
    following, unfinished = 0, len(prompts)
    while unfinished:
        room = batch_size - (0 if rows is None else len(rows))
        together = decoder.cache != "none" and rows is not None  # a cache is made for rows of one block
        numbers = range(following, following + room if static_width else min(following + room, len(prompts)))
        if numbers and not together:
            texts = [prompts[min(i, len(prompts) - 1)] for i in numbers]
            ids, mask = lm.encode(texts, decoder.max_new_tokens, static_width)
            some = seeds[[min(i, len(prompts) - 1) for i in numbers]].to(ids.device)
            fresh = Canvases.new(ids, mask, decoder.plan.length, lm.mask_id, some, numbers)
            fresh.padded |= bool(static_width)  # with a mask or without one are two shapes
            rows = fresh if rows is None else rows.join(fresh, lm.pad_id)
            following = numbers.stop
        assert rows is not None
        loop.advance(rows)
        leave = loop.finished(rows)
        if not leave:
            continue
        rest, done = loop.split(rows, leave)
        keep = static_width or loop.cache is not None  # the width
        rows = None if not len(rest) else rest if keep else rest.drop_padding()
        asked = [i for i, number in enumerate(done.numbers) if number < len(prompts)]
        if asked:
            unfinished -= len(asked)
            done = done.take(torch.tensor(asked, device=lm.device)).drop_padding()
            yield done.numbers, done.trajectory(lm.mask_id, decoder.config())


@torch.no_grad()
def replay(lm: MaskedLM, trajectory: Trajectory) -> Tensor:
    """Log-probabilities of all committed tokens, recomputed on ``state(s)``. (B, L) float32.

    Equals ``logprob``, unless the decoder's cache made that an approximation.
    """
    width = trajectory.prompt.shape[1]
    out = torch.zeros_like(trajectory.logprob)
    for s in range(trajectory.steps):
        ids = torch.cat([trajectory.prompt, trajectory.state(s)], dim=1)
        row, column = trajectory.committed(s).nonzero(as_tuple=True)
        tokens = trajectory.tokens[row, column]

        def reduce(head: Head, hidden: Tensor, tokens: Tensor = tokens) -> Tensor:
            return score_tokens(head, hidden, tokens)[0]

        positions = row * ids.shape[1] + width + column
        cfg = trajectory.decoder["cfg_scale"]
        found = forward_with_guidance(lm, ids, trajectory.visible, positions, reduce, prompt=width, w=cfg)
        out[row, column] = found.to(out)
    return out
