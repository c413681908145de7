"""Watch a canvas fill: a streamer (transformers' diffusion protocol) that draws it in a terminal with rich."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from torch import Tensor

from unmask.models.masked_lm import MaskedLM

MASK, END = "·", "∎"


def canvas_text(lm: MaskedLM, canvas: list[int], before: list[int] | None) -> Text:
    """The canvas as styled text: masks dim, end tokens as ∎, what the last step committed highlighted."""
    text = Text()
    for i, token in enumerate(canvas):
        if token == lm.mask_id:
            text.append(MASK, style="dim")
            continue
        style = "bold black on green" if before is not None and before[i] == lm.mask_id else ""
        if token in lm.end_ids:
            text.append(END, style=style or "dim blue")
        else:
            text.append(str(lm.tokenizer.decode([token])), style=style)
    return text


class LiveCanvas:
    """``put`` the prompt, ``put_draft`` every draft, ``put`` the finished canvas, ``end``."""

    def __init__(self, lm: MaskedLM, console: Console, title: str, delay: float = 0.0) -> None:
        self.lm, self.title, self.delay = lm, title, delay
        self.live = Live(console=console, refresh_per_second=30, transient=False)
        self.before: list[int] | None = None
        self.step = 0
        self.started = False

    def _draw(self, canvas: list[int]) -> None:
        masks = sum(t == self.lm.mask_id for t in canvas)
        subtitle = f"step {self.step} · {len(canvas) - masks}/{len(canvas)} tokens committed"
        body = canvas_text(self.lm, canvas, self.before)
        self.live.update(
            Group(Panel(body, title=self.title, subtitle=subtitle, width=min(80, self.live.console.width)))
        )

    def put(self, value: Tensor) -> None:
        if not self.started:  # the prompt
            self.started = True
            self.live.start()
            return
        self.before = None
        self._draw(value.flatten().tolist())

    def put_draft(self, value: Tensor, **_: Any) -> None:
        canvas = value.flatten().tolist()
        self.step += 1
        self._draw(canvas)
        self.before = canvas
        if self.delay:
            time.sleep(self.delay)

    def end(self) -> None:
        self.live.stop()
