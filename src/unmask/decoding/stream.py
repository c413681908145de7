"""Watch a canvas fill: a streamer (transformers' diffusion protocol) that draws it in a terminal with rich."""

from __future__ import annotations

import time
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from torch import Tensor

from unmask.models.masked_lm import MaskedLM

MASK, END = "·", "∎"


def canvas_text(lm: MaskedLM, canvas: list[int], before: list[int] | None) -> Text:
    """The canvas as styled text: masks dim, end tokens as ∎, what the last step committed highlighted."""

    def style(i: int) -> str:
        if canvas[i] == lm.mask_id:
            return "dim"
        if before is not None and before[i] == lm.mask_id:
            return "bold black on green"
        return "dim blue" if canvas[i] in lm.end_ids else ""

    def shown(token: int) -> str:
        return MASK if token == lm.mask_id else END if token in lm.end_ids else str(lm.tokenizer.decode([token]))

    runs = groupby(range(len(canvas)), style)
    return Text.assemble(*[("".join(shown(canvas[i]) for i in run), name) for name, run in runs])


class LiveCanvas:
    """``put`` the prompt, ``put_draft`` every draft, ``put`` the finished canvas, ``end``; ``delay`` in seconds a draft."""

    def __init__(self, lm: MaskedLM, console: Console, title: str, delay: float = 0.0) -> None:
        self.lm, self.title, self.delay = lm, title, delay
        self.live = Live(console=console, auto_refresh=False)
        self.before: list[int] | None = None
        self.step = 0

    def _draw(self, value: Tensor) -> None:
        canvas = value.flatten().tolist()
        committed = sum(t != self.lm.mask_id for t in canvas)
        subtitle = f"step {self.step} · {committed}/{len(canvas)} tokens committed"
        body, width = canvas_text(self.lm, canvas, self.before), min(80, self.live.console.width)
        self.live.update(Panel(body, title=Text(self.title), subtitle=subtitle, width=width), refresh=True)
        self.before = canvas

    def put(self, value: Tensor) -> None:
        if not self.live.is_started:  # the prompt
            self.live.start()
            return
        self.before = None
        self._draw(value)

    def put_draft(self, value: Tensor, **_: Any) -> None:
        self.step += 1
        self._draw(value)
        time.sleep(self.delay)

    def end(self) -> None:
        self.live.stop()
