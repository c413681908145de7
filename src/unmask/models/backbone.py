"""What the backbones share: the way of a row through a trunk, a cache of keys and values, the head at chosen positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

from unmask.models.head import run_gathered

FLEX = "flex_attention_in_blocks"
"""The attention whose [noisy | clean] passes go through FlexAttention, which skips the blocks of columns that no token sees;
all others are ``sdpa``'s. Differentiable on GPUs only."""
Visible = Tensor | BlockMask | None
"""Which keys a query sees: bool (B or 1, 1, queries, keys), the same as FlexAttention's rule, or None where it is all."""


def _flex_or_sdpa(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, visible: Any, **how: Any) -> tuple[Tensor, Any]:
    run: Any = flex_attention_forward if isinstance(visible, BlockMask) else sdpa_attention_forward
    return run(module, q, k, v, visible, **how)


AttentionInterface.register(FLEX, _flex_or_sdpa)


class KVCache:
    """Keys (rotated) and values of every layer, (B, H, T, D) each, for whole rows.

    Passes write the columns of their window and read all others. In a model with full attention that is an approximation: what
    is outside the window would look different after every commit (Fast-dLLM, arXiv 2505.22618). In a block-causal one it is
    exact for blocks that are finished.
    """

    def __init__(self, length: int) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.length = length  # of the rows, T
        self.window: Tensor | None = None  # the columns that the current pass computes, (1 or B, W); None: all
        self.stop: int | None = None  # columns from here on are not read

    def update(self, k: Tensor, v: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put a window's keys and values (B, H, W, D) into a layer; returns the layer's. (As transformers calls its caches.)"""
        if layer == len(self.layers):
            if self.window is None:
                self.layers.append((k, v.contiguous()))
                return k, v  # all columns
            shape = (*k.shape[:2], self.length, k.shape[3])
            self.layers.append((k.new_zeros(shape), v.new_zeros(shape)))
        assert self.window is not None
        rows = torch.arange(len(k), device=k.device)[:, None]
        columns = self.window.to(k.device).expand(len(k), -1)
        for whole, part in zip(self.layers[layer], (k, v), strict=True):
            whole[rows, :, columns] = part.transpose(1, 2)
        k, v = self.layers[layer]
        return k[:, :, : self.stop], v[:, :, : self.stop]

    def __len__(self) -> int:
        return len(self.layers[0][0]) if self.layers else 0

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.layers = [(fn(k), fn(v)) for k, v in self.layers]

    def take(self, rows: Tensor) -> None:
        """Keep these rows, (n,) int64."""
        self._map(lambda x: x[rows.to(x.device)])

    def fit(self, length: int) -> None:
        """Rows of ``length`` columns from here on: their left side gets more padding, or loses it."""
        if length != self.length:
            self._map(lambda x: F.pad(x, (0, 0, length - self.length, 0)))
            self.length = length

    def join(self, other: KVCache, copies: int) -> None:
        """Put another cache's rows below these; with several copies of all rows (guidance), below those of each copy."""
        pairs = zip(self.layers, other.layers, strict=True)
        self.layers = [(_join(k, more_k, copies), _join(v, more_v, copies)) for (k, v), (more_k, more_v) in pairs]


def _join(upper: Tensor, lower: Tensor, copies: int) -> Tensor:
    parts = zip(upper.chunk(copies), lower.chunk(copies), strict=True)
    return torch.cat([part for pair in parts for part in pair])


class Trunk:
    """Token ids to final hidden states.

    Every token sees every token that is not padding; where the configuration has a ``block_length`` B (block diffusion), those
    of its own block and of the blocks before it. Blocks of B tokens are counted from a row's first token.
    """

    config: Any
    get_input_embeddings: Callable[[], nn.Module]

    def run_layers(self, x: Tensor, position_ids: Tensor, visible: Visible, cache: KVCache | None) -> Tensor:
        """The layers and the last norm: x (B, W, d) -> (B, W, d).

        position_ids (B, W) or (1, W); visible: bool, broadcast to (B, 1, W, T), or ``FLEX``'s rule; None: everything is.
        """
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        window: Tensor | None = None,
        clean: Tensor | None = None,
    ) -> BaseModelOutput:
        """Final hidden states (B, T, d), or (B, W, d) of a window; the arguments are those of ``HeadAtPositions.forward``."""
        rows = input_ids if clean is None else clean
        real = None if attention_mask is None else attention_mask.bool()
        if real is None:
            position_ids = torch.arange(rows.shape[1], device=rows.device)[None]
        else:  # every row counts its own unpadded tokens from 0, so left or right padding does not shift them
            position_ids = (real.long().cumsum(-1) - 1).clamp(min=0)
        visible: Visible = None if real is None else real[:, None, None, :]
        length = getattr(self.config, "block_length", None)
        if length is not None:
            block = position_ids // length
            if real is not None:  # no token sees padding; it sees all others, so that there is something
                block = block.masked_fill(~real, rows.shape[1])
            if clean is None:
                visible = _block_causal(block, real, window)
            else:
                visible = _behind_clean(block, real, input_ids.shape[1], self.config._attn_implementation == FLEX)
        if clean is not None:
            noisy = input_ids.shape[1]
            input_ids = torch.cat([input_ids, clean], 1)
            position_ids = torch.cat([position_ids[:, -noisy:], position_ids], 1)
        elif window is not None:
            input_ids, position_ids = _columns(input_ids, window), _columns(position_ids, window)
        if cache is not None:
            cache.window = window
            visible = visible[..., : cache.stop] if isinstance(visible, Tensor) else None
        hidden = self.run_layers(self.get_input_embeddings()(input_ids), position_ids, visible, cache)
        return BaseModelOutput(last_hidden_state=hidden)


def _columns(rows: Tensor, window: Tensor) -> Tensor:
    """The columns of a window, (1 or B, W), of rows (1 or B, T)."""
    count = max(len(rows), len(window))
    return rows.expand(count, -1).gather(1, window.expand(count, -1))


def _block_causal(block: Tensor, real: Tensor | None, window: Tensor | None) -> Tensor:
    """What each token sees where attention is block-causal: bool, (B, 1, queries, keys).

    block (B or 1, T): every column's block; real (B, T): False is padding, None where there is none. Queries are the columns
    of ``window`` (None: all), keys all columns.
    """
    query = block if window is None else _columns(block, window)
    seen = query[:, None, :, None] >= block[:, None, None, :]
    return seen if real is None else seen & real[:, None, None, :]


def _behind_clean(block: Tensor, real: Tensor | None, noisy: int, flex: bool) -> Tensor | BlockMask:
    """``_block_causal`` where queries and keys are the last ``noisy`` columns of a noisy copy of the rows, then the rows.

    A noisy token sees the noisy ones of its own block, and clean ones of the blocks before it. With ``flex``, the same as a
    rule for FlexAttention instead of a tensor.
    """
    block = torch.cat([block[:, -noisy:], block], 1)
    real = None if real is None else torch.cat([real[:, -noisy:], real], 1)
    clean = torch.arange(block.shape[1], device=block.device) >= noisy

    def seen(query: Tensor, key: Tensor, clean_query: Tensor, clean_key: Tensor) -> Tensor:
        before = clean_key & ((query > key) | clean_query & (query == key))
        return before | ~clean_key & ~clean_query & (query == key)

    def rule(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = torch.zeros_like(row) if len(block) == 1 else row
        found = seen(block[row, query], block[row, key], clean[query], clean[key])
        return found if real is None else found & real[row, key]

    if flex:
        rows, columns = None if len(block) == 1 else len(block), block.shape[1]
        return create_block_mask(rule, rows, None, columns, columns, device=block.device)
    dense = seen(block[:, None, :, None], block[:, None, None, :], clean[:, None], clean)
    return dense if real is None else dense & real[:, None, None, :]


class HeadAtPositions:
    """The forward pass of a trunk with its head, for a PreTrainedModel whose ``model`` is the trunk."""

    model: Any
    config: Any
    get_output_embeddings: Callable[[], nn.Module]
    shifted = False
    """Whether the hidden state of a token predicts the *next* one (Dream, as inherited from its autoregressive parent).
    Callers never see it: they ask for logits of a position and get that position's."""

    def untie(self) -> None:
        """Give the head weights of its own, equal to those it uses now; nothing where it has them."""
        raise NotImplementedError

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of any batch of hidden states. (..., d) -> (..., vocabulary)."""
        output: Any = self.get_output_embeddings()
        kind: Any = type(output)
        run = kind.forward if isinstance(output, FSDPModule) else kind.__call__  # FSDP's hooks run in ``run_gathered``
        return run(output, hidden)  # type: ignore[no-any-return]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        fn: Callable[[Tensor, nn.Module, Callable[[Tensor], Tensor]], Any] | None = None,
        cache: KVCache | None = None,
        window: Tensor | None = None,
        clean: Tensor | None = None,
        **_: Any,
    ) -> MaskedLMOutput:
        """Logits, at all positions or only at the chosen ones.

        Args:
            input_ids: (B, T) int64. attention_mask: (B, T), zero or False marks padding; None means no padding.
            positions: where to apply the head: a bool mask (B, T), or int64 indexes (N,) into the flattened rows; either
                gives logits (N, V), None gives (B, T, V).
            fn: called with (hidden states at ``positions``, output embedding, head) in place of the head; its result is
                returned as the logits. (Inside the head's forward pass, where FSDP has its weight together.)
            cache: keys and values to fill (a new one), or to use with a window.
            window: (1 or B, W) int64, the columns to compute, side by side; all others come from the cache. T is then the
                window's width for ``positions`` and the result.
            clean: block-causal models only: (B, T) int64, whole rows, of which ``input_ids`` (B, W) are the last W columns in
                some earlier state. Each block of these is run behind the clean blocks before it, all in one pass; positions
                and result count in ``input_ids``, attention_mask in ``clean``.
        """
        wide = window
        if self.shifted and window is not None:
            wide = torch.cat([(window[:, :1] - 1).clamp(min=0), window], 1)
        hidden = self.model(input_ids, attention_mask, cache, wide, clean).last_hidden_state
        if self.shifted or clean is not None:
            positions = self.hidden_positions(positions, input_ids, attention_mask, window, clean)
        if positions is not None:
            where = positions.to(hidden.device)  # another one where the model is spread over devices
            hidden = hidden[where] if where.dtype == torch.bool else hidden.flatten(0, 1)[where]
        output = self.get_output_embeddings()
        hidden = hidden.to(hidden.device if output.weight.is_meta else output.weight.device)  # type: ignore[union-attr, arg-type]

        def read(hidden: Tensor) -> Any:
            return self.head(hidden) if fn is None else fn(hidden, output, self.head)

        return MaskedLMOutput(logits=run_gathered(output, read, hidden))

    def hidden_positions(
        self,
        positions: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        window: Tensor | None,
        clean: Tensor | None,
    ) -> Tensor:
        """Where the trunk's hidden states are that predict ``positions``, as indexes into its flattened result.

        In a shifted model, the token before's, or the token's own where there is none (the first of a row, whatever padding is
        before it). Of the first token of a noisy block, the clean token before is meant: with its block that one is finished.
        """
        rows, width = len(input_ids), input_ids.shape[1] if window is None else window.shape[1]
        if positions is None:
            flat = torch.arange(rows * width, device=input_ids.device)
        else:
            flat = positions.flatten().nonzero()[:, 0] if positions.dtype == torch.bool else positions
        row, place = flat // width, flat % width
        found, total = place, width
        if clean is not None:
            total += clean.shape[1]
        if self.shifted:
            if window is None:
                column = place if clean is None else place + clean.shape[1] - width
            else:  # its hidden states begin one column earlier
                column, found, total = window.expand(rows, -1)[row, place], place + 1, total + 1
            before = (column - 1).clamp(min=0)
            visible = (
                torch.ones_like(input_ids if clean is None else clean) if attention_mask is None else attention_mask
            )
            number = visible.long().cumsum(1)[row, column] - 1  # of the token in its row
            found = torch.where((column > 0) & visible.bool()[row, before], found - 1, found)
            if clean is not None:
                found = torch.where((number > 0) & (number % self.config.block_length == 0), width + before, found)
        at = row * total + found
        return at.view(rows, width) if positions is None else at
