"""The progress bars of commands that take long: one line a part of the work, on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from unmask.terminal import console

if TYPE_CHECKING:
    from unmask.evaluation.evaluate import Progress as Report


@contextmanager
def progress_bars() -> Iterator[Report]:
    """A function (label, done, total) that draws a line a label; nothing is drawn before its first call."""
    text = TextColumn("{task.description:<28}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console(stderr=True))
    lines: dict[str, TaskID] = {}

    def report(label: str, done: int, total: int) -> None:
        bar.start()  # only now: a mistake in the request leaves nothing but its sentence
        if label not in lines:
            lines[label] = bar.add_task(label, total=total)
        bar.update(lines[label], completed=done)

    try:
        yield report
    finally:
        if lines:
            bar.stop()
