"""A study's tables: those that ``tables`` of its file asks for, all cells, budgets and paired differences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.study import PLAN, SEEDS, Values, distinct
from benchmarks.study.summary import ALPHA, area_lines, summarize
from unmask.config import build, split_spec
from unmask.errors import UserError, unknown
from unmask.results.tables import METRICS, QUANTITIES, Table, plain, points, quantity

AGAINST = {"training": "the untrained model", "equal passes": "the baseline of as many passes"}
"""What a cell is compared with, where that is not the first value of an axis."""
AREA = "area % [95 %]"


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
    area: list[float] = field(default_factory=list)
    """From how many passes to how many: not decoders but presets, by the area under their accuracy against used passes."""
    against: list[str] = field(default_factory=list)
    """Comparisons: axes, ``training`` or ``equal passes``; differences of solved, or of the score where that alone is shown."""

    @property
    def metric(self) -> str:
        return "score" if "score" in self.show and "solved" not in self.show else "solved"

    @property
    def wanted(self) -> dict[str, list[Any]]:
        """The values that ``where`` leaves of each axis that it names."""
        return {axis: value if isinstance(value, list) else [value] for axis, value in self.where.items()}

    def place(self, cell: Values) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """Row and column, as text, of a cell with these values of the axes; None where it is not in the table."""
        if any(cell[axis] not in values for axis, values in self.wanted.items()):
            return None
        texts = {
            axis: "untrained" if value is None and axis.startswith("train.") else plain(value)
            for axis, value in cell.items()
        }
        words = {a: t if isinstance(cell[a], str) else f"{a.removeprefix('train.')}={t}" for a, t in texts.items()}
        return tuple(texts[axis] for axis in self.rows), tuple(words[axis] for axis in self.columns)


def pivots(
    tables: Sequence[Values],
    cells: Sequence[Values],
    compare: Sequence[str] = (),
    baselines: Sequence[str] = (),
    finished: bool = True,
) -> list[Pivot]:
    """The tables of a study's file.

    Args:
        tables, compare, baselines: as the file has them.
        cells: the value of every axis in each cell, and ``plan``.
        finished: whether these are all cells; else a table may still be empty.

    Raises:
        UserError: where a table names what the study does not have, is empty, or has two cells in one place.
    """
    found: list[Pivot] = []
    cells = distinct({axis: value for axis, value in cell.items() if axis not in SEEDS} for cell in cells)
    axes = list(cells[0])
    of_training = [axis for axis in axes if axis.startswith("train.")]
    for axis in compare:
        if axis not in axes:
            raise unknown("axis in compare", axis, axes)
    compared = [*(compare or (axis for axis in axes if axis not in ("task", PLAN)))]
    compared += ["training"] * bool(of_training) + ["equal passes"] * bool(baselines)
    for number, table in enumerate(tables, 1):
        for key in ("title", "rows"):
            if not table.get(key):
                raise UserError(f"table {number} of tables lacks {key}: add it")
        pivot = build(Pivot, table, f"table {number} of tables")
        own = f"the table {pivot.title!r}"
        if pivot.title in [before.title for before in found]:
            raise UserError(f"two of tables have the title {pivot.title!r}: choose one for each")
        if not pivot.show and not pivot.against:
            raise UserError(f"{own} shows nothing: set show or against")
        if pivot.area and (len(pivot.area) != 2 or not 1 <= pivot.area[0] < pivot.area[1]):
            raise UserError(f"area of {own} is {pivot.area}: give the least and the most passes, from 1 on")
        if pivot.area and {*pivot.show} - {"solved"}:
            raise UserError(f"{own} is of areas of problems solved: set show to [solved], or [] beside against")
        unknowable = [*pivot.mean_over, *([PLAN, "equal passes"] if pivot.area else [])]  # an area is of many plans
        for what, names, known in (
            ("axis of the training in mean_over of", pivot.mean_over, of_training),
            ("axis in", [*pivot.rows, *pivot.columns, *pivot.where], [a for a in axes if a not in unknowable]),
            ("comparison in", pivot.against, [a for a in compared if a not in unknowable]),
        ):
            for name in names:
                if name not in known:
                    raise unknown(f"{what} {own}", name, known)
        if finished:
            _check_places(pivot, [_of_preset(cell) for cell in cells] if pivot.area else cells)
        found.append(pivot)
    return found


def _of_preset(cell: Values) -> Values:
    return {**cell, "decoder": split_spec(cell["decoder"])[0], PLAN: 0}


def _check_places(pivot: Pivot, cells: Sequence[Values]) -> None:
    """Raises UserError for a value of ``where`` that no cell has, and for a table with no cell, or with two in one place."""
    for axis, values in pivot.wanted.items():
        known = distinct(cell[axis] for cell in cells)
        for value in values:
            if value not in known:
                raise unknown(f"{axis} in where of the table {pivot.title!r}", plain(value), map(plain, known))
    places: dict[Any, Values] = {}
    for cell in distinct(
        {axis: value for axis, value in cell.items() if axis not in pivot.mean_over} for cell in cells
    ):
        if (place := pivot.place(cell)) is None:
            continue
        if (other := places.setdefault(place, cell)) is not cell:
            differ = " or ".join(axis for axis in cell if cell[axis] != other[axis])
            raise UserError(
                f"two cells share a place in the table {pivot.title!r}: add {differ} to its rows, columns or where"
            )
    if not places:
        raise UserError(f"no cell is in the table {pivot.title!r}: change its where")


def read_out(
    lines: Sequence[Values], compare: Sequence[str] = (), baselines: Sequence[str] = (), pivots: Sequence[Pivot] = ()
) -> tuple[Values, list[Table]]:
    """``summarize``'s summary, and the tables that have cells in it so far."""
    asked = dict.fromkeys([((), ()), *((tuple(pivot.mean_over), tuple(pivot.area)) for pivot in pivots)])
    summaries = {
        (axes, area): summarize(area_lines(lines, area) if area else lines, compare, () if area else baselines, axes)
        for axes, area in asked
    }
    found = (_table(pivot, summaries[tuple(pivot.mean_over), tuple(pivot.area)]) for pivot in pivots)
    return summaries[(), ()], [table for table in found if table.rows]


def _table(pivot: Pivot, summary: Values) -> Table:
    texts: dict[tuple[str, ...], dict[tuple[tuple[str, ...], str], str]] = {}  # row -> column and heading -> text
    differences = {
        axis: {str(d["cell"]): d for d in summary["differences"] if d["axis"] == axis} for axis in pivot.against
    }
    for cell in summary["cells"]:
        if (place := pivot.place({**cell["cell"], PLAN: cell["budget"]["nfe"]})) is None:
            continue
        row, column = place
        own = texts.setdefault(row, {})
        for what in pivot.show:
            text = quantity(cell, what)
            own[column, AREA if pivot.area else QUANTITIES[what]] = text if what in METRICS else text.removesuffix(".0")
        for axis, rows in differences.items():
            d = rows.get(str(cell["cell"]))
            own[column, _difference_heading(axis, pivot)] = _starred(d, pivot.metric) if d else ""
    columns = list(dict.fromkeys(column for own in texts.values() for column, _ in own))
    orders = [list(dict.fromkeys(values)) for values in zip(*columns, strict=True)]  # by the first axis, then the next
    columns.sort(key=lambda column: [order.index(value) for order, value in zip(orders, column, strict=True)])
    kinds = [
        *(AREA if pivot.area else QUANTITIES[what] for what in pivot.show),
        *(_difference_heading(axis, pivot) for axis in pivot.against),
    ]
    shown = [(c, k) for c in columns for k in kinds if any(own.get((c, k)) for own in texts.values())]
    named = len(kinds) > 1 or not pivot.columns
    headings = [" ".join([*column, *[kind] * named]) for column, kind in shown]
    body = [[*row, *(own.get(key, "") for key in shown)] for row, own in texts.items() if any(own.values())]
    return Table(
        [*pivot.rows, *headings], body if shown else [], len(pivot.rows), pivot.title, [*_notes(pivot, summary)]
    )


def _difference_heading(axis: str, pivot: Pivot) -> str:
    return "difference" if len(pivot.against) == 1 else f"difference ({axis})"


def _starred(row: Values, metric: str) -> str:
    return points(row[metric], row[f"{metric}_interval"]) + "*" * (row[f"{metric}_holm"] < ALPHA)


def _notes(pivot: Pivot, summary: Values) -> Iterator[str]:
    if pivot.area:
        least, most = map(plain, pivot.area)
        yield (
            f"Shown: area under accuracy against used passes, the mean over log2 passes from {least} to {most}: a preset's "
            "decoders joined by straight lines, 0 left of the first, level right of the last. Intervals take passes as given."
        )
    elif len(pivot.show) == 1 and not pivot.against:
        yield f"Shown: {QUANTITIES[pivot.show[0]]}."
    runs = sorted({cell["seeds"] for cell in summary["cells"] if "updates" in cell["budget"]})
    if pivot.mean_over and runs:
        many = " to ".join(str(n) for n in dict.fromkeys((runs[0], runs[-1])))
        yield (
            f"Mean over {', '.join(pivot.mean_over)} and the seeds, {many} trainings each, which intervals and tests take as "
            "a sample of such trainings."
        )
    metric = "area" if pivot.area else pivot.metric
    for axis in pivot.against:
        if count := sum(d["axis"] == axis for d in summary["differences"]):
            other = AGAINST.get(axis) or f"the cell of {axis} {plain(summary['axes'][axis][0])}"
            yield (
                f"{_difference_heading(axis, pivot).capitalize()}: in points of {metric} from {other}, paired "
                f"by problem; a star where it is clear after Holm's adjustment over all {count} of this kind."
            )


def markdown(summary: Values, reading: Sequence[Table] = ()) -> str:
    """The summary as Markdown: the tables for reading, all cells, budgets, differences."""
    cells = cells_table(summary)
    text = "".join(table.titled_markdown() + "\n" for table in reading)
    text += f"**{cells.title}**\n\n" * bool(reading) + cells.markdown() + f"\n{describe(summary)}\n"
    return text + "".join(f"\n{table.title}:\n\n{table.markdown()}" for table in difference_tables(summary))


def cells_table(summary: Values) -> Table:
    """All cells, a row each."""
    axes, cells = list(summary["axes"]), summary["cells"]
    shown = [what for what in QUANTITIES if what != "seconds"]
    trained = any("updates" in c["budget"] for c in cells)
    rows = [
        [*(plain(c["cell"][a]) for a in axes), str(c["seeds"]), *(quantity(c, what) for what in shown)]
        + [f"{c['budget'].get('training_passes', 0) / 1000:.0f}"] * trained
        for c in cells
    ]
    headings = [*axes, "seeds", *(QUANTITIES[what] for what in shown)]
    headings += ["passes in training, at most (thousands)"] * trained
    return Table(headings, rows, len(axes), "All cells")


def describe(summary: Values) -> str:
    """What all cells have in common, and what their intervals and differences say."""
    budgets = {key.replace("_", " "): value for key, value in summary["budgets"].items()}
    equal = [f"{value:,} {name}" for name, value in budgets.items() if value is not None]
    differ = [name for name, value in budgets.items() if value is None]
    problems = sorted({c["problems"] for c in summary["cells"]})
    count, seeds = len(summary["differences"]), max(c["seeds"] for c in summary["cells"])
    text = f"{' or '.join(map(str, problems))} problems a cell and seed. "
    text += f"Every training has {' and '.join(equal)}. " if equal else ""
    text += f"They differ in {' and '.join(differ)}. " if differ else ""
    text += f"{count or 'No'} comparison{'s' * (count != 1)}."
    if count:
        text += (
            " An interval speaks of one comparison alone: of twenty without any true difference one is expected to leave zero "
            "out. Holm's p holds for all comparisons along one axis together."
        )
    if seeds > 1:
        text += (
            f" Problems and seeds are both resampled. {seeds} seeds say little of their spread, so each interval and p is "
            "the more careful of the bootstrap's and Student's t over the seeds."
        )
    return text


def difference_tables(summary: Values) -> list[Table]:
    """The paired differences, a table for each axis."""
    found = []
    for axis in dict.fromkeys(d["axis"] for d in summary["differences"]):
        other = {"training": None, "equal passes": "decoder"}.get(
            axis, axis
        )  # the axis in which the other cell differs
        named = [*(a for a in summary["axes"] if a != other), *([other] if other else [])]
        headings = [*named, *["against"] * bool(other), "NFE"]
        headings += [heading for metric in METRICS for heading in (f"{metric}, points [95 %]", "p (Holm)")]
        rows = []
        for d in (d for d in summary["differences"] if d["axis"] == axis):
            row = [plain(d["cell"][a]) for a in named] + ([plain(d["against"][other])] if other else [])
            row.append(f"{d['nfe'][0]:.1f} / {d['nfe'][1]:.1f}")
            for m in METRICS:
                row += [points(d[m], d[f"{m}_interval"]), f"{d[f'{m}_holm']:.2g}"]
            rows.append(row)
        title = f"Against {AGAINST.get(axis, f'the first {axis}')}"
        found.append(Table(headings, rows, len(named) + bool(other), title))
    return found
