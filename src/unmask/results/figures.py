"""The figure of results: accuracy against forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from unmask.results.statistics import pareto_front
from unmask.results.style import OTHER, SOFT, color, legend, look, marker, panels

Values = dict[str, Any]
NAMED = 24  # with more labels, a figure names those on a front alone


def evaluation_cells(summary: Values) -> list[Values]:
    """The cells of an evaluation's summary as ``accuracy`` draws them."""
    return [{"label": cell["decoder"], **cell} for cell in summary["cells"]]


def by_key(key: str, rows: Sequence[Values]) -> dict[Any, list[Values]]:
    """The rows of each value of a key, in their order."""
    return {value: [row for row in rows if row[key] == value] for value in dict.fromkeys(row[key] for row in rows)}


@look()
def accuracy(cells: Sequence[Values], metric: str = "solved", budget: float | None = None) -> Figure:
    """``metric`` against forward passes with 95 % intervals, a panel a task; the Pareto front stepped and numbered.

    Args:
        cells: rows with task, label, nfe, metric and its interval; those with ``aside`` are named, but on no front.
        budget: passes at which a line is drawn.
    """
    groups = by_key("task", cells)
    fronts = {task: front([c for c in own if not c.get("aside")], metric) for task, own in groups.items()}
    labels = list(dict.fromkeys(cell["label"] for cell in cells))
    if len(labels) > NAMED:
        named = [*(cell for front in fronts.values() for cell in front), *(c for c in cells if c.get("aside"))]
        labels = list(dict.fromkeys(cell["label"] for cell in named))
    figure, axes = panels(len(groups), 2, 5.2, 4.0)
    for axis, (task, own) in zip(axes, groups.items(), strict=True):
        passes = pd.Series([cell["nfe"] for cell in own])
        for cell, place in zip(own, spread_markers(passes), strict=True):
            number = labels.index(cell["label"]) + 1 if cell["label"] in labels else 0
            _point(axis, place, cell[metric], cell[f"{metric}_interval"], number, cell["label"])
            if any(cell is best for best in fronts[task]):
                axis.annotate(str(number), (place, 100 * cell[metric]), (-3, 5), textcoords="offset points", ha="right")
        if budget:
            axis.axvline(budget, color=SOFT, linestyle=":", label=f"budget, {budget:g} passes")
        right = max(2.1 * passes.min(), 1.4 * passes.max())
        best = [(cell["nfe"], 100 * cell[metric]) for cell in fronts[task]]
        best.append((right, best[-1][1]))
        axis.step(*zip(*best, strict=True), where="post", color=SOFT, linewidth=1, label="Pareto front")
        axis.set_xlim(passes.min() / 1.4, right)
        passes_axis(axis)
        axis.set_ylim(0, min(103, 1 + 112 * max(cell[f"{metric}_interval"][1] for cell in own)))
        axis.set_title(f"{task}, {_counts(own)}")
        axis.set_xlabel("forward passes a sequence (NFE), log scale")
        axis.set_ylabel("problems solved (%)" if metric == "solved" else f"{metric} (%)")
    legend(figure, axes)
    return figure


def front(cells: Sequence[Values], metric: str = "solved") -> list[Values]:
    """The cells on the Pareto front of ``metric`` against passes."""
    return pareto_front(cells, lambda cell: (cell["nfe"], cell[metric]))


def _point(axis: Axes, place: float, value: float, interval: Sequence[float], number: int, label: str) -> None:
    """A point with its interval and its number in the legend; gray and small where that is 0."""
    style: dict[str, Any] = {"fmt": "o", "color": OTHER, "markersize": 4, "elinewidth": 0.6, "zorder": 2}
    if number:
        style = {
            "fmt": marker(number - 1),
            "color": color(number - 1),
            "markersize": 6,
            "elinewidth": 1.1,
            "capsize": 2.5,
        }
    ends = [
        [max(0, 100 * end)] for end in (value - interval[0], interval[1] - value)
    ]  # a bootstrap's may round past it
    shown = f"{number}  {label}" if number else "on no front: see the tables"
    axis.errorbar(place, 100 * value, yerr=ends, label=shown, **style)


def passes_axis(axis: Axes) -> None:
    """A log axis of forward passes, after its data: ticks at powers of two, or round numbers where it has fewer than two."""
    axis.set_xscale("log", base=2)
    low, high = axis.get_xlim()
    if np.floor(np.log2(high)) - np.ceil(np.log2(low)) < 1:
        axis.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}")


def spread_markers(passes: pd.Series) -> pd.Series:
    """Passes with equal and near ones set slightly apart, in their order, around their middle."""
    order = passes.sort_values(kind="stable")
    near = order.groupby((order.pct_change() > 0.02).cumsum())
    step = np.minimum(0.03, 0.3 / near.transform("size"))
    return (order * np.exp(step * (near.cumcount() - (near.transform("size") - 1) / 2)))[passes.index]


def _counts(cells: Sequence[Values]) -> str:
    problems, seeds = (sorted({cell.get(key, 1) for cell in cells}) for key in ("problems", "seeds"))
    text = f"{' or '.join(map(str, problems))} problems"
    return text if seeds == [1] else f"{text}, {' or '.join(map(str, seeds))} seeds"
