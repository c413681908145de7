"""Prompts in, trajectories out: one batch, or any number of prompts through a batch that stays full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from unmask.decoding.canvas import Canvases
from unmask.decoding.decoder import APPROXIMATE, Decoder
from unmask.decoding.loop import DecodingLoop
from unmask.decoding.trajectory import Trajectory
from unmask.errors import UserError
from unmask.models.masked_lm import MaskedLM, Text


class Streamer(Protocol):
    """The diffusion streamer protocol of transformers (``TextDiffusionStreamer``)."""

    def put(self, value: Tensor) -> None: ...
    def put_draft(self, value: Tensor, **kwargs: Any) -> None: ...
    def end(self) -> None: ...


def _seeds(decoder: Decoder, batch: int, seeds: Tensor | torch.Generator | None) -> Tensor:
    """One seed a row; zeros where nothing is random. Raises UserError where randomness has no source."""
    if isinstance(seeds, torch.Generator):
        return torch.randint(2**62, (batch,), generator=seeds, device=seeds.device)
    if seeds is None and decoder.is_random:
        raise UserError(f"decoder {decoder.name!r} draws random numbers: pass seeds or a torch.Generator")
    if seeds is not None and len(seeds) != batch:
        raise UserError(f"{len(seeds)} seeds for {batch} prompts: pass one each")
    return torch.zeros(batch, dtype=torch.int64) if seeds is None else seeds


def start(
    lm: MaskedLM,
    prompt: Tensor,
    prompt_mask: Tensor,
    decoder: Decoder,
    seeds: Tensor,
    canvas: Tensor | None = None,
    numbers: Sequence[int] | None = None,
) -> Canvases:
    """The rows that ``decode`` begins with, under a decoder that is ``within`` the model's blocks."""
    length = decoder.max_new_tokens
    if canvas is None:
        canvas = torch.full((len(prompt), length), lm.mask_id, device=prompt.device)
    elif decoder.cache in APPROXIMATE and canvas.shape[1] > length:
        raise UserError(f"cache={decoder.cache} needs a canvas without fixed tokens: set cache=none for a template")
    elif decoder.initial_length is not None:
        raise UserError(
            f"decoder {decoder.name!r} chooses the canvas length, and a template has its own: leave initial_length out"
        )
    numbers = range(len(prompt)) if numbers is None else numbers
    rows = Canvases.new(prompt, prompt_mask, canvas, lm.mask_id, seeds.to(prompt.device), numbers)
    if decoder.initial_length is not None:
        rows.present[:, decoder.initial_length :], rows.padded = False, True
    return rows


def decode(
    lm: MaskedLM,
    prompt: Tensor,
    prompt_mask: Tensor,
    decoder: Decoder,
    seeds: Tensor | torch.Generator | None = None,
    streamer: Streamer | None = None,
    early_stop: bool = False,
    canvas: Tensor | None = None,
) -> Trajectory:
    """Fill a canvas behind each prompt.

    Args:
        prompt: (B, P) int64, left-padded. prompt_mask: (B, P) bool, False = padding. (``MaskedLM.encode`` makes both.)
        seeds: (B,) int64, one a row, or a generator of them; needed where the decoder draws random numbers. A row depends on
            its own seed alone, not on its batch.
        streamer: shown every draft; for one row.
        early_stop: a row leaves the batch once all is committed up to its first end token; the rest stays masked, step -1.
        canvas: (B, L) int64, templates with ``max_new_tokens`` masks each, which a plan's blocks count; other tokens are
            kept, with step -1. Left out: all masks.

    Raises UserError where randomness has no source, seeds are not one a row, a template does not fit the decoder, a streamer
    gets more than one row, or the model's logits are not finite.
    """
    if streamer is not None and len(prompt) != 1:
        raise UserError(f"a streamer shows one row, not {len(prompt)}: decode one prompt at a time")
    length = decoder.max_new_tokens
    if canvas is not None and ((masks := (canvas == lm.mask_id).sum(1)) != length).any():
        fills = f"decoder {decoder.name!r} fills {length}"
        raise UserError(f"a template has {masks.tolist()} masks, but {fills}: set max_new_tokens")
    decoder = decoder.within(lm.block_length)
    rows = start(lm, prompt, prompt_mask, decoder, _seeds(decoder, len(prompt), seeds), canvas)
    loop = DecodingLoop(lm, decoder, early_stop)
    if streamer is None:
        parts = list(loop.run(rows))
    else:
        streamer.put(prompt)
        parts = list(loop.run(rows, on_pass=lambda rows: streamer.put_draft(rows.canvas[0][rows.present[0]])))
        streamer.put(parts[0].canvas[0].cpu())
        streamer.end()
    order = torch.tensor([number for part in parts for number in part.numbers]).argsort()
    return Trajectory.cat([part.trajectory(lm.mask_id, decoder.config()) for part in parts]).take(order)


def decode_each(
    lm: MaskedLM,
    prompts: Sequence[Text],
    decoder: Decoder,
    seeds: Tensor,
    batch_size: int,
    early_stop: bool = True,
    static_width: int = 0,
) -> Iterator[tuple[list[int], Trajectory]]:
    """``decode`` of any number of prompts with a batch that stays full: a finished row makes room for the next prompt.

    Prompts of similar length next to each other waste least on padding. Yields (indexes into ``prompts``, their trajectory)
    of rows that finish together.

    Args:
        prompts: texts or token ids for ``MaskedLM.encode``. batch_size: rows of one forward pass.
        static_width: for a compiled model: prompts are padded to this many tokens and the batch is filled up with copies of
            the last, so that every forward pass has one shape.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: pass 1 or more")
    seeds, decoder = _seeds(decoder, len(prompts), seeds), decoder.within(lm.block_length)
    loop, waiting = DecodingLoop(lm, decoder, early_stop), 0

    def fresh(room: int) -> Canvases:
        """Canvases of the next prompts, at most ``room``; under a static width, exactly as many."""
        nonlocal waiting
        numbers = range(waiting, waiting + room if static_width else min(waiting + room, len(prompts)))
        waiting = numbers.stop
        some = [min(i, len(prompts) - 1) for i in numbers]
        ids, mask = lm.encode([prompts[i] for i in some], decoder.max_new_tokens, static_width)
        rows = start(lm, ids, mask, decoder, seeds[some], numbers=numbers)
        rows.padded |= bool(static_width)  # with a mask or without one are two shapes
        return rows

    def refill(rows: Canvases) -> Canvases:
        if not len(rows):
            return fresh(batch_size)
        if decoder.cache in APPROXIMATE:  # such a cache is made for rows of one block
            return rows
        more = fresh(batch_size - len(rows))
        rows = rows if static_width else rows.drop_padding()
        return rows.join(more, lm.pad_id) if len(more) else rows

    unfinished = len(prompts)
    for done in loop.run(fresh(batch_size), refill) if prompts else ():
        asked = [i for i, number in enumerate(done.numbers) if number < len(prompts)]
        if asked:
            done = done.take(torch.tensor(asked, device=lm.device)).drop_padding()
            yield done.numbers, done.trajectory(lm.mask_id, decoder.config())
        unfinished -= len(asked)
        if not unfinished:  # copies may be left
            return
