"""The progress bars of commands that take long: one line a part of the work, on stderr."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console
from rich.table import Column

from unmask.io.terminal import console

Progress = Callable[[str, int, int], None]
"""Called with (label of a part, done, total)."""
SECONDS_BETWEEN_LINES = 20.0
"""Where standard error is no terminal."""


def bar_columns(screen: Console) -> tuple[bars.ProgressColumn, ...]:
    """What it is, a bar that leaves it room (a name that still does not fit is folded, not cut), how far, how long."""
    text = bars.TextColumn("{task.description:<28}", markup=False, table_column=Column(overflow="fold"))
    bar = bars.BarColumn(bar_width=max(5, min(40, screen.width - 72)))
    return text, bar, bars.MofNCompleteColumn(), bars.TimeElapsedColumn(), bars.TimeRemainingColumn()


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A function (label, done, total) that draws a line a label; nothing is drawn before its first call."""
    screen = console(stderr=True)
    bar = bars.Progress(*bar_columns(screen), console=screen)
    lines: dict[str, bars.TaskID] = {}
    said: dict[str, float] = {}

    def report(label: str, done: int, total: int) -> None:
        if not screen.is_terminal:
            if done == total or time.monotonic() > said.get(label, -math.inf) + SECONDS_BETWEEN_LINES:
                said[label] = time.monotonic()
                print(f"{label}: {done} of {total}", file=sys.stderr, flush=True)
            return
        bar.start()  # only now: a mistake in the request leaves nothing but its sentence
        if label not in lines:
            lines[label] = bar.add_task(label, total=total)
        bar.update(lines[label], completed=done)

    try:
        yield report
    finally:
        if lines:
            bar.stop()
