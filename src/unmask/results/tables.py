"""Tables of results, and how their numbers read: as Markdown, in a terminal, on the report's page."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unmask.io.terminal import fitting_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as TerminalTable

METRICS = ("solved", "score")
QUANTITIES = {
    "nfe": "NFE",
    "solved": "solved % [95 %]",
    "score": "score % [95 %]",
    "tokens_per_forward": "tokens/forward",
    "length": "length",
    "seconds": "seconds",
}
"""What a cell of an evaluation or a study is measured by, with its heading."""


def percent(share: float, interval: Sequence[float] | None = None) -> str:
    text = f"{100 * share:.1f}"
    return text if interval is None else f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def points(difference: float, interval: Sequence[float], **_: Any) -> str:
    """A difference of shares in percentage points, with its interval."""
    low, high = interval
    return f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def plain(value: Any) -> str:
    """A setting's value as text."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(map(plain, value)) if isinstance(value, list) else str(value)


def quantity(cell: dict[str, Any], what: str) -> str:
    """One of ``QUANTITIES`` of a cell as text."""
    if what in METRICS:
        return percent(cell[what], cell[f"{what}_interval"])
    text = f"{cell[what]:.1f}"
    return text.removesuffix(".0") if what == "nfe" else text


@dataclass(frozen=True)
class Table:
    """The first ``left`` columns are text, the others numbers; ``notes`` follow it."""

    headings: list[str]
    rows: list[list[str]]
    left: int = 1
    title: str = ""
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """The table alone, in Markdown."""
        rule = ["---"] * self.left + ["---:"] * (len(self.headings) - self.left)
        return "".join(f"| {' | '.join(row)} |\n" for row in (self.headings, rule, *self.rows))

    def titled_markdown(self) -> str:
        """Title, table and notes, in Markdown."""
        return f"**{self.title}**\n\n{self.markdown()}" + "".join(f"\n{note}\n" for note in self.notes)

    def for_terminal(
        self, screen: Console, drop_first: Sequence[str] = (), sections: Collection[int] = ()
    ) -> TerminalTable:
        """As wide as the screen allows; arguments as ``fitting_table``'s."""
        return fitting_table(screen, self.title, self.headings, self.rows, self.left, drop_first, sections)

    def without_empty(self) -> Table:
        """Without columns of numbers in which no row has one."""
        kept = [i for i in range(len(self.headings)) if i < self.left or any(row[i] for row in self.rows)]
        rows = [[row[i] for i in kept] for row in self.rows]
        return Table([self.headings[i] for i in kept], rows, self.left, self.title, self.notes)


def evaluation_table(summary: dict[str, Any]) -> Table:
    """An evaluation's cells, a row each."""
    cells, config = summary["cells"], summary["config"]
    differ = any("to_best" in cell for cell in cells)
    headings = list(QUANTITIES.values())
    headings[2:2] = ["to best, points [95 %]"] * differ
    rows = []
    for cell in cells:
        row = [quantity(cell, what) for what in QUANTITIES]
        row[2:2] = [points(**cell["to_best"]) if "to_best" in cell else "best"] * differ
        rows.append([cell["task"], cell["decoder"], *row])
    title = f"{config['model']['name']}, {config['split']} split, {cells[0]['problems']} problems a task"
    return Table(["task", "decoder", *headings], rows, 2, title)


def evaluation_for_terminal(summary: dict[str, Any], screen: Console) -> TerminalTable:
    """``evaluation_table`` with a line between tasks."""
    table = evaluation_table(summary)
    last_of_task = [i for i in range(len(table.rows) - 1) if table.rows[i][0] != table.rows[i + 1][0]]
    return table.for_terminal(screen, ["tokens/forward", "length", "seconds", "score % [95 %]"], last_of_task)
