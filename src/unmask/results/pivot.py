"""Tables for reading: some of a study's cells, one quantity beside the other, as ``tables`` of the study's file asks for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from unmask.config import build
from unmask.errors import UserError, unknown
from unmask.results.tables import METRICS, QUANTITIES, Table, plain, points, quantity

Values = dict[str, Any]
SEEDS = ("seed", "train.seed")
"""The axes that a summary pools instead of comparing."""
PLAN = "plan"
"""Stands among the axes of a table for the number of passes that a decoder's plan allows."""
ALPHA = 0.05
"""A difference with Holm's p below this gets a star."""
OTHERS = {"training": "the untrained model", "equal passes": "the baseline of as many passes"}
"""What a cell is compared with, where that is not the first value of an axis."""


def distinct(values: Iterable[Any]) -> list[Any]:
    """JSON values without their repetitions, in order."""
    return list({json.dumps(value): value for value in values}.values())


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


def pivots(
    tables: Sequence[Values], cells: Sequence[Values], compare: Sequence[str] = (), baselines: Sequence[str] = ()
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
            raise UserError(f"two of tables have the title {pivot.title!r}: choose one for each")
        if not pivot.show and not pivot.against:
            raise UserError(f"the table {pivot.title!r} shows nothing: set show or against")
        _check_names(pivot, cells, compared)
        kept = [{axis: value for axis, value in cell.items() if axis not in pivot.mean_over} for cell in cells]
        if not _places(pivot, distinct(kept)):
            raise UserError(f"no cell is in the table {pivot.title!r}: change its where")
        found.append(pivot)
    return found


def _check_names(pivot: Pivot, cells: Sequence[Values], compared: Sequence[str]) -> None:
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


def _places(pivot: Pivot, cells: Sequence[Values]) -> dict[tuple[str, str], int]:
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


def tables(pivots: Sequence[Pivot], summary: Values) -> list[Table]:
    """The tables that have cells in the summary so far."""
    return [table for pivot in pivots if (table := _table(pivot, summary)) is not None]


def _table(pivot: Pivot, summary: Values) -> Table | None:
    if pivot.mean_over:
        summary = next(pool for pool in summary["pools"] if pool["over"] == pivot.mean_over)
    entries = summary["cells"]
    places = _places(pivot, [{**entry["cell"], PLAN: entry["budget"]["nfe"]} for entry in entries])
    rows, columns = (list(dict.fromkeys(place[i] for place in places)) for i in (0, 1))
    several = len(pivot.show) + len(pivot.against) > 1
    shown: dict[str, list[str]] = {}
    for column in _grouped(columns):
        cells = [entries[places[row, column]] if (row, column) in places else None for row in rows]
        named = zip(pivot.columns, json.loads(column), strict=True)
        name = " ".join(
            _label(a, v) if isinstance(v, str) else f"{a.removeprefix('train.')}={_label(a, v)}" for a, v in named
        )
        for what, texts in _columns(cells, pivot, summary):
            if any(texts):
                shown[f"{name} {what}".strip() if several or not name else name] = texts
    if not shown:
        return None
    body = [
        [*map(_label, pivot.rows, json.loads(row)), *texts]
        for row, *texts in zip(rows, *shown.values(), strict=True)
        if any(texts)
    ]
    return Table([*pivot.rows, *shown], body, len(pivot.rows), pivot.title, list(_notes(pivot, summary)))


def _grouped(places: Sequence[str]) -> list[str]:
    """Places by their first axis, then the second and so on, each axis's values in the order in which they come."""
    orders = [list(dict.fromkeys(map(json.dumps, values))) for values in zip(*map(json.loads, places), strict=True)]
    return sorted(places, key=lambda p: [o.index(json.dumps(v)) for o, v in zip(orders, json.loads(p), strict=True)])


def _label(axis: str, value: Any) -> str:
    """A value as text; a model that no training has touched is called so."""
    return "untrained" if value is None and axis.startswith("train.") else plain(value)


def _difference(axis: str, pivot: Pivot) -> str:
    """How the table calls a comparison."""
    return "difference" if len(pivot.against) == 1 else f"difference ({axis})"


def _columns(cells: Sequence[Values | None], pivot: Pivot, summary: Values) -> Iterator[tuple[str, list[str]]]:
    """(What it is, its text in each row) of each quantity and comparison; nothing where the study has no cell."""
    for what in pivot.show:
        texts = ["" if cell is None else quantity(cell, what) for cell in cells]
        yield QUANTITIES[what], texts if what in METRICS else [text.removesuffix(".0") for text in texts]
    for axis in pivot.against:
        found = {json.dumps(d["cell"]): d for d in summary["differences"] if d["axis"] == axis}
        rows = [found.get(json.dumps(cell["cell"])) if cell else None for cell in cells]
        yield _difference(axis, pivot), [_starred(row, pivot.metric) if row else "" for row in rows]


def _starred(row: Values, metric: str) -> str:
    return points(row[metric], row[f"{metric}_interval"]) + "*" * (row[f"{metric}_holm"] < ALPHA)


def against(axis: str, summary: Values) -> str:
    """What the cells are compared with along an axis."""
    return OTHERS.get(axis) or f"the cell of {axis} {plain(summary['axes'][axis][0])}"


def _notes(pivot: Pivot, summary: Values) -> Iterator[str]:
    if len(pivot.show) == 1 and not pivot.against:
        yield f"Shown: {QUANTITIES[pivot.show[0]]}."
    runs = sorted({cell["seeds"] for cell in summary["cells"] if "updates" in cell["budget"]})
    if pivot.mean_over and runs:
        many = " to ".join(str(n) for n in dict.fromkeys((runs[0], runs[-1])))
        yield (
            f"Mean over {', '.join(pivot.mean_over)} and the seeds, {many} trainings each, which intervals and tests take as "
            "a sample of such trainings."
        )
    for axis in pivot.against:
        if count := sum(d["axis"] == axis for d in summary["differences"]):
            yield (
                f"{_difference(axis, pivot).capitalize()}: in points of {pivot.metric} from {against(axis, summary)}, paired "
                f"by problem; a star where it is clear after Holm's adjustment over all {count} of this kind."
            )
