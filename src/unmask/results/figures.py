"""Figures of results: accuracy against passes, differences, the steps of a decode, lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from unmask.io.files import slug
from unmask.results.collect import Result, differing, setting, varying
from unmask.results.style import (
    GRID,
    INK,
    OTHER,
    PANELS,
    PAPER,
    SOFT,
    Picture,
    color,
    legend,
    legible,
    marker,
    panels,
    picture,
)

_NAMED = 24  # with more results, a figure names those on a front alone
_LONG = 36  # characters of a label that no longer fits beside a point
_ROWS = 30  # at most so many rows, one above the other, in one figure
_END, _OTHER = color(3), color(0)


def front(results: Sequence[Result]) -> list[Result]:
    """Those that no other surpasses: no fewer passes and as many solved, nor as few passes and more solved; by passes."""
    best: list[Result] = []
    for result in sorted(results, key=lambda r: (r.numbers["nfe"], -r.numbers["solved"])):
        if not best or result.numbers["solved"] > best[-1].numbers["solved"]:
            best.append(result)
    return best


def accuracy(results: Sequence[Result]) -> Picture:
    """Problems solved against forward passes, a panel a task."""
    tasks = _tasks(results)
    labels = list(dict.fromkeys(r.label for r in results))
    if len(labels) > _NAMED:
        labels = list(dict.fromkeys(r.label for t in tasks for r in front([r for r in results if r.task == t])))
    figure, axes = panels(len(tasks), 2, 5.2, 4.0)
    names = []
    for axis, task in zip(axes, tasks, strict=True):
        own = [r for r in results if r.task == task]
        best = front(own)
        places = dict(zip(map(id, own), _spread_markers([r.numbers["nfe"] for r in own]), strict=True))
        for result in own:
            named = result.label in labels
            number = labels.index(result.label) if named else 0
            solved, (low, high) = result.numbers["solved"], result.numbers["solved_interval"]
            axis.errorbar(
                places[id(result)],
                100 * solved,
                yerr=[
                    [max(0, 100 * (solved - low))],
                    [max(0, 100 * (high - solved))],
                ],  # bootstrap ends may round past it
                fmt=marker(number) if named else "o",
                color=color(number) if named else OTHER,
                markersize=6.5 if named else 4,
                elinewidth=1.1 if named else 0.6,
                capsize=2.5 if named else 0,
                label=legible(result.label) if named else "on no front: see the tables",
                zorder=3 if named else 2,
            )
        passes = [places[id(r)] for r in best]
        left, right = _limits(list(places.values()), len(best[0].label) * (len(best[0].label) <= _LONG))
        heights = [100 * r.numbers["solved"] for r in best]
        axis.step(
            [*passes, right], [*heights, heights[-1]], where="post", color=SOFT, linewidth=1, label="Pareto front"
        )
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
        axis.xaxis.set_minor_locator(NullLocator())
        top = max(100 * r.numbers["solved_interval"][1] for r in own)
        axis.set(xlim=(left, right), ylim=(0, top * 1.12 + 1), xlabel="forward passes a sequence (NFE), log scale")
        axis.set_title(f"{task}, {_counts(own)}")
        axis.set_ylabel("problems solved (%)")
        names.append(_name_the_front(axis, [(r, places[id(r)]) for r in best]))
    legend(figure, axes)
    figure.draw_without_rendering()
    for axis, named_there in zip(axes, names, strict=True):
        _leave_to_the_legend(axis, named_there)
    said = "; ".join(f"{task}: {_on_front([r for r in results if r.task == task])}" for task in tasks)
    caption = (
        "Problems solved against forward passes, with 95 % intervals. The stepped line is the Pareto front: what is on it "
        f"solves more than anything measured with as few passes. On it are, for {said}. Equal or near numbers of passes "
        "are set slightly apart." + " Grey: what is on no front." * (len(labels) < len({r.label for r in results}))
    )
    return picture("front", caption, figure)


def _tasks(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(r.task for r in results))


def _counts(results: Sequence[Result]) -> str:
    problems = sorted({r.numbers["problems"] for r in results})
    seeds = sorted({r.numbers["seeds"] for r in results})
    text = f"{' or '.join(map(str, problems))} problems"
    return text if seeds == [1] else f"{text}, {' or '.join(map(str, seeds))} seeds"


def _on_front(results: Sequence[Result]) -> str:
    return ", ".join(
        f"{r.label} ({_short(r.numbers['nfe'])} passes, {100 * r.numbers['solved']:.1f} %)" for r in front(results)
    )


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _spread_markers(values: Sequence[float]) -> list[float]:
    """Values on a log axis, moved as little as leaves them in order and each some 4 % from the next: all markers are seen.

    Least squares under that order is isotonic regression of the values less their ranks' distances; neighbours are pooled.
    """
    step = min(0.045, 0.3 / len(values))
    order = sorted(range(len(values)), key=lambda i: values[i])
    blocks: list[list[float]] = []
    for rank, i in enumerate(order):
        blocks.append([float(np.log(values[i])) - step * rank])
        while len(blocks) > 1 and np.mean(blocks[-2]) >= np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    places = [np.mean(block) for block in blocks for _ in block]
    placed = {i: float(np.exp(place + step * rank)) for rank, (i, place) in enumerate(zip(order, places, strict=True))}
    return [placed[i] for i in range(len(values))]


def _limits(passes: Sequence[float], letters: int) -> tuple[float, float]:
    """Of an axis with a power of two in it, and with room for a label left of the first point."""
    first, right = min(passes), max(2.1 * min(passes), 1.4 * max(passes))
    room = min(0.6, 0.04 + 0.014 * letters)  # its share of the axis
    return first * (first / right) ** (room / (1 - room)), right


def _name_the_front(axis: Axes, best: Sequence[tuple[Result, float]]) -> list[Annotation]:
    """Labels above and left of the front, where by definition no point lies."""
    style: Any = {"textcoords": "offset points", "ha": "right", "fontsize": 8, "zorder": 5}
    names = [axis.annotate(r.label, (place, 100 * r.numbers["solved"]), (-7, 5), **style) for r, place in best]
    for name in names:
        name.set_in_layout(False)
        name.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground=PAPER)])
    return names


def _leave_to_the_legend(axis: Axes, names: Sequence[Annotation]) -> None:
    """Remove, of a figure that is laid out, labels that leave their panel or touch the one before."""
    panel, last = axis.get_window_extent(), None
    for name in names:
        place = name.get_window_extent()
        if place.x0 < panel.x0 or place.y1 > panel.y1 or (last is not None and place.overlaps(last)):
            name.remove()
        else:
            last = place


# ---- differences -----------------------------------------------------------------------------------------------------------


def differences(rows: Sequence[dict[str, Any]], stem: str, title: str) -> Iterator[Picture]:
    """Paired differences in problems solved along one axis, with intervals, in figures of up to 30 rows."""
    for part, some in _parts(list(zip(rows, _difference_names(rows), strict=True)), _ROWS):
        width = max(8.5, 5 + 0.08 * max(len(name) for _, name in some))
        figure = Figure(figsize=(width, 0.3 * len(some) + 1.3), layout="constrained")
        axis = figure.subplots()
        clear = [row["solved_holm"] < 0.05 for row, _ in some]
        for y, ((row, _), filled) in enumerate(zip(some, clear, strict=True)):
            axis.plot([100 * v for v in row["solved_interval"]], [y, y], color=INK, linewidth=1.3)
            axis.plot(100 * row["solved"], y, "o", color=INK, markersize=6, markerfacecolor=INK if filled else PAPER)
        axis.axvline(0, color=SOFT, linewidth=1)
        axis.set_yticks(range(len(some)), [name for _, name in some])
        axis.set(
            ylim=(len(some) - 0.4, -0.6), xlabel="difference in problems solved (percentage points), 95 % interval"
        )
        axis.grid(axis="y", visible=False)
        axis.set_title(title)
        caption = (
            f"{title}. Paired differences on the same problems; {sum(clear)} of {len(some)} are clear after Holm's adjustment "
            "(filled, p < 0.05), the others are hollow."
        )
        yield picture(stem + part, caption, figure)


def _difference_names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """``countdown: cj − untrained (full)``: what differs, and in brackets what else tells the rows apart."""
    telling = varying([row[side] for row in rows for side in ("cell", "against")])
    names = []
    for row in rows:
        apart = [k for k in differing(row) if k in telling]
        rest = setting(row["cell"], [k for k in telling if k not in (*apart, "task")])
        ours, theirs = (setting(row[side], apart) for side in ("cell", "against"))
        names.append(f"{row['cell']['task']}: {ours} − {theirs}" + (f" ({rest})" if rest else ""))
    return names


# ---- small multiples -------------------------------------------------------------------------------------------------------


def _parts(rows: Sequence[Any], size: int) -> Iterator[tuple[str, Sequence[Any]]]:
    """Pieces of up to ``size`` rows, with what tells their names apart."""
    for start in range(0, len(rows), size):
        yield f"-{start // size + 1}" if len(rows) > size else "", rows[start : start + size]


def _each_task(
    results: Sequence[Result], name: str, size: int, draw: Callable[[str, Sequence[Result]], tuple[Figure, str]]
) -> Iterator[Picture]:
    """``draw`` for the results of every task, in pieces."""
    for task in _tasks(results):
        for part, some in _parts([r for r in results if r.task == task], size):
            figure, caption = draw(task, some)
            yield picture(f"{name}-{slug(task)}{part}", f"{task}: {caption}", figure)


def steps(results: Sequence[Result]) -> Iterator[Picture]:
    """End tokens and confidence over the steps, a panel a decoder."""
    return _each_task([r for r in results if "eos_share" in r.curves], "steps", PANELS, _steps)


def _steps(task: str, results: Sequence[Result]) -> tuple[Figure, str]:
    figure, axes = panels(len(results), 3, 3.4, 2.4, sharey=True)
    for axis, result in zip(axes, results, strict=True):
        curves = result.curves
        at = np.arange(1, len(curves["eos_share"]) + 1)
        few = 24 / max(24, len(at))
        axis.bar(
            at, curves["eos_share"], width=0.9, color=_END, alpha=0.3, label="share of end tokens among the commits"
        )
        for key, colour_, fmt, label in (
            ("end_confidence", _END, "s--", "probability of the committed end tokens"),
            ("other_confidence", _OTHER, "o-", "probability of the other committed tokens"),
        ):
            axis.plot(at, curves[key], fmt, color=colour_, markersize=1.5 + 2.5 * few, linewidth=1.2, label=label)
        axis.set_title(fill(result.label, 34))
        axis.set(xlim=(0.3, len(at) + 0.7), ylim=(0, 1.04), xlabel="step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    legend(figure, axes)
    return figure, (
        "what each step commits. Bars: the share of end tokens among the tokens committed. Lines: the mean probability of the "
        "committed end tokens and of the others. A step that commits nothing of a kind has no point."
    )


def order(results: Sequence[Result]) -> Iterator[Picture]:
    """When each part of the canvas is committed, a heat map a decoder."""
    return _each_task([r for r in results if "order" in r.curves], "order", PANELS, _order)


def _order(task: str, results: Sequence[Result]) -> tuple[Figure, str]:
    figure, axes = panels(len(results), 4, 2.6, 2.3, sharex=True, sharey=True)
    for axis, result in zip(axes, results, strict=True):
        shares = np.ma.masked_invalid(_forward_fill(result.curves["order"]))
        image = axis.imshow(
            shares, cmap="cividis", vmin=0, vmax=1, extent=(0, 100, 100, 0), aspect="auto", interpolation="nearest"
        )
        axis.set_title(fill(result.label, 24))
        axis.set_facecolor(GRID)
        axis.grid(visible=False)
        axis.set(xticks=(0, 50, 100), yticks=(0, 50, 100))
    bar = figure.colorbar(image, ax=axes, shrink=0.9, aspect=30, pad=0.02)
    bar.set_label("share of the position's commits")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.supxlabel("position in the canvas (%)", fontsize=9)
    figure.supylabel("progress (% of the steps)", fontsize=9)
    return figure, (
        "when each part of the canvas is committed. Time runs downwards: a decoder that writes from left to right draws a "
        "diagonal from the top left, one that fills the end first a bright top right. Grey was never committed."
    )


def _forward_fill(shares: np.ndarray) -> np.ndarray:
    """A decode of fewer steps than there are parts of time leaves parts empty: there, the step before is still under way."""
    starts = [time for time, row in enumerate(shares) if np.nansum(row) > 0]
    longest = max(np.diff(starts), default=len(shares))
    return np.stack([shares[max((s for s in starts if t - longest < s <= t), default=t)] for t in range(len(shares))])


def lengths(results: Sequence[Result]) -> Iterator[Picture]:
    """Distributions of text lengths, one above the other."""
    return _each_task([r for r in results if r.lengths], "lengths", _ROWS, _lengths)


def _lengths(task: str, results: Sequence[Result]) -> tuple[Figure, str]:
    figure = Figure(figsize=(8.5, 0.5 * len(results) + 1.0), layout="constrained")
    axis = figure.subplots()
    shortest, longest = min(min(r.lengths) for r in results), max(max(r.lengths) for r in results)
    width = (longest - shortest) // 60 + 1
    edges = np.arange(shortest - 0.5, longest + width, width)
    for row, result in enumerate(results):
        counts = np.histogram(result.lengths, edges)[0]
        floor = len(results) - 1 - row
        axis.stairs(floor + 0.8 * counts / counts.max(), edges, baseline=floor, fill=True, color=_OTHER, alpha=0.55)
        median = float(np.median(result.lengths))
        axis.plot([median, median], [floor, floor + 0.8], color=_END, linewidth=2)
        axis.annotate(
            f"median {_short(median)}", (1.01, floor + 0.25), xycoords=("axes fraction", "data"), color=SOFT, fontsize=8
        )
    axis.set_yticks([len(results) - 1 - i + 0.3 for i in range(len(results))], [fill(r.label, 40) for r in results])
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    axis.set(
        xlim=(edges[0] - width, edges[-1] + width),
        ylim=(-0.1, len(results)),
        xlabel="tokens before the first end token",
    )
    axis.set_title(task)
    return figure, "lengths of the texts, each row scaled to its own peak; the upright line is the median."
