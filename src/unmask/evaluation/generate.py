"""The command line of ``unmask generate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from unmask.config import read_flags
from unmask.errors import UserError
from unmask.io.terminal import console
from unmask.models.source import ModelSource


@dataclass(kw_only=True)
class GenerateArguments(ModelSource):
    """Decode one prompt and watch the canvas fill (plain text when the output is not a terminal)."""

    prompt: Annotated[str, tyro.conf.Positional]
    """The user's turn."""
    decoder: str = "semi-ar"
    """Decoder spec, e.g. ``eoser-ass:blocks=4,temperature=0.7``, or a YAML file."""
    max_new_tokens: int = 128
    """Canvas length in tokens."""
    prefill: str = ""
    """Text that the assistant's turn starts with."""
    seed: int = 0
    delay: float = 0.0
    """Seconds to wait after each step, for watching."""


def command(arguments: list[str]) -> None:
    """``unmask generate``."""
    show_decoding(read_flags(GenerateArguments, arguments, prog="unmask generate"))


def show_decoding(a: GenerateArguments) -> str:
    """Decode, print and return the completion; a terminal sees the canvas fill."""
    import torch

    from unmask.decoding import decode, make_decoder
    from unmask.decoding.stream import LiveCanvas

    if not 0 <= a.seed < 2**63 or not 0 <= a.delay < 60:
        raise UserError(f"seed is {a.seed}, delay is {a.delay}: give a seed of 0 or more and a delay below 60 seconds")
    decoder = make_decoder(a.decoder, max_new_tokens=a.max_new_tokens)
    lm = a.load()
    screen = console()
    ids, mask = lm.encode([lm.chat(a.prompt, a.prefill)], decoder.max_new_tokens)
    streamer = LiveCanvas(lm, screen, f"{lm.name} · {decoder.name}", a.delay) if screen.is_terminal else None
    try:
        generator = torch.Generator().manual_seed(a.seed)
        trajectory = decode(lm, ids, mask, decoder, generator, streamer=streamer, early_stop=True)
    finally:  # on Ctrl-C too the cursor comes back
        if streamer is not None:
            streamer.end()
    text = lm.text(trajectory.tokens)[0]
    print(text, flush=True)
    return text
