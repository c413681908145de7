"""What the backbones share: positions and padding of a row, a cache of keys and values, the head at chosen positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput


class KVCache:
    """Keys (rotated) and values of every layer, (B, H, T, D) each, from the pass that filled it.

    An approximation in a bidirectional model: what stands outside the window would look different after every commit
    (Fast-dLLM, arXiv 2505.22618).
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def update(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put a window's keys and values (B, H, W, D) at column ``start`` of a layer; returns the layer's."""
        if layer == len(self.layers):
            self.layers.append((k, v.contiguous()))
            return k, v
        for whole, part in zip(self.layers[layer], (k, v), strict=True):
            whole[:, :, start : start + part.shape[2]] = part
        return self.layers[layer]

    def take(self, rows: Tensor) -> None:
        """Keep these rows, (n,) int64."""
        self.layers = [(k[rows.to(k.device)], v[rows.to(v.device)]) for k, v in self.layers]


def placed(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Rotary positions (B, T) or (1, T), and which keys may be seen, (B, 1, 1, T) bool or None for all.

    Every row counts its own unpadded tokens from 0, so left or right padding does not shift them.
    """
    if position_ids is None:
        if attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        else:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return position_ids, None if attention_mask is None else attention_mask.bool()[:, None, None, :]


class HeadAtPositions:
    """The forward pass of a trunk with its head, for a PreTrainedModel whose ``model`` is the trunk."""

    model: Any
    shifted = False
    """Whether the hidden state of a token predicts the *next* one (Dream, as inherited from its autoregressive parent).
    Callers never see it: they ask for logits of a position and get that position's."""

    def get_output_embeddings(self) -> nn.Module:
        raise NotImplementedError

    def untie(self) -> None:
        """Give the head weights of its own, equal to those it uses now; nothing where it has them."""
        raise NotImplementedError

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of any batch of hidden states. (..., d) -> (..., vocabulary)."""
        output: Tensor = self.get_output_embeddings()(hidden)  # called as a module, so that FSDP gathers its weight
        return output

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        positions: Tensor | None = None,
        reduce: Callable[[Tensor, nn.Module, Callable[[Tensor], Tensor]], Any] | None = None,
        cache: KVCache | None = None,
        window: tuple[int, int] | None = None,
        **_: Any,
    ) -> MaskedLMOutput:
        """Logits, at all positions or only at the chosen ones.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T), zero or False marks padding; None means no padding.
            position_ids: (B, T) rotary positions; by default each row counts its own unpadded tokens from 0.
            positions: where to apply the head: a bool mask (B, T), or int64 indexes (N,) into the flattened rows; either
                gives logits (N, V), None gives (B, T, V).
            reduce: called with (hidden states at ``positions``, output embedding, head) in place of the head; what it
                returns stands for the logits. (Inside the forward pass, where a sharded model has its weights together.)
            cache: keys and values to fill (a new one), or to use with a window.
            window: columns [start, stop) to compute; T is then the window's width for ``positions`` and the result.
        """
        start, stop = window or (0, input_ids.shape[1])
        first = max(start - 1, 0) if self.shifted else start
        inside = None if window is None else (first, stop)
        hidden = self.model(input_ids, attention_mask, position_ids, cache, inside).last_hidden_state
        if self.shifted:
            positions = _sources(positions, attention_mask, input_ids.shape, start, stop, first)
        if positions is not None:
            where = positions.to(hidden.device)  # another one where the model is spread over devices
            hidden = hidden[where] if where.dtype == torch.bool else hidden.flatten(0, 1)[where]
        output = self.get_output_embeddings()
        hidden = hidden.to(hidden.device if output.weight.is_meta else output.weight.device)  # type: ignore[union-attr, arg-type]
        return MaskedLMOutput(logits=self.head(hidden) if reduce is None else reduce(hidden, output, self.head))


def _sources(
    positions: Tensor | None, attention_mask: Tensor | None, shape: torch.Size, start: int, stop: int, first: int
) -> Tensor:
    """Where the hidden states stand that predict ``positions`` of the window [start, stop), in columns [first, stop).

    The token before, or the token itself where there is none (the first of a row, whatever padding stands before it).
    """
    if positions is None or positions.dtype == torch.bool:
        chosen = torch.ones(shape[0], stop - start, dtype=torch.bool) if positions is None else positions
        row, column = chosen.nonzero(as_tuple=True)
    else:
        row, column = positions // (stop - start), positions % (stop - start)
    column = column + start
    before = (column - 1).clamp(min=0)
    if attention_mask is not None:
        row = row.to(attention_mask.device)
        before = torch.where(
            attention_mask.bool()[row, before.to(row.device)], before.to(row.device), column.to(row.device)
        )
    found = row * (stop - first) + before.to(row.device) - first
    return found.view(shape[0], stop - start) if positions is None else found
