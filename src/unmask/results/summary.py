"""What the cells of a study say: means with intervals over problems and seeds, paired differences, corrected for their number.

Everything here is a function of ``cells.jsonl`` and deterministic.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unmask.errors import UserError
from unmask.io.files import each_line
from unmask.io.schema import CELL, RUN, check_cell
from unmask.results import pivot as reading
from unmask.results.pivot import OTHERS, SEEDS, Pivot, Values
from unmask.results.statistics import Bootstrap, holm, student_half_width, student_p, wilson
from unmask.results.tables import METRICS, QUANTITIES, Table, plain, points, quantity

_FIX = "choose a complete folder"


def cell_lines(path: Path, fix: str = _FIX) -> list[Values]:
    """The lines of a cells.jsonl. Raises UserError, with ``fix`` as its end, where one is no cell."""
    return list(each_line(path, CELL, fix, check_cell))


def run_lines(path: Path, fix: str = _FIX) -> list[Values]:
    """The lines of a runs.jsonl. Raises UserError, with ``fix`` as its end, where one is no training."""
    return list(each_line(path, RUN, fix))


def read_cells(folder: Path) -> list[Values]:
    """The lines of a study's cells.jsonl. Raises UserError where there are none, or they are not those of one study."""
    cells = cell_lines(folder / "cells.jsonl")
    if not cells:
        raise UserError(f"{folder} holds no finished cell of a study (cells.jsonl): let it run first")
    if len({cell["key"] for cell in cells}) < len(cells):
        raise UserError(f"{folder / 'cells.jsonl'} holds a cell twice: {_FIX}")
    if any(set(cell["cell"]) != set(cells[0]["cell"]) for cell in cells):
        raise UserError(f"{folder / 'cells.jsonl'} holds cells with different axes: let unmask study write it again")
    return cells


class Group:
    """One setting under all its seeds, or all values of the ``pooled`` axes: (seeds, problems) arrays."""

    def __init__(self, cell: Values, lines: Sequence[Values], pooled: Sequence[str] = SEEDS) -> None:
        self.cell, self.lines, self.pooled = cell, lines, pooled
        self.trained = "updates" in lines[0]["budget"]
        self.seeds = [tuple(line["cell"].get(k) for k in pooled) for line in lines]
        self.problems = tuple(line["problems"] for line in lines)
        self.solved = [np.array([c == "1" for c in line["solved"]], dtype=float) for line in lines]
        self.points = [np.array(line["points"], dtype=float) for line in lines]
        self.possible = [np.array(line["possible"], dtype=float) for line in lines]

    def under(self, seeds: Collection[tuple[Any, ...]]) -> Group:
        """The same under some of its seeds."""
        lines = [line for line, own in zip(self.lines, self.seeds, strict=True) if own in seeds]
        return Group(self.cell, lines, self.pooled)

    def share(self, metric: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Numerators and denominators of a metric, an array a seed."""
        if metric == "solved":
            return self.solved, [np.ones_like(s) for s in self.solved]
        return self.points, self.possible

    def mean(self, metric: str) -> float:
        above, below = self.share(metric)
        return float(sum(a.sum() for a in above) / sum(b.sum() for b in below))

    def by_seed(self, metric: str) -> np.ndarray:
        """The metric under each seed, (seeds,)."""
        return np.array([a.sum() / b.sum() for a, b in zip(*self.share(metric), strict=True)])

    def column(self, name: str) -> np.ndarray:
        return np.concatenate([line[name] for line in self.lines])


def groups_of(cells: Sequence[Values], pooled: Sequence[str] = SEEDS) -> dict[str, Group]:
    """The cells of equal settings, ``pooled`` axes aside, by their settings as text."""
    found: dict[str, list[Values]] = {}
    for line in cells:
        setting = {k: v for k, v in line["cell"].items() if k not in pooled}
        found.setdefault(json.dumps(setting), []).append(line)
    return {key: Group(json.loads(key), lines, pooled) for key, lines in found.items()}


def summarize_study(
    cells: Sequence[Values], compare: Sequence[str] = (), baselines: Sequence[str] = (), pivots: Sequence[Pivot] = ()
) -> Values:
    """The summary of a study.

    Args:
        cells: lines of cells.jsonl in the order of the study.
        compare: axes along which every cell is compared with the one at the axis's first value; by default all but the task.
        baselines: decoders with which every other one of as many passes is compared.
        pivots: the tables for reading, for the means over more axes than the seeds that they ask for.

    Returns:
        ``axes`` with their values, ``cells`` with 95 % intervals, paired ``differences``,
        ``budgets``: what all trained cells have alike, and ``pools``: axes, cells and differences once more for each
        ``mean_over`` of the tables, named by ``over``.
    """
    groups = groups_of(cells)
    axes = _axes(groups)
    chosen = list(compare) or [axis for axis, values in axes.items() if len(values) > 1 and axis != "task"]
    summary = _compare_all(groups, chosen, baselines)
    trained = [g.lines[0]["budget"] for g in groups.values() if "updates" in g.lines[0]["budget"]]
    means = {tuple(pivot.mean_over): pivot.mean_over for pivot in pivots if pivot.mean_over}
    return {
        **summary,
        "budgets": {
            k: trained[0].get(k) if len({b.get(k) for b in trained}) == 1 else None
            for k in ("updates", "completions", "training_passes")
            if trained
        },
        "pools": [{"over": over, **_pooled(cells, over, chosen, baselines)} for over in means.values()],
    }


def _pooled(cells: Sequence[Values], over: Sequence[str], chosen: Sequence[str], baselines: Sequence[str]) -> Values:
    """Axes, cells and differences where the values of the axes ``over`` count as further seeds."""
    return _compare_all(groups_of(cells, (*SEEDS, *over)), [axis for axis in chosen if axis not in over], baselines)


def _compare_all(groups: dict[str, Group], chosen: Sequence[str], baselines: Sequence[str]) -> Values:
    """Axes, cells and differences of groups."""
    bootstrap = Bootstrap()
    axes = _axes(groups)
    untrained = {k: None for k in axes if k.startswith("train.")}
    differences = [d for axis in chosen for d in _along(axis, {axis: axes[axis][0]}, groups, bootstrap)]
    differences += _along("training", untrained, groups, bootstrap) if untrained else []
    differences += _at_equal_passes(baselines, groups, bootstrap)
    return {"axes": axes, "cells": [_cell(group, bootstrap) for group in groups.values()], "differences": differences}


def _axes(groups: dict[str, Group]) -> dict[str, list[Any]]:
    """Every axis with its values; those of a training are the trained models' own."""
    found: dict[str, dict[str, Any]] = {}
    for group in groups.values():
        for axis, value in group.cell.items():
            values = found.setdefault(axis, {})
            if not axis.startswith("train.") or group.trained:
                values[json.dumps(value)] = value
    return {axis: list(values.values()) for axis, values in found.items()}


def _cell(group: Group, bootstrap: Bootstrap) -> Values:
    nfe, committed = group.column("nfe"), group.column("committed")
    row: Values = {"cell": group.cell, "seeds": len(group.lines), "problems": len(group.solved[0])}
    for metric in METRICS:
        draws = bootstrap.draws(*group.share(metric), group.problems)
        row |= {metric: group.mean(metric), f"{metric}_interval": _interval(draws, group.by_seed(metric), 0)}
    if row["seeds"] == 1 or row["solved"] in (0, 1):  # as in an evaluation; right where all or none are solved
        row["solved_interval"] = list(wilson(int(group.solved[0].sum()), row["problems"]))
    return {
        **row,
        "score_name": group.lines[0]["score_name"],
        "nfe": float(nfe.mean()),
        "tokens_per_forward": float(committed.mean() / nfe.mean()),
        "length": float(group.column("length").mean()),
        "budget": group.lines[0]["budget"],
    }


def _interval(draws: np.ndarray, by_seed: np.ndarray, least: float) -> list[float]:
    """The bootstrap's 95 % interval, or that of the seeds' own values by Student's t where it reaches further: of few seeds a
    bootstrap understates the spread. Within ``least`` and 1, the values that there can be."""
    low, high = (float(q) for q in np.quantile(draws, [0.025, 0.975]))
    if len(by_seed) > 1:
        half, middle = student_half_width(by_seed.tolist()), float(by_seed.mean())
        low, high = min(low, middle - half), max(high, middle + half)
    return [max(low, least), min(high, 1.0)]


def _p(draws: np.ndarray, by_seed: np.ndarray) -> float:
    """The larger of the bootstrap's p and, of several seeds, that of a t test on their differences."""
    p, spread = Bootstrap.p(draws), float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else 0.0
    if not spread:
        return p
    return max(p, student_p(float(by_seed.mean()) / (spread / math.sqrt(len(by_seed))), len(by_seed) - 1))


def _along(axis: str, first: Values, groups: dict[str, Group], bootstrap: Bootstrap) -> list[Values]:
    """Every cell against the one that has the axis's ``first`` value and is else the same, on the same problems and under the
    seeds that both have.

    A model that no training has touched has one seed; it stands beside each seed of a trained one.
    """
    pairs = []
    for group in groups.values():
        other = groups.get(json.dumps({**group.cell, **first}))
        if other is None or other is group:
            continue
        if axis == "training":
            other = Group(other.cell, [*other.lines] * len(group.lines))
        elif both := [seed for seed in group.seeds if seed in other.seeds]:
            group, other = group.under(both), other.under(both)
        else:
            continue
        pairs.append((group, other))
    return _compared(axis, pairs, bootstrap)


def _at_equal_passes(baselines: Sequence[str], groups: dict[str, Group], bootstrap: Bootstrap) -> list[Values]:
    """Every cell against the baseline decoder whose plan allows as many passes, on the same problems of the same model; where
    there are several, against the one that has most other settings in common."""
    pairs = []
    for group in groups.values():
        if group.cell["decoder"] in baselines:
            continue
        equal = [
            other
            for other in groups.values()
            if other.cell["decoder"] in baselines
            and other.lines[0]["budget"]["nfe"] == group.lines[0]["budget"]["nfe"]
            and other.seeds == group.seeds
            and all(other.cell[k] == group.cell[k] for k in group.cell if k == "task" or k.startswith("train."))
        ]
        if equal:
            pairs.append((group, max(equal, key=lambda o: sum(o.cell[k] == group.cell[k] for k in group.cell))))
    return _compared("equal passes", pairs, bootstrap)


def _compared(axis: str, pairs: Sequence[tuple[Group, Group]], bootstrap: Bootstrap) -> list[Values]:
    """The differences of pairs with the same problems, with Holm's adjustment over all of them."""
    found = []
    for group, other in pairs:
        if other.problems != group.problems:
            continue
        row: Values = {"axis": axis, "cell": group.cell, "against": other.cell}
        for metric in METRICS:
            ours, theirs = (bootstrap.draws(*g.share(metric), g.problems) for g in (group, other))
            by_seed = group.by_seed(metric) - other.by_seed(metric)
            row |= {
                metric: group.mean(metric) - other.mean(metric),
                f"{metric}_interval": _interval(ours - theirs, by_seed, -1),
                f"{metric}_p": _p(ours - theirs, by_seed),
            }
        row["nfe"] = [float(group.column("nfe").mean()), float(other.column("nfe").mean())]
        found.append(row)
    for metric in METRICS:
        for row, adjusted in zip(found, holm([r[f"{metric}_p"] for r in found]), strict=True):
            row[f"{metric}_holm"] = adjusted
    return found


def markdown(summary: Values, pivots: Sequence[Pivot] = ()) -> str:
    """The summary as Markdown: the tables for reading, all cells, budgets, differences."""
    cells = cells_table(summary)
    text = "".join(table.titled_markdown() + "\n" for table in reading.tables(pivots, summary))
    text += f"**{cells.title}**\n\n" * bool(pivots) + cells.markdown() + f"\n{said(summary)}\n"
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


def said(summary: Values) -> str:
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
    return [_difference_table(axis, summary) for axis in dict.fromkeys(d["axis"] for d in summary["differences"])]


def _difference_table(axis: str, summary: Values) -> Table:
    other = {"training": None, "equal passes": "decoder"}.get(axis, axis)  # what the other cell is told by
    named = [*(a for a in summary["axes"] if a != other), *([other] if other else [])]
    headings = [*named, *(["against"] if other else []), "NFE"]
    for metric in METRICS:
        headings += [f"{metric}, points [95 %]", "p (Holm)"]
    rows = []
    for d in (d for d in summary["differences"] if d["axis"] == axis):
        row = [plain(d["cell"][a]) for a in named] + ([plain(d["against"][other])] if other else [])
        row.append(f"{d['nfe'][0]:.1f} / {d['nfe'][1]:.1f}")
        for m in METRICS:
            row += [points(d[m], d[f"{m}_interval"]), f"{d[f'{m}_holm']:.2g}"]
        rows.append(row)
    return Table(headings, rows, len(named) + bool(other), f"Against {OTHERS.get(axis, f'the first {axis}')}")
