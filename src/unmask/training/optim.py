"""Muon for the weight matrices and AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon on 2-D weights and AdamW on the rest (and on the parameters whose ``id`` is in ``embedding``).

    Muon's update is scaled to AdamW's root-mean-square, so one rate and one schedule serve both.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, embedding: set[int]) -> None:
        trained = [p for p in parameters if p.requires_grad]
        matrices = [p for p in trained if p.ndim == 2 and id(p) not in embedding]
        rest = [p for p in trained if p.ndim != 2 or id(p) in embedding]
        self.parts: list[torch.optim.Optimizer] = []  # an adapter may have nothing but matrices
        if matrices:
            muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self.parts.append(muon)
        if rest:
            self.parts.append(torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0))
        super().__init__([*matrices, *rest], {"lr": lr})
        self._share_groups()

    def _share_groups(self) -> None:
        """The schedule writes to ``param_groups``; they are the very dicts that the parts read."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()
