"""Trajectory: the whole history of a decode in three tensors.

A committed token never changes, so the canvas before any step follows from what was committed and when:
``state(s) = where(step < s, tokens, MASK)``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from unmask.errors import UserError
from unmask.io.files import atomic_write
from unmask.io.schema import AMOUNT, check

_TENSORS = {
    "prompt": torch.int64,
    "prompt_mask": torch.bool,
    "tokens": torch.int64,
    "step": torch.int16,
    "logprob": torch.float32,
}


def cat_left_padded(parts: Sequence[Tensor], fill: int = 0) -> Tensor:
    """(B, W) each, concatenated along the batch, the narrower ones with ``fill`` on their left."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (width - part.shape[1], 0), value=fill) for part in parts])


@dataclass(frozen=True)
class Trajectory:
    """A batch of decoded canvases.

    Attributes:
        prompt: (B, P) int64, left-padded. prompt_mask: (B, P) bool, False = padding.
        tokens: (B, L) int64, the finished canvas. step: (B, L) int16, the step that committed each token; -1 where
            none did: a template's own tokens, and masks that are left in a row that was stopped early.
        logprob: (B, L) float32, of each token in the state that committed it; nats, temperature 1, CFG, no EOSER factor.
        mask_id: the mask token. decoder: the Decoder's config.
    """

    prompt: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    step: Tensor
    logprob: Tensor
    mask_id: int
    decoder: dict[str, Any]

    @property
    def steps(self) -> int:
        """Steps taken by the row that took most."""
        return int(self.step.max()) + 1

    @property
    def nfe(self) -> Tensor:
        """Forward passes of each row, (B,) int64; guidance counts twice."""
        return (self.step.amax(1).long() + 1) * (2 if self.decoder["cfg_scale"] > 0 else 1)

    def state(self, s: int) -> Tensor:
        """The canvas before step ``s``, (B, L) int64; ``state(0)`` is all mask, ``state(steps)`` is ``tokens``."""
        return torch.where(self.step < s, self.tokens, self.mask_id)

    def committed(self, s: int) -> Tensor:
        """Where step ``s`` committed, (B, L) bool. Over all steps these partition what was committed."""
        return self.step == s

    def by_block(self, block: int | None) -> Trajectory:
        """With each block's steps counted from its own first; ``block``: tokens of a block-causal model's own (None: as it is).

        ``state(s)`` then holds every block before its step ``s``. Behind clean blocks these are independent of each other, so
        that one forward pass scores step ``s`` of all blocks.
        """
        if block is None:
            return self
        place = (
            torch.arange(self.step.shape[1], device=self.step.device) + self.prompt_mask.sum(1, keepdim=True) % block
        )
        number = place // block
        step = self.step.long()
        first = torch.full_like(step, self.steps).scatter_reduce_(
            1, number, step.masked_fill(step < 0, self.steps), "amin"
        )
        return replace(self, step=torch.where(step < 0, step, step - first.gather(1, number)).to(self.step.dtype))

    @property
    def visible(self) -> Tensor:
        """Which of prompt and canvas are not padding, (B, P+L) bool."""
        return torch.cat([self.prompt_mask, torch.ones_like(self.tokens, dtype=torch.bool)], dim=1)

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Trajectory:
        return replace(self, **{k: fn(getattr(self, k)) for k in _TENSORS})  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> Trajectory:
        """The same on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def take(self, rows: Tensor) -> Trajectory:
        """Some rows, (n,) int64."""
        return self._map(lambda tensor: tensor[rows.to(tensor.device)])

    @staticmethod
    def cat(parts: Sequence[Trajectory]) -> Trajectory:
        """Parts concatenated along the batch; narrower prompts get more padding."""
        joined: dict[str, Any] = {}
        for name in _TENSORS:
            cat = cat_left_padded if name.startswith("prompt") else torch.cat
            joined[name] = cat([getattr(part, name) for part in parts])
        return replace(parts[0], **joined)

    def save(self, path: str | Path) -> None:
        """Write as safetensors, whole or not at all."""
        meta = {"mask_id": str(self.mask_id), "decoder": json.dumps(self.decoder)}
        with atomic_write(Path(path)) as partial:
            save_file({k: getattr(self, k).cpu().contiguous() for k in _TENSORS}, partial, metadata=meta)

    @classmethod
    def load(cls, path: str | Path) -> Trajectory:
        """Read what ``save`` wrote. Raises UserError where the file is missing or is no trajectory."""
        try:
            with safe_open(path, "pt") as file:
                meta = file.metadata() or {}
                tensors = {k: file.get_tensor(k) for k in _TENSORS}
            decoder = json.loads(meta["decoder"])
            check(decoder, {"cfg_scale": AMOUNT})
            rows, width, length = len(tensors["prompt"]), tensors["prompt"].shape[-1], tensors["tokens"].shape[-1]
            for name, kind in _TENSORS.items():
                size = (rows, width if name.startswith("prompt") else length)
                if tensors[name].dtype != kind or tensors[name].shape != size:
                    raise ValueError(f"{name} is {tensors[name].dtype} of {tuple(tensors[name].shape)}")
            return cls(**tensors, mask_id=int(meta["mask_id"]), decoder=decoder)
        except (OSError, SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
            fault = f"{path} is not a saved trajectory ({error})"
            raise UserError(f"{fault}: choose a file that Trajectory.save wrote") from None
