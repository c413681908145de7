"""What the backbones share: the way of a row through a trunk, a cache of keys and values, the head at chosen positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput


class KVCache:
    """Keys (rotated) and values of every layer, (B, H, T, D) each, from the pass that filled it.

    An approximation in a bidirectional model: what is outside the window would look different after every commit
    (Fast-dLLM, arXiv 2505.22618).
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.start = 0  # the column where the current pass writes its keys and values

    def update(self, k: Tensor, v: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put a window's keys and values (B, H, W, D) into a layer; returns the layer's. (As transformers calls its caches.)"""
        if layer == len(self.layers):
            self.layers.append((k, v.contiguous()))
            return k, v
        for whole, part in zip(self.layers[layer], (k, v), strict=True):
            whole[:, :, self.start : self.start + part.shape[2]] = part
        return self.layers[layer]

    def take(self, rows: Tensor) -> None:
        """Keep these rows, (n,) int64."""
        self.layers = [(k[rows.to(k.device)], v[rows.to(v.device)]) for k, v in self.layers]


class Trunk:
    """Token ids to final hidden states; every token sees every token that is not padding."""

    config: Any
    get_input_embeddings: Callable[[], nn.Module]

    def run_layers(self, x: Tensor, position_ids: Tensor, visible: Tensor | None, cache: KVCache | None) -> Tensor:
        """The layers and the last norm: x (B, W, d) -> (B, W, d). position_ids (B, W) or (1, W); visible (B, 1, 1, T)."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        window: tuple[int, int] | None = None,
    ) -> BaseModelOutput:
        """Final hidden states (B, T, d), or (B, W, d) of a window; the arguments are those of ``HeadAtPositions.forward``."""
        start, stop = window or (0, input_ids.shape[1])
        if attention_mask is None:
            position_ids, visible = torch.arange(input_ids.shape[1], device=input_ids.device)[None], None
        else:  # every row counts its own unpadded tokens from 0, so left or right padding does not shift them
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            visible = attention_mask.bool()[:, None, None, :]
        x = self.get_input_embeddings()(input_ids[:, start:stop])
        if cache is not None:
            cache.start = start
        return BaseModelOutput(last_hidden_state=self.run_layers(x, position_ids[:, start:stop], visible, cache))


class HeadAtPositions:
    """The forward pass of a trunk with its head, for a PreTrainedModel whose ``model`` is the trunk."""

    model: Any
    get_output_embeddings: Callable[[], nn.Module]
    shifted = False
    """Whether the hidden state of a token predicts the *next* one (Dream, as inherited from its autoregressive parent).
    Callers never see it: they ask for logits of a position and get that position's."""

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
        positions: Tensor | None = None,
        fn: Callable[[Tensor, nn.Module, Callable[[Tensor], Tensor]], Any] | None = None,
        cache: KVCache | None = None,
        window: tuple[int, int] | None = None,
        **_: Any,
    ) -> MaskedLMOutput:
        """Logits, at all positions or only at the chosen ones.

        Args:
            input_ids: (B, T) int64. attention_mask: (B, T), zero or False marks padding; None means no padding.
            positions: where to apply the head: a bool mask (B, T), or int64 indexes (N,) into the flattened rows; either
                gives logits (N, V), None gives (B, T, V).
            fn: called with (hidden states at ``positions``, output embedding, head) in place of the head; its result is
                returned as the logits. (Inside the forward pass, where a sharded model has its weights together.)
            cache: keys and values to fill (a new one), or to use with a window.
            window: columns [start, stop) to compute, all others come from the cache; T is then the window's width for
                ``positions`` and the result.
        """
        start, stop = window or (0, input_ids.shape[1])
        first = max(start - 1, 0) if self.shifted else start
        hidden = self.model(input_ids, attention_mask, cache, window and (first, stop)).last_hidden_state
        if self.shifted:
            positions = shifted_positions(positions, attention_mask, input_ids, start, stop, first)
        if positions is not None:
            where = positions.to(hidden.device)  # another one where the model is spread over devices
            hidden = hidden[where] if where.dtype == torch.bool else hidden.flatten(0, 1)[where]
        output = self.get_output_embeddings()
        hidden = hidden.to(hidden.device if output.weight.is_meta else output.weight.device)  # type: ignore[union-attr, arg-type]
        return MaskedLMOutput(logits=self.head(hidden) if fn is None else fn(hidden, output, self.head))


def shifted_positions(
    positions: Tensor | None, attention_mask: Tensor | None, input_ids: Tensor, start: int, stop: int, first: int
) -> Tensor:
    """Where the hidden states are that predict ``positions`` of the window [start, stop), in columns [first, stop).

    The token before, or the token itself where there is none (the first of a row, whatever padding is before it).
    """
    rows, width = len(input_ids), stop - start
    if positions is None:
        flat = torch.arange(rows * width, device=input_ids.device)
    else:
        flat = positions.flatten().nonzero()[:, 0] if positions.dtype == torch.bool else positions
    row, column = flat // width, flat % width + start
    before = (column - 1).clamp(min=0)
    if attention_mask is not None:
        before = torch.where(attention_mask.bool()[row, before], before, column)
    found = row * (stop - first) + before - first
    return found.view(rows, width) if positions is None else found
