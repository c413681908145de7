"""Canvases: the rows that are being decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.decoding.trajectory import Trajectory, cat_left_padded

# Tensors that do not grow with the prompt.
_OTHERS = ("rank", "step", "logprob", "seeds", "at", "uncached", "last", "run")
_SLOTS = ("slots", "credit")  # tensors whose last dimension grows


@dataclass
class Canvases:
    """A batch of rows, which may be at different steps, leave, and be joined by others."""

    ids: Tensor  # (B, P+L) int64, prompt and canvas
    visible: Tensor  # (B, P+L) bool, False = padding, or behind the end of a canvas whose length changes
    rank: Tensor  # (B, L) int64, how many positions to fill are before each; a plan's blocks count these
    step: Tensor  # (B, L) int16, as in Trajectory
    logprob: Tensor  # (B, L) float32, as in Trajectory
    seeds: Tensor  # (B,) int64
    at: Tensor  # (B,) int64, the passes that each row has taken
    uncached: Tensor  # (B,) int64, columns at a row's end that an exact cache does not hold in their final form
    last: Tensor  # (B, L) int64, the most likely token of the pass before, -1 where there was none
    run: Tensor  # (B, L) int64, in how many passes before the last one it was the same
    slots: Tensor  # (B, L, S) int64, tokens that have credit, -1 for none
    credit: Tensor  # (B, L, S) float64
    numbers: list[int]  # the caller's number of each row
    passes: list[int]  # ``at``, readable without waiting for the device
    padded: bool  # whether any prompt is

    @classmethod
    def new(
        cls, prompt: Tensor, prompt_mask: Tensor, canvas: Tensor, mask_id: int, seeds: Tensor, numbers: Sequence[int]
    ) -> Canvases:
        """Canvases (B, L), to be filled where they hold the mask, behind prompts (B, P)."""
        return cls(
            ids=torch.cat([prompt, canvas], 1),
            visible=torch.cat([prompt_mask, torch.ones_like(canvas, dtype=torch.bool)], 1),
            rank=(canvas == mask_id).cumsum(1) - 1,
            step=torch.full_like(canvas, -1, dtype=torch.int16),
            logprob=torch.zeros_like(canvas, dtype=torch.float32),
            seeds=seeds,
            at=torch.zeros_like(seeds),
            uncached=torch.full_like(seeds, prompt.shape[1] + canvas.shape[1]),
            last=torch.full_like(canvas, -1),
            run=torch.zeros_like(canvas),
            slots=canvas.new_zeros(*canvas.shape, 0),
            credit=canvas.new_zeros(*canvas.shape, 0, dtype=torch.float64),
            numbers=list(numbers),
            passes=[0] * len(prompt),
            padded=not bool(prompt_mask.all()),
        )

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def length(self) -> int:
        """Columns of the canvases, L."""
        return self.step.shape[1]

    @property
    def width(self) -> int:
        """Columns of the prompts, P."""
        return self.ids.shape[1] - self.length

    @property
    def canvas(self) -> Tensor:
        """The canvas, (B, L): a view into ``ids``."""
        return self.ids[:, self.width :]

    @property
    def present(self) -> Tensor:
        """Which columns the canvases have now, (B, L) bool, where their length changes: a view into ``visible``."""
        return self.visible[:, self.width :]

    @property
    def attention_mask(self) -> Tensor | None:
        return self.visible if self.padded else None

    def take(self, rows: Tensor) -> Canvases:
        """Some rows, (n,) int64."""
        chosen: dict[str, Any] = {k: getattr(self, k)[rows] for k in ("ids", "visible", *_OTHERS, *_SLOTS)}
        index = rows.tolist()
        numbers, passes = ([values[i] for i in index] for values in (self.numbers, self.passes))
        return replace(self, **chosen, numbers=numbers, passes=passes)

    def join(self, other: Canvases, pad_id: int) -> Canvases:
        """These rows above others; the narrower prompts get more padding."""
        joined: dict[str, Any] = {k: torch.cat([getattr(self, k), getattr(other, k)]) for k in _OTHERS}
        joined |= {k: getattr(self, k) + getattr(other, k) for k in ("numbers", "passes")}
        width = max(self.slots.shape[2], other.slots.shape[2])
        joined["slots"], joined["credit"] = (
            torch.cat(x) for x in zip(self.room(width), other.room(width), strict=True)
        )
        ids = cat_left_padded([self.ids, other.ids], pad_id)
        visible = cat_left_padded([self.visible, other.visible])
        padded = self.padded or other.padded or self.width != other.width
        return Canvases(ids, visible, **joined, padded=padded)

    def room(self, width: int) -> tuple[Tensor, Tensor]:
        """Slots and credit with room for ``width`` tokens a position."""
        more = (0, width - self.slots.shape[2])
        return F.pad(self.slots, more, value=-1), F.pad(self.credit, more)

    def drop_padding(self) -> Canvases:
        """Without the columns that are padding in every row."""
        if not (spare := int(self.visible.any(0).int().argmax())):
            return self
        ids, visible = self.ids[:, spare:].contiguous(), self.visible[:, spare:].contiguous()
        return replace(self, ids=ids, visible=visible, padded=not bool(visible.all()))

    def trajectory(self, mask_id: int, decoder: dict[str, Any]) -> Trajectory:
        prompt, mask = self.ids[:, : self.width], self.visible[:, : self.width]
        return Trajectory(prompt, mask, self.canvas, self.step, self.logprob, mask_id, decoder)
