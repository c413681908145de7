"""Tables for reading: some of a study's cells, one quantity beside the other, as ``tables`` of the study's file asks for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from unmask.config import build
from unmask.errors import UserError, unknown
from unmask.results.accuracy import markdown as markdown_table
from unmask.results.accuracy import percent, points
from unmask.results.axes import METRICS, PLAN, Table, distinct

CLEAR = 0.05
"""A difference with Holm's p below this gets a star."""
OTHERS = {"training": "the untrained model", "equal passes": "the baseline of as many passes"}
"""What a cell is compared with, where that is not the first value of an axis."""
HEADINGS = {
    "nfe": "NFE",
    "solved": "solved % [95 %]",
    "score": "score % [95 %]",
    "length": "length",
    "tokens_per_forward": "tokens/forward",
}


@dataclass(frozen=True)
class Pivot:
    """One table: a row for each combination of values of ``rows``, a column for each of ``columns`` and each quantity."""

    title: str
    """The line above it."""
    rows: list[str]
    """Axes, or ``plan``."""
    columns: list[str] = field(default_factory=list)
    """Axes, or ``plan``."""
    where: dict[str, Any] = field(default_factory=dict)
    """Values that an axis must have; a list: one of them."""
    show: list[Literal["nfe", "solved", "score", "length", "tokens_per_forward"]] = field(
        default_factory=lambda: ["nfe", "solved"]  # type: ignore[arg-type]
    )
    """Quantities of a cell."""
    mean_over: list[str] = field(default_factory=list)
    """Axes of the training over which a number is the mean, as it is over the seeds: their values count as further seeds."""
    against: list[str] = field(default_factory=list)
    """Comparisons: axes, ``training`` or ``equal passes``; differences of solved, or of the score where that alone is shown."""

    @property
    def metric(self) -> str:
        return "score" if "score" in self.show and "solved" not in self.show else "solved"


@dataclass(frozen=True)
class RenderedTable:
    """A table as it is shown: the first ``left`` columns are values of axes, the others quantities."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    left: int
    notes: list[str]

    def markdown(self) -> str:
        text = f"**{self.title}**\n\n" + markdown_table(self.headings, self.rows, self.left)
        return text + "".join(f"\n{note}\n" for note in self.notes)


def pivots(
    tables: Sequence[Table], cells: Sequence[Table], compare: Sequence[str] = (), baselines: Sequence[str] = ()
) -> list[Pivot]:
    """The tables of a study's file.

    Args:
        tables, compare, baselines: as the file has them.
        cells: the value of every axis in each cell, seeds aside, and ``plan``.

    Raises:
        UserError: where a table names what the study does not have, stays empty, or has two cells in one place.
    """
    found: list[Pivot] = []
    axes = list(cells[0])
    trained = any(axis.startswith("train.") for axis in axes)
    along = compare or [axis for axis in axes if axis not in ("task", PLAN)]
    compared = [*along, *["training"] * trained, *["equal passes"] * bool(baselines)]
    for number, table in enumerate(tables, 1):
        for key in ("title", "rows"):
            if not table.get(key):
                raise UserError(f"table {number} of tables lacks {key}: add it")
        pivot = build(Pivot, table, f"table {number} of tables")
        if pivot.title in [before.title for before in found]:
            raise UserError(f"two of tables have the title {pivot.title!r}: give each its own")
        if not pivot.show and not pivot.against:
            raise UserError(f"the table {pivot.title!r} shows nothing: give show or against")
        _check_names(pivot, cells, compared)
        kept = [{axis: value for axis, value in cell.items() if axis not in pivot.mean_over} for cell in cells]
        if not _places(pivot, distinct(kept)):
            raise UserError(f"no cell is in the table {pivot.title!r}: change its where")
        found.append(pivot)
    return found


def _check_names(pivot: Pivot, cells: Sequence[Table], compared: Sequence[str]) -> None:
    """Raises UserError for an axis, a value or a comparison that the study does not have."""
    axes = list(cells[0])
    left = [axis for axis in axes if axis not in pivot.mean_over]
    of_training = [axis for axis in axes if axis.startswith("train.")]
    comparable = [axis for axis in compared if axis not in pivot.mean_over]
    for what, names, known in (
        ("axis of the training in mean_over of", pivot.mean_over, of_training),
        ("axis in", [*pivot.rows, *pivot.columns, *pivot.where], left),
        ("comparison in", pivot.against, comparable),
    ):
        for name in names:
            if name not in known:
                raise unknown(f"{what} the table {pivot.title!r}", name, known)
    for axis, wanted in _wanted(pivot).items():
        there = distinct(cell[axis] for cell in cells)
        for value in wanted:
            if value not in there:
                raise unknown(f"{axis} in where of the table {pivot.title!r}", plain(value), map(plain, there))


def _wanted(pivot: Pivot) -> dict[str, list[Any]]:
    """The values that ``where`` leaves of each axis that it names."""
    return {axis: value if isinstance(value, list) else [value] for axis, value in pivot.where.items()}


def _places(pivot: Pivot, cells: Sequence[Table]) -> dict[tuple[str, str], int]:
    """Where in the table cells stand: (row, column) -> index. Raises UserError where two share a place."""
    places: dict[tuple[str, str], int] = {}
    wanted = _wanted(pivot)
    for index, cell in enumerate(cells):
        if any(cell[axis] not in values for axis, values in wanted.items()):
            continue
        row, column = (json.dumps([cell[axis] for axis in axes]) for axes in (pivot.rows, pivot.columns))
        if (other := places.setdefault((row, column), index)) != index:
            differ = [axis for axis in cell if cell[axis] != cells[other][axis]]
            raise UserError(
                f"two cells share a place in the table {pivot.title!r}: add {' or '.join(differ)} to its rows, columns or where"
            )
    return places


def plain(value: Any) -> str:
    """A setting's value as text."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(map(plain, value)) if isinstance(value, list) else str(value)


def tables(pivots: Sequence[Pivot], summary: Table) -> Iterator[RenderedTable]:
    """The tables that have cells in the summary so far."""
    for pivot in pivots:
        if (shown := _table(pivot, summary)) is not None:
            yield shown


def _table(pivot: Pivot, summary: Table) -> RenderedTable | None:
    if pivot.mean_over:
        summary = next(pool for pool in summary["pools"] if pool["over"] == pivot.mean_over)
    entries = summary["cells"]
    places = _places(pivot, [{**entry["cell"], PLAN: entry["budget"]["nfe"]} for entry in entries])
    if not places:
        return None
    rows, columns = (list(dict.fromkeys(place[i] for place in places)) for i in (0, 1))
    columns = _grouped(columns)
    columned: list[tuple[str, list[str]]] = []
    for column in columns:
        cells = [entries[places[row, column]] if (row, column) in places else None for row in rows]
        named = _values(pivot.columns, column)
        name = " ".join(t if isinstance(v, str) else f"{axis.removeprefix('train.')}={t}" for axis, v, t in named)
        several = len(pivot.show) + len(pivot.against) > 1
        for what, texts in _texts(cells, pivot, summary):
            columned.append((f"{name} {what}".strip() if several or not name else name, texts))
    columned = [(heading, texts) for heading, texts in columned if any(texts)]
    if not columned:
        return None
    headings = [*pivot.rows, *(heading for heading, _ in columned)]
    body = [
        [*(text for *_, text in _values(pivot.rows, row)), *(texts[i] for _, texts in columned)]
        for i, row in enumerate(rows)
    ]
    body = [row for row in body if any(row[len(pivot.rows) :])]
    return RenderedTable(pivot.title, headings, body, len(pivot.rows), list(_notes(pivot, summary)))


def _grouped(places: Sequence[str]) -> list[str]:
    """Places by their first axis, then the second and so on, each axis's values in the order in which they come."""
    orders = [list(dict.fromkeys(map(json.dumps, values))) for values in zip(*map(json.loads, places), strict=True)]
    return sorted(
        places, key=lambda place: [o.index(json.dumps(v)) for o, v in zip(orders, json.loads(place), strict=True)]
    )


def _values(axes: Sequence[str], place: str) -> list[tuple[str, Any, str]]:
    """(axis, value, its text) of a row or column; a model that no training has touched is called so."""
    found = zip(axes, json.loads(place), strict=True)
    return [(a, v, "untrained" if v is None and a.startswith("train.") else plain(v)) for a, v in found]


def _difference(axis: str, pivot: Pivot) -> str:
    """How the table calls a comparison."""
    return "difference" if len(pivot.against) == 1 else f"difference ({axis})"


def _texts(cells: Sequence[Table | None], pivot: Pivot, summary: Table) -> Iterator[tuple[str, list[str]]]:
    """What one column shows, as (what it is, its text in each row); nothing where the study has no cell."""
    for what in pivot.show:
        yield HEADINGS[what], ["" if cell is None else _quantity(cell, what) for cell in cells]
    for axis in pivot.against:
        found = {json.dumps(d["cell"]): d for d in summary["differences"] if d["axis"] == axis}
        rows = [None if cell is None else found.get(json.dumps(cell["cell"])) for cell in cells]
        stars = ["*" * (row is not None and row[f"{pivot.metric}_holm"] < CLEAR) for row in rows]
        texts = ["" if row is None else points(row[pivot.metric], row[f"{pivot.metric}_interval"]) for row in rows]
        yield _difference(axis, pivot), [text + star for text, star in zip(texts, stars, strict=True)]


def _quantity(cell: Table, what: str) -> str:
    if what in METRICS:
        return percent(cell[what], cell[f"{what}_interval"])
    return f"{cell[what]:.1f}".removesuffix(".0")


def _notes(pivot: Pivot, summary: Table) -> Iterator[str]:
    if len(pivot.show) == 1 and not pivot.against:
        yield f"Shown: {HEADINGS[pivot.show[0]]}."
    runs = sorted({cell["seeds"] for cell in summary["cells"] if "updates" in cell["budget"]})
    if pivot.mean_over and runs:
        many = " to ".join(str(n) for n in dict.fromkeys((runs[0], runs[-1])))
        yield (
            f"Mean over {', '.join(pivot.mean_over)} and the seeds, {many} trainings each, which intervals and tests take as "
            "a sample of such trainings."
        )
    for axis in pivot.against:
        count = sum(d["axis"] == axis for d in summary["differences"])
        if count:
            other = OTHERS[axis] if axis in OTHERS else f"the cell of {axis} {plain(summary['axes'][axis][0])}"
            yield (
                f"{_difference(axis, pivot).capitalize()}: in points of {pivot.metric} from {other}, paired by problem; a star "
                f"where it is clear after Holm's adjustment over all {count} of this kind."
            )
