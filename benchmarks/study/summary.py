"""What the cells of a study say: means with intervals over problems and seeds, paired differences, corrected for their number.

Everything here is a function of the lines of cells.jsonl and deterministic.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.integrate import trapezoid

from benchmarks.study import SEEDS, Values
from benchmarks.study.statistics import Bootstrap, holm, student_half_width, student_p
from unmask.config import split_spec
from unmask.results.statistics import wilson
from unmask.results.tables import METRICS

Groups = dict[str, "Group"]
ALPHA = 0.05
"""A difference with Holm's p below this is clear."""


class Group:
    """One setting under all its seeds, or all values of the ``pooled`` axes: a (problems,) array of each seed.

    ``shares``: metric -> numerators and denominators. ``passes``: what the plan allows.
    """

    def __init__(self, cell: Values, lines: Sequence[Values], pooled: Sequence[str] = SEEDS) -> None:
        self.cell, self.lines, self.pooled = cell, lines, pooled
        self.seeds = [tuple(line["cell"].get(k) for k in pooled) for line in lines]
        self.problems = [line["problems"] for line in lines]
        self.budget: Values = lines[0]["budget"]
        solved = [np.array([float(share) for share in line["solved"]]) for line in lines]
        points, possible = ([np.array(line[k], dtype=float) for line in lines] for k in ("points", "possible"))
        self.shares = {"solved": (solved, [np.ones_like(s) for s in solved]), "score": (points, possible)}

    def under(self, seeds: Collection[tuple[Any, ...]]) -> Group:
        """The same under some of its seeds."""
        lines = [line for line, own in zip(self.lines, self.seeds, strict=True) if own in seeds]
        return Group(self.cell, lines, self.pooled)

    def mean(self, metric: str) -> float:
        above, below = self.shares[metric]
        return float(sum(a.sum() for a in above) / sum(b.sum() for b in below))

    def by_seed(self, metric: str) -> np.ndarray:
        """The metric under each seed, (seeds,)."""
        return np.array([a.sum() / b.sum() for a, b in zip(*self.shares[metric], strict=True)])

    def draws(self, metric: str, bootstrap: Bootstrap) -> np.ndarray:
        return bootstrap.draws(*self.shares[metric], self.problems)

    def average(self, name: str) -> float:
        """Mean of a list of the lines over problems and seeds."""
        return float(np.concatenate([line[name] for line in self.lines]).mean())


def groups_of(lines: Sequence[Values], pooled: Sequence[str] = SEEDS) -> Groups:
    """The lines of equal settings, ``pooled`` axes aside, by their settings as text."""
    found: dict[str, list[Values]] = {}
    for line in lines:
        setting = {k: v for k, v in line["cell"].items() if k not in pooled}
        found.setdefault(json.dumps(setting), []).append(line)
    return {key: Group(json.loads(key), own, pooled) for key, own in found.items()}


def area_lines(lines: Sequence[Values], passes: Sequence[float]) -> list[Values]:
    """Lines of presets instead of decoders: the area under accuracy against used passes.

    A preset's curve joins the means of its decoders with straight lines over log2 passes, is 0 left of the first and level
    right of the last; its area is the curve's mean over log2 passes between the two ``passes``. It is a sum of the decoders'
    shares, with weights that follow from their mean passes, so it has a value a problem, in ``solved``.
    """
    curves: dict[str, list[Values]] = {}
    for line in lines:
        preset = split_spec(line["cell"]["decoder"])[0]
        curves.setdefault(json.dumps({**line["cell"], "decoder": preset}), []).append(line)
    found = []
    for cell, own in curves.items():
        weights = area_weights([float(np.mean(line["nfe"])) for line in own], *passes)
        shares = (weights @ np.array([[float(c) for c in line["solved"]] for line in own])).tolist()
        found.append(
            {**own[0], "cell": json.loads(cell), "solved": shares, "points": shares, "possible": [1.0] * len(shares)}
        )
    return found


def area_weights(used: Sequence[float], least: float, most: float) -> np.ndarray:
    """What the shares at ``used`` passes weigh in the area between ``least`` and ``most`` passes; (decoders,) float64."""
    places, number, count = np.unique(np.log2(used), return_inverse=True, return_counts=True)
    low, high = math.log2(least), math.log2(most)
    begin = min(max(low, places[0]), high)
    grid = np.unique([begin, high, *places[(places > begin) & (places < high)]])
    areas = [trapezoid(np.interp(grid, places, unit), grid) for unit in np.eye(len(places))]
    return (np.array(areas) / count)[number] / (high - low)


def summarize(
    lines: Sequence[Values], compare: Sequence[str] = (), baselines: Sequence[str] = (), mean_over: Sequence[str] = ()
) -> Values:
    """The summary of a study.

    Args:
        lines: those of cells.jsonl in the order of the study.
        compare: axes along which every cell is compared with the one at the axis's first value; by default all but the task.
        baselines: decoders with which every other one of as many passes is compared.
        mean_over: axes whose values count as further seeds.

    Returns:
        ``axes`` with their values, ``cells`` with 95 % intervals, paired ``differences``, and ``budgets``: what all trained
        cells have alike, None where they differ.
    """
    groups, bootstrap = groups_of(lines, (*SEEDS, *mean_over)), Bootstrap()
    axes = _axes(groups)
    along = list(compare) or [axis for axis, values in axes.items() if len(values) > 1 and axis != "task"]
    differences: list[Values] = []
    for axis, pairs in _pairs(groups, axes, [axis for axis in along if axis not in mean_over], baselines):
        found = [_difference(axis, *pair, bootstrap) for pair in pairs if pair[0].problems == pair[1].problems]
        for metric in METRICS:
            for row, adjusted in zip(found, holm([row[f"{metric}_p"] for row in found]), strict=True):
                row[f"{metric}_holm"] = adjusted
        differences += found
    trained = [g.budget for g in groups.values() if "updates" in g.budget]
    keys = ("updates", "completions", "training_passes") if trained else ()
    budgets = {key: trained[0][key] if len({b[key] for b in trained}) == 1 else None for key in keys}
    cells = [_cell(group, bootstrap) for group in groups.values()]
    return {"axes": axes, "cells": cells, "differences": differences, "budgets": budgets}


def _axes(groups: Groups) -> dict[str, list[Any]]:
    """Every axis with its values; those of a training are the trained models' own."""
    found: dict[str, dict[str, Any]] = {}
    for group in groups.values():
        for axis, value in group.cell.items():
            values = found.setdefault(axis, {})
            if not axis.startswith("train.") or "updates" in group.budget:
                values[json.dumps(value)] = value
    return {axis: list(values.values()) for axis, values in found.items()}


def _cell(group: Group, bootstrap: Bootstrap) -> Values:
    solved, _ = group.shares["solved"]
    row: Values = {"cell": group.cell, "seeds": len(group.lines), "problems": len(solved[0]), "budget": group.budget}
    for metric in METRICS:
        interval = _interval(group.draws(metric, bootstrap), group.by_seed(metric), 0)
        row |= {metric: group.mean(metric), f"{metric}_interval": interval}
    counted = isinstance(group.lines[0]["solved"], str)
    # As in an evaluation; right where all or none are solved.
    if counted and (row["seeds"] == 1 or row["solved"] in (0, 1)):
        row["solved_interval"] = list(wilson(int(solved[0].sum()), row["problems"]))
    row |= {name: group.average(name) for name in ("nfe", "length")}
    tokens_per_forward = group.average("committed") / row["nfe"]
    return {**row, "tokens_per_forward": tokens_per_forward, "score_name": group.lines[0]["score_name"]}


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


def _pairs(
    groups: Groups, axes: dict[str, list[Any]], compare: Sequence[str], baselines: Sequence[str]
) -> Iterator[tuple[str, list[tuple[Group, Group]]]]:
    """What is compared with what, by the name of the comparison: every cell with the one that has an axis's first value and is
    else the same, under the seeds that both have; a trained model with the untrained one, which has one seed, beside each of
    its seeds; and a decoder with the baseline of as many passes, of several with the one that has most settings in common."""
    for axis in compare:
        pairs = []
        for group in groups.values():
            other = groups.get(json.dumps({**group.cell, axis: axes[axis][0]}))
            if other and other is not group and (both := [seed for seed in group.seeds if seed in other.seeds]):
                pairs.append((group.under(both), other.under(both)))
        yield axis, pairs
    untrained = {axis: None for axis in axes if axis.startswith("train.")}
    others = [(group, groups.get(json.dumps({**group.cell, **untrained}))) for group in groups.values() if untrained]
    pairs = [(g, Group(o.cell, [*o.lines] * len(g.lines))) for g, o in others if o is not None and o is not g]
    yield "training", pairs
    pairs = []
    for group in groups.values():
        fixed = ["task", *untrained]
        equal = [
            other
            for other in groups.values()
            if other.cell["decoder"] in baselines
            and other.budget["nfe"] == group.budget["nfe"]
            and other.seeds == group.seeds
            and all(other.cell[k] == group.cell[k] for k in fixed)
        ]
        if equal and group.cell["decoder"] not in baselines:
            pairs.append((group, max(equal, key=lambda o: sum(o.cell[k] == group.cell[k] for k in group.cell))))
    yield "equal passes", pairs


def _difference(axis: str, group: Group, other: Group, bootstrap: Bootstrap) -> Values:
    """The paired difference of two groups with the same problems."""
    nfe = [group.average("nfe"), other.average("nfe")]
    row: Values = {"axis": axis, "cell": group.cell, "against": other.cell, "nfe": nfe}
    for metric in METRICS:
        draws = group.draws(metric, bootstrap) - other.draws(metric, bootstrap)
        by_seed = group.by_seed(metric) - other.by_seed(metric)
        row |= {
            metric: group.mean(metric) - other.mean(metric),
            f"{metric}_interval": _interval(draws, by_seed, -1),
            f"{metric}_p": _p(draws, by_seed),
        }
    return row
