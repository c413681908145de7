"""The decoding loop. One for every decoder: the plan says how many and where, the confidence which, the model what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.decoding.canvas import Canvases
from unmask.decoding.confidence import Confidence, exclude_eos, reject_eos, suppress_eos
from unmask.decoding.decoder import Decoder
from unmask.decoding.sampling import ORDER, TOKEN, Candidates, candidates, uniform_noise
from unmask.decoding.score import forward_with_guidance
from unmask.decoding.trajectory import cat_left_padded
from unmask.errors import UserError
from unmask.models.backbone import KVCache
from unmask.models.head import Head
from unmask.models.masked_lm import MaskedLM

FEW_ENDS, MANY_ENDS = 0.4, 0.6  # rho-EOS: between these shares of end tokens the length stays
LENGTH_STEP, LENGTH_PASSES = 8, 64  # its smallest change in tokens, and how many passes may make one
CREDIT_FADING, CREDIT_POWER = 0.8, 0.2  # beta and gamma of CreditDecoding


@dataclass(frozen=True)
class Pass:
    """What the next forward pass of a batch looks at: where it may commit, how many at least, how candidates are read."""

    step: Tensor  # (B,) int64, of the plan
    quota: Tensor  # (B,) int64
    open: Tensor  # (B, L) bool
    at: tuple[Tensor, Tensor]  # rows and columns of the canvas that are open, (N,) int64 each
    active: Tensor | None  # (B,) bool, the rows that take part (None: all)
    window: Tensor | None  # the columns to compute (None: all)
    positions: Tensor  # (N,) int64, ``at`` in the flattened rows, or in the flattened window
    read: Callable[[Head, Tensor], Candidates]


class DecodingLoop:
    """A model and a decoder at work on rows of canvases: ``run`` passes until all are done, ``advance`` is one pass.

    A row's own committed tokens say which step of the plan it is in, so it does not depend on its neighbors. Without a
    threshold or early stop nothing here waits for the device.
    """

    def __init__(self, lm: MaskedLM, decoder: Decoder, early_stop: bool) -> None:
        self.lm, self.block, self.early_stop = lm, lm.block_length, early_stop
        self.decoder = decoder = decoder.within(self.block)
        self.plan = plan = decoder.plan
        # Then a row's step in the plan is the number of its passes. (In a model's own blocks the prompt begins the first.)
        self.resizes = decoder.initial_length is not None
        self.static = not (decoder.adaptive or self.resizes) and self.block is None
        self.confidence = Confidence.of(decoder.confidence)
        self.max_commit = max(plan.commits if self.static else plan.open)

        def constant(values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=lm.device)

        self.end_ids = constant(lm.end_ids)
        rejected = lm.end_ids if decoder.eos_tokens == "eos+eot" else [lm.eos_id]
        self.rejected, self.excluded = constant(rejected), rejected if decoder.eos == "exclude" else ()
        self.rank = constant(range(self.max_commit))
        self.commits, self.done, self.horizon = map(constant, (plan.commits, plan.done, plan.horizon))
        self.gammas = constant([decoder.gamma(p) for p in plan.progress], torch.float64)
        self.cache: KVCache | None = None
        self.cached_horizon = -1  # of the block that an approximate cache was made for

    def run(
        self,
        rows: Canvases,
        refill: Callable[[Canvases], Canvases] = lambda rows: rows,
        on_pass: Callable[[Canvases], None] = lambda rows: None,
    ) -> Iterator[Canvases]:
        """Advance rows until none is left; yields those that finish together, and continues with ``refill`` of the others."""
        while len(rows):
            self.advance(rows)
            on_pass(rows)
            if leave := self.finished(rows):
                rows, done = self.split(rows, leave)
                yield done
                rows = refill(rows)

    @torch.no_grad()
    def advance(self, rows: Canvases) -> None:
        """One forward pass and its commits, in place."""
        now = self.prepare(rows)
        self.finish(rows, now, self.read(rows, now))

    def read(self, rows: Canvases, now: Pass) -> Candidates:
        """The forward pass: a candidate at each of the positions that it looks at."""
        how: dict[str, Any] = {"prompt": rows.width, "w": self.decoder.cfg_scale}
        how |= {"cache": self.cache, "window": now.window}
        return forward_with_guidance(self.lm, rows.ids, rows.attention_mask, now.positions, now.read, **how)

    def prepare(self, rows: Canvases) -> Pass:
        """What the next pass looks at."""
        step, quota, open_ = self.step_quota_and_mask(rows)
        window, active = self.cache_window(rows, step, open_)
        if active is not None:
            open_ &= active[:, None]
        flat = (self.unfilled(rows) if self.resizes else open_).flatten()  # (all candidates tell the length)
        if self.static:  # as many as the plan says: no need to look
            flat = torch.nonzero_static(flat, size=sum(self.plan.open[s] for s in rows.passes))[:, 0]
        else:
            flat = flat.nonzero()[:, 0]
        at = row, column = flat // rows.length, flat % rows.length
        if window is None:
            positions = row * rows.ids.shape[1] + rows.width + column
        else:
            width = window.shape[1]
            positions = (row + 1) * width - 1 + rows.width + column - window[:, -1].expand(len(rows))[row]
        return Pass(step, quota, open_, at, active, window, positions, self.reader(rows, at))

    def reader(self, rows: Canvases, at: tuple[Tensor, Tensor]) -> Callable[[Head, Tensor], Candidates]:
        """One candidate at each of the positions ``at``, from the head and their hidden states."""
        decoder, (row, column) = self.decoder, at
        noise = uniform_noise(rows.seeds[row], rows.at[row], column, TOKEN) if decoder.temperature > 0 else None
        entropy = self.confidence.entropy or decoder.entropy_bound is not None
        also = rows.slots[at] if decoder.credit else None

        def read(head: Head, hidden: Tensor) -> Candidates:
            return candidates(head, hidden, decoder.temperature, noise, entropy, decoder.top_p, self.excluded, also)

        return read

    def finish(self, rows: Canvases, now: Pass, found: Candidates) -> None:
        """Commit what the plan and the decoder's rules choose of the candidates."""
        decoder, at = self.decoder, now.at
        if decoder.stable:
            likely = found.tokens if found.likely is None else found.likely
            rows.run[at] = torch.where(rows.last[at] == likely, rows.run[at] + 1, 0)
            rows.last[at] = likely
        if decoder.credit:
            found = self.with_credit(rows, at, found)
        scores = torch.full(now.open.shape, -torch.inf, dtype=torch.float64, device=now.quota.device)
        scores[at] = self.score(rows, at, found, self.gammas[now.step])
        if self.resizes:
            scores.masked_fill_(~now.open, -torch.inf)
        self.commit(rows, at, found, self.choose(scores, now.quota, rows, at, found)[at])
        if self.resizes:
            self.resize(rows, at, found.tokens)
        rows.at += 1 if now.active is None else now.active
        rows.passes = [n + 1 for n in rows.passes] if now.active is None else rows.at.tolist()

    def step_quota_and_mask(self, rows: Canvases) -> tuple[Tensor, Tensor, Tensor]:
        """Every row's step in the plan (B,), how many tokens it must commit now (B,), and where it may (B, L) bool."""
        masked = rows.canvas == self.lm.mask_id
        if self.block is not None:
            return self._within_block(rows, masked, self.block)
        if self.static:
            step, quota = rows.at, self.commits[rows.at]
        else:
            committed = self.plan.length - masked.sum(1)
            step = torch.searchsorted(self.done, committed, right=True)
            quota = self.done[step] - committed
        open_ = masked & (rows.rank < self.horizon[step][:, None])
        return step, quota, open_ & rows.present if self.resizes else open_

    def _within_block(self, rows: Canvases, masked: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """``step_quota_and_mask`` where the model's own blocks are filled in turn: only a row's first unfinished one is open.

        The blocks are counted from the row's first token, so the prompt's last tokens may begin the first: they count as
        committed in it, as a template's do in theirs.
        """
        cell = self.cells(rows, block)
        current = torch.where(masked, cell // block, self.plan.length).amin(1)  # (B,)
        here = cell // block == current[:, None]
        filled = (here & ~masked).sum(1) + cell[:, 0] * (current == 0)
        planned = current.clamp(
            max=self.plan.length // block - 1
        )  # a block more, behind a prompt, is filled as the last
        committed = planned * block + filled
        step = torch.searchsorted(self.done, committed, right=True)
        reach = self.horizon[step] + (current - planned) * block
        return step, self.done[step] - committed, masked & here & (cell < reach[:, None])

    def cells(self, rows: Canvases, block: int) -> Tensor:
        """The canvas columns' places, counted from where the block of the first begins, (B, L) int64."""
        prompt = rows.visible[:, : rows.width].sum(1) % block
        return prompt[:, None] + torch.arange(rows.length, device=prompt.device)

    def cache_window(self, rows: Canvases, step: Tensor, open_: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The columns to compute in this pass (None: all), and which rows take part (None: all).

        Under a threshold, rows wait for each other at the end of a block, so that an approximate cache is made anew for all of
        them.
        """
        if self.decoder.cache == "none":
            return None, None
        if self.block is not None:
            return self._exact_window(rows, self.block, open_), None
        first = rows.passes[0] if self.static else int(step.min())  # all rows of a static plan are in one block
        start, horizon = self.plan.start[first], self.plan.horizon[first]
        active = None if self.static else self.horizon[step] == horizon
        if self.cached_horizon != horizon:
            self.cached_horizon, self.cache = horizon, KVCache(rows.ids.shape[1])
            return None, active
        stop = horizon if self.decoder.cache == "dual" else self.plan.length
        return torch.arange(rows.width + start, rows.width + stop, device=step.device)[None], active

    def _exact_window(self, rows: Canvases, block: int, open_: Tensor) -> Tensor:
        """Each row's columns from the first that the cache does not hold in its final form to the end of the current block.

        A block that was finished in the pass before is run once more, clean, beside the next one. Rows that are new get the
        prompt's whole blocks in a pass of their own.
        """
        cell, length = self.cells(rows, block), rows.ids.shape[1]
        current = torch.where(open_, cell // block, length).amin(1)
        start = rows.width + (current * block - cell[:, 0])  # columns of the current block, (B,)
        stop = (start + block).clamp(max=length)
        if self.cache is not None:
            self.cache.fit(length)
        known = 0 if self.cache is None else len(self.cache) // self.decoder.copies
        if known < len(rows):
            self._prefill(rows, known, start)
        width, end = torch.stack([(stop - length + rows.uncached).max(), stop.max()]).tolist()
        rows.uncached = length - start
        assert self.cache is not None
        self.cache.stop = end
        return (stop[:, None] - width + torch.arange(width, device=stop.device)).clamp(min=0)

    def _prefill(self, rows: Canvases, known: int, start: Tensor) -> None:
        """Put the rows from number ``known`` on into the cache, with the columns before their first block, ``start`` (B,)."""
        number = torch.arange(known, len(rows), device=start.device)
        new, start = rows.take(number), start[number]
        cache = KVCache(rows.ids.shape[1])
        width = max(1, int((start - (~new.visible).sum(1)).max()))
        window = (start[:, None] - width + torch.arange(width, device=start.device)).clamp(min=0)
        how: dict[str, Any] = {"prompt": rows.width, "w": self.decoder.cfg_scale, "cache": cache, "window": window}
        forward_with_guidance(self.lm, new.ids, new.attention_mask, number[:0], lambda *_: None, **how)
        if self.cache is None:
            self.cache = cache
        else:
            self.cache.join(cache, self.decoder.copies)
        rows.uncached[number] = rows.ids.shape[1] - start

    def with_credit(self, rows: Canvases, at: tuple[Tensor, Tensor], found: Candidates) -> Candidates:
        """The candidates of p(v) (1 + C_v)^alpha, normalized, and that as their score (CreditDecoding, arXiv 2510.06133).

        C fades by CREDIT_FADING in every pass, and that of the most likely token grows by p^CREDIT_POWER.
        """
        assert found.also is not None
        if (rows.slots[at] >= 0).all(-1).any():  # one more token may come
            rows.slots, rows.credit = rows.room(rows.slots.shape[2] + 1)
        slots, credit = rows.slots[at], rows.credit[at] * CREDIT_FADING
        logprob = F.pad(found.also, (0, slots.shape[1] - found.also.shape[1]), value=-torch.inf)
        own = slots == found.tokens[:, None]
        place = torch.where(own.any(1), own.int().argmax(1), (slots < 0).int().argmax(1))[:, None]
        slots.scatter_(1, place, found.tokens[:, None])
        logprob.scatter_(1, place, found.logprob.double()[:, None])
        credit.scatter_add_(1, place, (CREDIT_POWER * found.logprob.double()).exp()[:, None])
        rows.slots[at], rows.credit[at] = slots, credit
        weight = logprob.exp()
        raised = weight * (1 + credit) ** self.decoder.credit
        best = raised.argmax(1, keepdim=True)
        score = raised.gather(1, best) / (1 + (raised - weight).sum(1, keepdim=True))
        tokens, chosen = (x.gather(1, best)[:, 0] for x in (slots, logprob))
        return replace(found, tokens=tokens, logprob=chosen.to(found.logprob), score=score[:, 0])

    def score(self, rows: Canvases, at: tuple[Tensor, Tensor], found: Candidates, gammas: Tensor) -> Tensor:
        """The candidates' scores (N,) float64, after the EOS rule. gammas (B,): EOSER's factor of each row."""
        row, column = at
        noise = uniform_noise(rows.seeds[row], rows.at[row], column, ORDER) if self.confidence.noisy else None
        score = self.confidence.score(found, noise) if found.score is None else found.score
        score = score.nan_to_num(0.0)  # every pass commits; ``split`` refuses the result
        if self.decoder.eos == "reject":
            return reject_eos(score, found.tokens, self.rejected, gammas[row])
        if self.decoder.eos == "suppress":
            return suppress_eos(score, found.tokens, self.rejected)
        return score if found.end is None else exclude_eos(score, found.tokens, self.rejected, found.end)

    def choose(
        self, scores: Tensor, quota: Tensor, rows: Canvases, at: tuple[Tensor, Tensor], found: Candidates
    ) -> Tensor:
        """Which positions to commit: the ``quota`` (B,) best ones, and what threshold or entropy bound add. (B, L) -> bool."""
        decoder, best = self.decoder, scores.topk(self.max_commit, dim=1)
        chosen = self.rank < quota[:, None]
        if decoder.threshold is not None:
            reached = scores >= decoder.threshold
            if radius := decoder.leap_radius:
                near = F.max_pool1d(reached[:, None].double(), 2 * radius + 1, 1, radius)[:, 0] > 0
                reached = reached | (near & (scores >= decoder.leap_threshold))
            if decoder.stable:
                reached &= rows.run >= decoder.stable
            chosen = chosen | reached.gather(1, best.indices)
        if decoder.entropy_bound is not None:
            assert found.entropy is not None
            entropy = torch.zeros_like(scores)
            entropy[at] = found.entropy
            ordered = entropy.gather(1, best.indices)
            chosen = chosen | (ordered.cumsum(1) - ordered.cummax(1).values <= decoder.entropy_bound)
        chosen &= best.values > -torch.inf
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best.indices, chosen)

    def commit(self, rows: Canvases, at: tuple[Tensor, Tensor], found: Candidates, chosen: Tensor) -> None:
        """Write the chosen (N,) bool of the candidates; where none is chosen, what is there is written back."""
        row, column = at
        for target, value in ((rows.canvas, found.tokens), (rows.logprob, found.logprob), (rows.step, rows.at[row])):
            target[row, column] = torch.where(chosen, value.to(target.dtype), target[row, column])

    def unfilled(self, rows: Canvases) -> Tensor:
        """What is still masked of the canvases as long as they are now, (B, L) bool."""
        masked = rows.canvas == self.lm.mask_id
        return masked & rows.present if self.resizes else masked

    def resize(self, rows: Canvases, at: tuple[Tensor, Tensor], tokens: Tensor) -> None:
        """Let canvases grow or shrink by the share of end tokens among their candidates (rho-EOS, arXiv 2601.22527).

        The change doubles with every tenth that the share is further outside of the band, 8 times at most. What is committed
        stays (the released code may cut it off).
        """
        ends, looked = torch.zeros(2, len(rows), dtype=torch.float64, device=tokens.device)
        ends.index_add_(0, at[0], torch.isin(tokens, self.rejected).double())
        share = ends / looked.index_add_(0, at[0], torch.ones_like(tokens, dtype=torch.float64)).clamp(min=1)
        few, many = FEW_ENDS - share, share - MANY_ENDS
        tenths = ((torch.maximum(few, many) + 1e-12) / 0.1).ceil()
        change = (LENGTH_STEP * 2 ** (tenths - 1).clamp(0, 3)).long()
        length = rows.present.sum(1) + torch.where(few > 0, change, torch.where(many > 0, -change, 0))
        kept = ((rows.rank + 1) * (rows.canvas != self.lm.mask_id)).amax(1)
        wanted = rows.rank < torch.maximum(length, kept)[:, None]
        rows.present.copy_(torch.where((rows.at < LENGTH_PASSES)[:, None], wanted, rows.present))

    def finished(self, rows: Canvases) -> list[int]:
        """Rows that are done: committed whole, or with early stop up to their first end token."""
        if self.static and not self.early_stop:
            return [i for i, n in enumerate(rows.passes) if n == self.plan.steps]
        unfinished = self.unfilled(rows)
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
        done = rows.take(torch.tensor(leave, device=device))
        if self.resizes:  # their texts end where the canvases do
            done.canvas.masked_fill_(~done.present, self.lm.eos_id)
        return rows.take(stay), done


def read_together(lm: MaskedLM, parts: Sequence[tuple[Canvases, Pass]]) -> list[Candidates]:
    """``DecodingLoop.read`` for the rows of several loops in one forward pass: none has a cache or guidance."""
    width = max(rows.ids.shape[1] for rows, _ in parts)
    ids = cat_left_padded([rows.ids for rows, _ in parts], lm.pad_id)
    visible = cat_left_padded([rows.visible for rows, _ in parts])
    positions, above = [], 0
    for rows, now in parts:
        row, column = now.at
        positions.append((above + row + 1) * width - rows.length + column)
        above += len(rows)
    counts = [len(p) for p in positions]

    def read(head: Head, hidden: Tensor) -> list[Candidates]:
        return [now.read(head, h) for (_, now), h in zip(parts, hidden.split(counts), strict=True)]

    padded = any(rows.padded or rows.ids.shape[1] < width for rows, _ in parts)
    return lm.forward_head(ids, visible if padded else None, torch.cat(positions), read)
