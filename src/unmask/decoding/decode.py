"""The decoding loop. One for every decoder: the plan says how many and where, the confidence which, the model what."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from unmask.decoding.canvas import Canvases
from unmask.decoding.confidence import Confidence, exclude_eos, reject_eos, suppress_eos
from unmask.decoding.decoder import Decoder
from unmask.decoding.sampling import ORDER, TOKEN, Candidates, candidates, uniform_noise
from unmask.decoding.score import forward_with_guidance
from unmask.decoding.trajectory import Trajectory
from unmask.errors import UserError
from unmask.models.backbone import KVCache
from unmask.models.masked_lm import MaskedLM, Text


class Streamer(Protocol):
    """The diffusion streamer protocol of transformers (``TextDiffusionStreamer``)."""

    def put(self, value: Tensor) -> None: ...
    def put_draft(self, value: Tensor, **kwargs: Any) -> None: ...
    def end(self) -> None: ...


class DecodingLoop:
    """A model and a decoder at work on rows of canvases: ``run`` passes until all are done, ``advance`` is one pass.

    A row stands in the plan where its own committed tokens put it, so what it becomes does not depend on its neighbours.
    Without a threshold or early stop nothing here waits for the device.
    """

    def __init__(self, lm: MaskedLM, decoder: Decoder, early_stop: bool) -> None:
        self.lm, self.decoder, self.early_stop = lm, decoder, early_stop
        self.plan = plan = decoder.plan
        self.confidence = Confidence.of(decoder.confidence)
        self.max_commit = max(plan.commits if decoder.threshold is None else plan.open)

        def constant(values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=lm.device)

        self.end_ids = constant(lm.end_ids)
        rejected = lm.end_ids if decoder.eos_tokens == "eos+eot" else [lm.eos_id]
        self.rejected, self.excluded = constant(rejected), rejected if decoder.eos == "exclude" else ()
        self.rank = constant(range(self.max_commit))
        self.commits, self.done, self.horizon = map(constant, (plan.commits, plan.done, plan.horizon))
        self.gammas = constant([decoder.gamma(p) for p in plan.progress], torch.float64)
        self.cache: KVCache | None = None
        self.cached_horizon = -1  # of the block that the cache was made for
        self.on_pass: Callable[[Canvases], None] | None = None

    def run(self, rows: Canvases) -> Iterator[Canvases]:
        """Advance rows until none is left; yields those that finish together."""
        while len(rows):
            self.advance(rows)
            if self.on_pass is not None:
                self.on_pass(rows)
            if leave := self.finished(rows):
                rows, done = self.split(rows, leave)
                yield done
                rows = self.refill(rows)

    def refill(self, rows: Canvases) -> Canvases:
        """What goes on when ``rows`` are left of a batch; here these."""
        return rows

    @torch.no_grad()
    def advance(self, rows: Canvases) -> None:
        """One forward pass and its commits, in place."""
        step, quota, open_ = self.step_quota_and_mask(rows)
        window, active = self.cache_window(rows, step)
        if active is not None:
            open_ &= active[:, None]
        if self.decoder.threshold is None:  # as many as the plan says: no need to look
            flat = torch.nonzero_static(open_.flatten(), size=sum(self.plan.open[s] for s in rows.passes))[:, 0]
        else:
            flat = open_.flatten().nonzero()[:, 0]
        at = flat // self.length(rows), flat % self.length(rows)
        found = self.propose(rows, at, window)
        scores = torch.full(open_.shape, -torch.inf, dtype=torch.float64, device=flat.device)
        scores[at] = self.score(rows, at, found, self.gammas[step])
        self.commit(rows, at, found, self.choose(scores, quota)[at])
        if active is None:
            rows.at += 1
            rows.passes = [n + 1 for n in rows.passes]
        else:
            rows.at += active
            rows.passes = rows.at.tolist()

    def length(self, rows: Canvases) -> int:
        return rows.step.shape[1]

    def step_quota_and_mask(self, rows: Canvases) -> tuple[Tensor, Tensor, Tensor]:
        """Every row's step in the plan (B,), how many tokens it must commit now (B,), and where it may (B, L) bool."""
        masked = rows.canvas == self.lm.mask_id
        if self.decoder.threshold is None:
            step = rows.at
            quota = self.commits[step]
        else:
            committed = self.plan.length - masked.sum(1)
            step = torch.searchsorted(self.done, committed, right=True)
            quota = self.done[step] - committed
        return step, quota, masked & (rows.rank < self.horizon[step][:, None])

    def cache_window(self, rows: Canvases, step: Tensor) -> tuple[tuple[int, int] | None, Tensor | None]:
        """The columns to compute in this pass (None: all), and which rows take part (None: all).

        Under a threshold, rows wait for each other at the end of a block, so that the cache is made anew for all of them.
        """
        if self.decoder.cache == "none":
            return None, None
        static = self.decoder.threshold is None  # then rows are always in the same block
        first = rows.passes[0] if static else int(step.min())
        start, horizon = self.plan.start[first], self.plan.horizon[first]
        active = None if static else self.horizon[step] == horizon
        if self.cached_horizon != horizon:
            self.cached_horizon, self.cache = horizon, KVCache()
            return None, active
        stop = horizon if self.decoder.cache == "dual" else self.plan.length
        return (rows.width + start, rows.width + stop), active

    def propose(self, rows: Canvases, at: tuple[Tensor, Tensor], window: tuple[int, int] | None) -> Candidates:
        """A forward pass: one candidate at each of the positions ``at``, rows and columns (N,) of the canvas."""
        decoder, (row, column) = self.decoder, at
        noise = uniform_noise(rows.seeds[row], rows.at[row], column, TOKEN) if decoder.temperature > 0 else None
        start, stop = window or (0, rows.ids.shape[1])
        return forward_with_guidance(
            self.lm,
            rows.ids,
            rows.attention_mask,
            row * (stop - start) + column + rows.width - start,
            lambda head, hidden: candidates(
                head, hidden, decoder.temperature, noise, self.confidence.needs, decoder.top_p, self.excluded
            ),
            prompt=rows.width,
            w=decoder.cfg_scale,
            cache=self.cache,
            window=window,
        )

    def score(self, rows: Canvases, at: tuple[Tensor, Tensor], found: Candidates, gammas: Tensor) -> Tensor:
        """The candidates' scores (N,) float64, after the EOS rule. gammas (B,): EOSER's factor of each row."""
        row, column = at
        noise = uniform_noise(rows.seeds[row], rows.at[row], column, ORDER) if self.confidence.noisy else None
        score = self.confidence.score(found, noise).nan_to_num(0.0)  # every pass commits; ``split`` refuses the result
        if self.decoder.eos == "reject":
            return reject_eos(score, found.tokens, self.rejected, gammas[row])
        if self.decoder.eos == "suppress":
            return suppress_eos(score, found.tokens, self.rejected)
        return score if found.end is None else exclude_eos(score, found.tokens, self.rejected, found.end)

    def choose(self, scores: Tensor, quota: Tensor) -> Tensor:
        """Which positions to commit: the ``quota`` (B,) best ones, and all that reach the threshold. (B, L) -> bool."""
        best = scores.topk(self.max_commit, dim=1)
        chosen = self.rank < quota[:, None]
        if self.decoder.threshold is not None:
            chosen = chosen | (best.values >= self.decoder.threshold)
        chosen &= best.values > -torch.inf
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best.indices, chosen)

    def commit(self, rows: Canvases, at: tuple[Tensor, Tensor], found: Candidates, chosen: Tensor) -> None:
        """Write the chosen (N,) bool of the candidates; what is not chosen is written back as it stands."""
        row, column = at
        for target, where, value in (
            (rows.ids, column + rows.width, found.tokens),
            (rows.logprob, column, found.logprob),
            (rows.step, column, rows.at[row].to(torch.int16)),
        ):
            target[row, where] = torch.where(chosen, value.to(target.dtype), target[row, where])

    def finished(self, rows: Canvases) -> list[int]:
        """Rows that are done: committed whole, or with early stop up to their first end token."""
        if self.decoder.threshold is None and not self.early_stop:
            return [i for i, n in enumerate(rows.passes) if n == self.plan.steps]
        unfinished = rows.canvas == self.lm.mask_id
        if self.early_stop:
            unfinished &= torch.isin(rows.canvas, self.end_ids).cumsum(1) == 0
        return [i for i, more in enumerate(unfinished.any(1).tolist()) if not more]

    def split(self, rows: Canvases, leave: list[int]) -> tuple[Canvases, Canvases]:
        """The rows that stay and those that leave. Raises UserError where the model gave no finite probabilities."""
        gone, device = set(leave), rows.ids.device
        if not rows.logprob.isfinite().all():
            raise UserError("the model's logits are not finite: try --dtype float32, or check the checkpoint's weights")
        stay = torch.tensor([i for i in range(len(rows)) if i not in gone], dtype=torch.int64, device=device)
        if not len(stay):
            self.cache, self.cached_horizon = None, -1
        elif self.cache is not None:
            self.cache.take(torch.cat([stay + i * len(rows) for i in range(self.decoder.copies)]))
        return rows.take(stay), rows.take(torch.tensor(leave, device=device))


def _seeds(decoder: Decoder, batch: int, generator: torch.Generator | None, seeds: Tensor | None) -> Tensor:
    """One seed a row; zeros where nothing is random. Raises UserError where randomness has no source."""
    if seeds is not None:
        if len(seeds) != batch:
            raise UserError(f"{len(seeds)} seeds for {batch} prompts: pass one each")
        return seeds
    if not decoder.is_random:
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
    canvas: Tensor | None = None,
) -> Trajectory:
    """Fill a canvas behind each prompt.

    Args:
        prompt: (B, P) int64, left-padded. prompt_mask: (B, P) bool, False = padding. (``MaskedLM.encode`` makes both.)
        decoder: what to do at each step.
        generator: source of one seed a row; needed where the decoder draws random numbers.
        seeds: (B,) int64, one seed a row, instead of a generator. A row's result depends on its own seed alone, not on
            the batch it stands in.
        streamer: shown every draft; for one row.
        early_stop: a row is finished once all is committed up to its first end token, since its text cannot change any
            more. It leaves the batch; the rest of its canvas stays masked, with step -1.
        canvas: (B, L) int64, templates: mask tokens where to fill; other tokens are kept, with step -1. A row has
            ``max_new_tokens`` masks, and a plan's blocks count masks. All masks where left out.

    Returns:
        The trajectory; prompt tokens are never altered.

    Raises:
        UserError: where randomness is needed but neither generator nor seeds is given, seeds are not one a row, a prompt
            holds the mask token, a template does not fit the decoder, a streamer is given more than one row, or the
            model's logits are not finite.
    """
    batch, length = len(prompt), decoder.plan.length
    if (prompt == lm.mask_id).logical_and(prompt_mask).any():
        raise UserError("a prompt holds the mask token: remove it")
    if streamer is not None and batch != 1:
        raise UserError(f"a streamer shows one row, not {batch}: decode one prompt at a time")
    if canvas is None:
        canvas = torch.full((batch, length), lm.mask_id, device=prompt.device)
    elif ((masks := (canvas == lm.mask_id).sum(1)) != length).any():
        raise UserError(
            f"a template has {masks.tolist()} masks, but decoder {decoder.name!r} fills {length}: set max_new_tokens"
        )
    elif decoder.cache != "none" and canvas.shape[1] > length:
        raise UserError(f"cache={decoder.cache} needs a canvas without fixed tokens: set cache=none for a template")
    seeds = _seeds(decoder, batch, generator, seeds).to(prompt.device)
    loop = DecodingLoop(lm, decoder, early_stop)
    if streamer is not None:
        streamer.put(prompt)
        loop.on_pass = lambda rows: streamer.put_draft(rows.canvas[0])
    parts = list(loop.run(Canvases.new(prompt, prompt_mask, canvas, lm.mask_id, seeds, range(batch))))
    done = functools.reduce(lambda one, two: one.join(two, lm.pad_id), parts)
    order = torch.tensor(done.numbers, device=prompt.device).argsort()
    trajectory = done.take(order).trajectory(lm.mask_id, decoder.config())
    if streamer is not None:
        streamer.put(trajectory.tokens[0].cpu())
        streamer.end()
    return trajectory


class _RefilledLoop(DecodingLoop):
    """A batch that stays full; ``decode_each`` says what of."""

    def __init__(
        self,
        lm: MaskedLM,
        prompts: Sequence[Text],
        decoder: Decoder,
        seeds: Tensor,
        batch_size: int,
        early_stop: bool,
        static_width: int,
    ) -> None:
        super().__init__(lm, decoder, early_stop)
        self.prompts, self.seeds, self.batch_size, self.static_width = prompts, seeds, batch_size, static_width
        self.following = 0

    def refill(self, rows: Canvases) -> Canvases:
        if len(rows) and self.decoder.cache != "none":  # a cache is made for rows of one block
            return rows
        if not self.static_width:
            rows = rows.drop_padding()
        fresh = self.fresh(self.batch_size - len(rows))
        return fresh if not len(rows) else rows.join(fresh, self.lm.pad_id) if len(fresh) else rows

    def fresh(self, room: int) -> Canvases:
        """Canvases of the next prompts, at most ``room``; under a static width of as many rows, whoever they are for."""
        last = len(self.prompts) - 1
        stop = self.following + room
        numbers = range(self.following, stop if self.static_width else min(stop, last + 1))
        self.following = numbers.stop
        some = [min(i, last) for i in numbers]
        ids, mask = self.lm.encode([self.prompts[i] for i in some], self.decoder.max_new_tokens, self.static_width)
        canvas = torch.full((len(ids), self.plan.length), self.lm.mask_id, device=ids.device)
        fresh = Canvases.new(ids, mask, canvas, self.lm.mask_id, self.seeds[some].to(ids.device), numbers)
        fresh.padded |= bool(self.static_width)  # with a mask or without one are two shapes
        return fresh


def decode_each(
    lm: MaskedLM,
    prompts: Sequence[Text],
    decoder: Decoder,
    seeds: Tensor,
    batch_size: int,
    early_stop: bool = True,
    static_width: int = 0,
) -> Iterator[tuple[list[int], Trajectory]]:
    """Decode any number of prompts with a batch that stays full: a finished row makes room for the next prompt.

    Prompts of similar length next to each other waste least on padding.

    Args:
        prompts: texts or token ids for ``MaskedLM.encode``. seeds: (len(prompts),) int64.
        batch_size: rows of one forward pass.
        early_stop: as in ``decode``.
        static_width: for a compiled model: prompts are padded to this many tokens and the batch is filled up with rows that
            nobody asked for, so that every forward pass has one shape.

    Yields:
        (indexes into ``prompts``, their trajectory) of rows that finish together.

    Raises:
        UserError: as ``decode``, and for a batch size below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: pass 1 or more")
    loop = _RefilledLoop(
        lm, prompts, decoder, _seeds(decoder, len(prompts), None, seeds), batch_size, early_stop, static_width
    )
    unfinished = len(prompts)
    for done in loop.run(loop.fresh(batch_size)) if prompts else ():
        asked = [i for i, number in enumerate(done.numbers) if number < len(prompts)]
        if asked:
            done = done.take(torch.tensor(asked, device=lm.device)).drop_padding()
            yield done.numbers, done.trajectory(lm.mask_id, decoder.config())
        unfinished -= len(asked)
        if not unfinished:  # rows that nobody asked for may be left
            return
