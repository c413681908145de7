"""Standard output and error of a command, on any terminal, in any encoding, into any pipe."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


_UNWRITABLE = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO)


@contextmanager
def standard_streams() -> Iterator[None]:
    """Standard output and error that cannot make a command fail: characters that they cannot show are escaped.

    What is written to a closed stream (``>&-``) is dropped.

    Raises:
        SystemExit: where the reader of a pipe has gone (``| head -1``), silently; where standard output cannot be written (a
            full disk), with a sentence.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in this order each takes its own descriptor
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:  # here and not at the interpreter's end, where nothing catches the error
            sys.stdout.flush()
    except OSError as error:
        if error.filename is not None or error.errno not in _UNWRITABLE:
            raise
        reader_gone = isinstance(error, BrokenPipeError)
        with open(os.devnull, "w", encoding="utf-8") as devnull:  # for what is still buffered
            for stream in (sys.stdout, *((sys.stderr,) if reader_gone else ())):
                with suppress(OSError, ValueError):  # a stream without a descriptor buffers nothing
                    os.dup2(devnull.fileno(), stream.fileno())
        if not reader_gone:
            sys.stderr.write(f"unmask: cannot write the output: {error.strerror}\n")
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

    drop_first = [heading for heading in drop_first if heading in headings]
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
