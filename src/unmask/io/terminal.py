"""Standard output and error of a command, on any terminal, in any encoding, into any pipe."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@contextmanager
def standard_streams() -> Iterator[None]:
    """Standard streams that escape what they cannot show. SystemExit where the reader of a pipe has gone (``| head -1``)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:  # here and not at the interpreter's end, where nothing catches the error
            sys.stdout.flush()
    except BrokenPipeError:
        with open(os.devnull, "w", encoding="utf-8") as devnull:  # takes what is still buffered
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):  # a stream without a descriptor buffers nothing
                    os.dup2(devnull.fileno(), stream.fileno())
        raise SystemExit(1) from None


def console(stderr: bool = False) -> Console:
    """A rich console that shows text as it is: no markup, no emoji codes; 132 columns where there is no terminal."""
    from rich.console import Console

    width = None if (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ else 132
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


def fitting_table(
    screen: Console,
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    text_columns: int = 1,
    drop_first: Sequence[str] = (),
    sections: Collection[int] = (),
) -> Table:
    """A table as wide as the screen allows: words in the first ``text_columns``, numbers in the others.

    Args:
        drop_first: headings of columns to drop, in this order, where the screen is too narrow; then text is folded, not cut.
        sections: rows under which a line is drawn.
    """
    from rich.table import Table

    for dropped in range(len(drop_first) + 1):
        without = drop_first[:dropped]
        table = Table(title=title, caption=f"without {', '.join(without)}: the screen is narrow" if without else None)
        kept = [i for i, heading in enumerate(headings) if heading not in without]
        for i in kept:
            table.add_column(headings[i], justify="left" if i < text_columns else "right", overflow="fold")
        for number, row in enumerate(rows):
            table.add_row(*(row[i] for i in kept), end_section=number in sections)
        if screen.measure(table, options=screen.options.update(max_width=10_000)).maximum <= screen.width:
            break
    return table
