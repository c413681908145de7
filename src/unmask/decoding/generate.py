"""``MaskedLM.generate``: prompts in, texts out, with everything that happened in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch

from unmask.decoding.confidence import CONFIDENCES
from unmask.decoding.decode import Streamer, decode, decode_each
from unmask.decoding.decoder import Decoder, make_decoder
from unmask.decoding.trajectory import Trajectory
from unmask.errors import UserError
from unmask.models.masked_lm import MaskedLM

Messages: TypeAlias = Sequence[dict[str, str]]
Prompt: TypeAlias = str | Messages
"""A user's turn, or a conversation as ``{"role": …, "content": …}`` messages."""


@dataclass(frozen=True)
class Generation:
    """Completions, those of one prompt next to each other.

    Attributes:
        texts: N strings, each up to its first end token or stop string.
        trajectory: the N decodes, whole (a stop string cuts the text alone).
    """

    texts: list[str]
    trajectory: Trajectory

    @property
    def nfe(self) -> list[int]:
        """Forward passes of each completion; guidance counts twice."""
        return [int(n) for n in self.trajectory.nfe]


def generate(
    lm: MaskedLM,
    prompts: Prompt | Sequence[Prompt],
    decoder: str | Decoder = "semi-ar",
    *,
    max_new_tokens: int = 128,
    num_return_sequences: int = 1,
    stop: Sequence[str] = (),
    seed: int = 0,
    prefill: str = "",
    batch_size: int = 32,
    streamer: Streamer | None = None,
) -> Generation:
    """Complete prompts.

    Args:
        prompts: one prompt or several: texts, each a user's turn, or lists of messages.
        decoder: a preset with parameters (``eoser-ass:blocks=4``), a YAML file, or a ``Decoder`` with its own canvas length.
        max_new_tokens: canvas length in tokens, unless the decoder sets its own.
        num_return_sequences: completions a prompt; more than one need a decoder that draws random numbers.
        stop: strings at the first of which a text ends; they are not part of it.
        seed: completion i draws from ``seed + i``, whatever the batch.
        prefill: text that every assistant's turn starts with; it is not part of the completion.
        batch_size: rows of one forward pass; a finished row makes room for the next.
        streamer: shown every draft; for one completion.

    Raises:
        UserError: for anything that ``make_decoder``, ``MaskedLM.encode`` and ``decode`` refuse, for no prompt, an empty stop
            string, and several completions that could not differ.
    """
    several = prompts if not isinstance(prompts, str) and not (prompts and isinstance(prompts[0], dict)) else [prompts]
    texts = [_written(lm, cast(Prompt, p), prefill) for p in several]
    if isinstance(decoder, str):
        decoder = make_decoder(decoder, max_new_tokens=max_new_tokens)
    if not texts or num_return_sequences < 1:
        raise UserError(
            f"{len(texts)} prompts with num_return_sequences={num_return_sequences}: give one each at least"
        )
    if num_return_sequences > 1 and decoder.temperature == 0 and not CONFIDENCES[decoder.confidence].noisy:
        raise UserError(
            f"num_return_sequences is {num_return_sequences}, but decoder {decoder.name!r} draws no random numbers, so all "
            "would be equal: set a temperature"
        )
    if isinstance(stop, str) or not all(stop):
        raise UserError(f"stop is {stop!r}: give a list of strings, none of them empty")
    texts = [text for text in texts for _ in range(num_return_sequences)]
    seeds = seed + torch.arange(len(texts))
    if streamer is not None:
        ids, mask = lm.encode(texts, decoder.max_new_tokens)
        whole = decode(lm, ids, mask, decoder, seeds=seeds, streamer=streamer, early_stop=True)
    else:
        parts: list[Trajectory] = []
        order: list[int] = []
        for numbers, trajectory in decode_each(lm, texts, decoder, seeds, batch_size):
            order += numbers
            parts.append(trajectory)
        whole = Trajectory.cat(parts).take(torch.tensor(order).argsort())
    return Generation([_until(text, stop) for text in lm.text(whole.tokens)], whole)


def _written(lm: MaskedLM, prompt: Prompt, prefill: str) -> str:
    """A prompt as the chat template writes it, up to where the completion begins."""
    if isinstance(prompt, str):
        return lm.chat(prompt, prefill)
    return lm.render([dict(message) for message in prompt]) + prefill


def _until(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((found for s in stop if (found := text.find(s)) >= 0), default=len(text))]
