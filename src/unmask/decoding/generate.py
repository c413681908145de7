"""``MaskedLM.generate``: prompts in, texts out, with everything that happened in between."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor

from unmask.decoding.decode import Streamer, decode, decode_each
from unmask.decoding.decoder import Decoder, make_decoder
from unmask.decoding.trajectory import Trajectory
from unmask.errors import UserError

if TYPE_CHECKING:  # it calls ``generate``
    from unmask.models.masked_lm import MaskedLM, Text

Prompt: TypeAlias = str | Sequence[dict[str, str]] | Sequence[int] | Tensor
"""A user's turn, a conversation as ``{"role": …, "content": …}`` messages, a template with gaps, or token ids."""

GAP = re.compile(r"<\|mask:(\d+)\|>")


@dataclass(frozen=True)
class Generation:
    """Completions, those of one prompt next to each other."""

    texts: list[str]
    """N strings, each up to its first end token or stop string; a template's with its gaps filled."""
    trajectories: list[Trajectory]
    """The N decodes in batches of equal canvas length, whole (a stop string cuts the text alone)."""

    @property
    def trajectory(self) -> Trajectory:
        """All decodes as one batch. Raises UserError where templates have canvases of different lengths."""
        if len({t.tokens.shape[1] for t in self.trajectories}) > 1:
            raise UserError("the templates have canvases of different lengths: use .trajectories, one each")
        return Trajectory.cat(self.trajectories)

    @property
    def nfe(self) -> list[int]:
        """Forward passes of each completion; guidance counts twice."""
        return [int(n) for t in self.trajectories for n in t.nfe]


@dataclass(frozen=True)
class PreparedRow:
    """One completion to make: what is before the canvas, the canvas where it is a template, and its text's beginning."""

    prompt: Text
    canvas: tuple[int, ...] = ()
    start: str = ""

    def make_decoder(self, lm: MaskedLM, decoder: str | Decoder | None, max_new_tokens: int) -> Decoder:
        """The decoder as ``generate`` is given it, for this canvas. Raises UserError."""
        masks = self.canvas.count(lm.mask_id)
        if self.canvas and not masks:
            raise UserError("a template has gaps of 0 tokens: write <|mask:N|> with N of 1 or more")
        chosen = decoder or ("full" if masks else "semi-ar")
        if isinstance(chosen, str):
            chosen = make_decoder(chosen, max_new_tokens=masks or max_new_tokens)
        return chosen.replace(max_new_tokens=masks) if masks else chosen

    def text(self, lm: MaskedLM, tokens: Tensor) -> str:
        """What a canvas (1, L) int64 says: up to its first end token, or a whole template without them."""
        if not self.canvas:
            return lm.text(tokens)[0]
        return self.start + str(lm.tokenizer.decode([t for t in tokens[0].tolist() if t not in lm.end_ids]))


def generate(
    lm: MaskedLM,
    prompts: Prompt | Sequence[Prompt],
    decoder: str | Decoder | None = None,
    *,
    max_new_tokens: int = 128,
    num_return_sequences: int = 1,
    stop: Sequence[str] = (),
    seed: int = 0,
    prefill: str = "",
    batch_size: int = 32,
    streamer: Streamer | None = None,
) -> Generation:
    """Complete prompts, or fill the gaps of templates.

    A text with gaps (``"The capital of <|mask:4|> is Rome."``: four tokens to fill) is taken as it is, without the chat
    template; in a conversation, the last assistant message or ``prefill`` may have gaps; in token ids, mask tokens are gaps.
    All other tokens stay; the canvas length is the number of masks. End tokens in a gap are not shown.

    Args:
        prompts: one prompt or several: texts, each a user's turn, lists of messages, token ids, or templates of any of these.
        decoder: a spec (see ``make_decoder``) or a ``Decoder`` with its own canvas length; None: ``semi-ar``, for templates
            ``full``.
        max_new_tokens: canvas length in tokens, unless the decoder or a template sets its own.
        num_return_sequences: completions a prompt; more than one need a decoder that draws random numbers.
        stop: strings at the first of which a text ends; they are not part of it.
        seed: completion i draws from ``seed + i``, whatever the batch.
        prefill: text that every assistant's turn starts with; it is not part of the completion, unless it has gaps.
        batch_size: rows of one forward pass. streamer: shown every draft; for one completion.

    Raises UserError, also for anything that ``make_decoder``, ``MaskedLM.encode`` and ``decode`` refuse.
    """
    rows = [prepare_row(lm, cast(Prompt, p), prefill) for p in (prompts if _are_several(prompts) else [prompts])]
    if not rows or num_return_sequences < 1:
        raise UserError(f"{len(rows)} prompts with num_return_sequences={num_return_sequences}: pass one each at least")
    if isinstance(stop, str) or not all(stop):
        raise UserError(f"stop is {stop!r}: pass a list of strings, none of them empty")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: pass 1 or more")
    rows = [row for row in rows for _ in range(num_return_sequences)]
    found: dict[int, Trajectory] = {}

    def shape(i: int) -> tuple[int, int]:
        return len(rows[i].canvas), rows[i].canvas.count(lm.mask_id)

    for _, group in itertools.groupby(sorted(range(len(rows)), key=shape), shape):
        numbers = list(group)
        some = [rows[i] for i in numbers]
        chosen = some[0].make_decoder(lm, decoder, max_new_tokens)
        chosen.check_draws(num_return_sequences, "num_return_sequences")
        for taken, part in _decode(lm, some, chosen, seed + torch.tensor(numbers), batch_size, streamer):
            found |= {numbers[n]: part.take(torch.tensor([i])) for i, n in enumerate(taken)}
    ordered = [found[i] for i in range(len(rows))]
    texts = [until(row.text(lm, part.tokens), stop) for row, part in zip(rows, ordered, strict=True)]
    groups = itertools.groupby(ordered, lambda t: t.tokens.shape[1])
    return Generation(texts, [Trajectory.cat(list(group)) for _, group in groups])


def _are_several(prompts: Any) -> bool:
    """Whether these are several prompts: neither a text, nor messages, nor token ids."""
    one = isinstance(prompts, str) or (isinstance(prompts, Tensor) and prompts.ndim == 1)
    return not one and not (len(prompts) and isinstance(prompts[0], dict | int))


def prepare_row(lm: MaskedLM, prompt: Prompt, prefill: str = "") -> PreparedRow:
    """A prompt as the chat template writes it, up to where the completion begins, or a template cut at its first gap."""
    if isinstance(prompt, Tensor) or (prompt and isinstance(prompt[0], int)):
        ids = lm.tokens(cast("Sequence[int]", prompt))
        first = ids.index(lm.mask_id) if lm.mask_id in ids else len(ids)
        return PreparedRow(
            ids[:first], tuple(ids[first:]), str(lm.tokenizer.decode(ids[:first])) if first < len(ids) else ""
        )
    if isinstance(prompt, str):
        before, answer = ("", prompt) if GAP.search(prompt) else (lm.chat(prompt), prefill)
    else:
        messages, answer = [dict(message) for message in cast("Sequence[dict[str, str]]", prompt)], prefill
        if messages and messages[-1].get("role") == "assistant" and GAP.search(str(messages[-1].get("content"))):
            answer = messages.pop()["content"] + prefill
        before = lm.render(messages)
    start, *rest = GAP.split(answer)  # text, masks, text, masks, …, text
    canvas: list[int] = []
    for masks, text in zip(rest[::2], rest[1::2], strict=True):
        if len(masks) > 6 or int(masks) > lm.max_length:
            raise UserError(f"a gap has {masks:.20} tokens, but {lm.name} takes at most {lm.max_length}: choose fewer")
        canvas += [lm.mask_id] * int(masks) + lm.tokens(text)
        if len(canvas) > lm.max_length:
            raise UserError(f"the template is longer than the {lm.max_length} tokens that {lm.name} takes: shorten it")
    return PreparedRow(before + start, tuple(canvas), start)


def _decode(
    lm: MaskedLM,
    rows: Sequence[PreparedRow],
    decoder: Decoder,
    seeds: Tensor,
    batch_size: int,
    streamer: Streamer | None,
) -> Iterator[tuple[Sequence[int], Trajectory]]:
    """Rows whose canvases have one shape: (indexes into ``rows``, their trajectory)."""
    template = bool(rows[0].canvas)  # it may begin with a gap, and is filled to its end
    if not template and streamer is None:
        yield from decode_each(lm, [row.prompt for row in rows], decoder, seeds, batch_size)
        return
    for part in torch.arange(len(rows)).split(batch_size):
        some = [rows[i] for i in part]
        length = len(some[0].canvas) or decoder.max_new_tokens
        ids, mask = lm.encode([row.prompt for row in some], length, empty=template)
        canvas = torch.tensor([row.canvas for row in some], device=ids.device) if template else None
        yield part.tolist(), decode(lm, ids, mask, decoder, seeds[part], streamer, not template, canvas)


def until(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings that are not empty."""
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]
