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


class LiveCanvas:
    """``put`` the prompt, ``put_draft`` every draft, ``put`` the finished canvas, ``end``; ``delay`` in seconds a draft."""

    def __init__(self, lm: MaskedLM, console: Console, title: str, delay: float = 0.0) -> None:
        self.lm, self.title, self.delay = lm, title, delay
        self.live = Live(console=console, auto_refresh=False)
        self.before: list[int] | None = None
        self.step = 0

    def _draw(self, value: Tensor) -> None:
        """Masks dim, end tokens as ∎, what the last step committed highlighted."""
        canvas, before, mask, ends = value.flatten().tolist(), self.before, self.lm.mask_id, self.lm.end_ids

        def style(i: int) -> str:
            if canvas[i] == mask:
                return "dim"
            if before is not None and before[i] == mask:
                return "bold black on green"
            return "dim blue" if canvas[i] in ends else ""

        def shown(token: int) -> str:
            return MASK if token == mask else END if token in ends else str(self.lm.tokenizer.decode([token]))

        runs = groupby(range(len(canvas)), style)
        body = Text.assemble(*[("".join(shown(canvas[i]) for i in run), name) for name, run in runs])
        subtitle = f"step {self.step} · {len(canvas) - canvas.count(mask)}/{len(canvas)} tokens committed"
        width = min(80, self.live.console.width)
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
