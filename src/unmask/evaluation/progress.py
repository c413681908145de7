"""The progress bars of commands that take long: one line a part of the work, on stderr."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.table import Column

from unmask.io.terminal import console

Progress = Callable[[str, int, int], None]  # called with (label of a part, done, total)
SECONDS_BETWEEN_LINES = 20.0  # where standard error is no terminal


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A function (label, done, total) that draws a line a label; nothing is drawn before its first call."""
    screen = console(stderr=True)
    bar = bars.Progress(
        bars.TextColumn("{task.description:<28}", markup=False, table_column=Column(overflow="fold")),
        bars.BarColumn(bar_width=max(5, min(40, screen.width - 72))),  # leaves the description room
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
        console=screen,
    )
    parts: dict[str, bars.TaskID] = {}
    printed: dict[str, float] = {}

    def report(label: str, done: int, total: int) -> None:
        if not screen.is_terminal:
            if done == total or time.monotonic() > printed.get(label, -math.inf) + SECONDS_BETWEEN_LINES:
                printed[label] = time.monotonic()
                print(f"{label}: {done} of {total}", file=sys.stderr, flush=True)
            return
        bar.start()  # only now: a mistake in the request leaves nothing but its sentence
        if label not in parts:
            parts[label] = bar.add_task(label, total=total)
        bar.update(parts[label], completed=done)

    try:
        yield report
    finally:
        if parts:
            bar.stop()
