"""Figures of a report: accuracy against passes, differences, the steps of a decode, lengths, curves of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from benchmarks.study.summary import ALPHA
from unmask.io.files import slug
from unmask.results.figures import NAMED, Values, accuracy, by_key, front
from unmask.results.style import COLORS, INK, SOFT, color, legend, look, panels

PANELS, ROWS = 12, 30  # at most so many panels, or rows one above the other, in one figure
_END, _OTHER = color(3), color(0)
_EXACT = 1e-6  # mismatches below it are rounding
_CURVES = {
    "eval_reward": "validation: mean reward",
    "reward": "mean reward of the rollouts",
    "agreement": "commits in which the student agrees with its teacher",
    "length": "tokens before the first end token",
    "logprob_mismatch": "log-prob mismatch (nats a token)",
    "entropy": "entropy of scored tokens (nats)",
    "groups_without_variance": "groups without variance",
    "kl": "KL to the starting policy (nats a token)",
}


_LINES = ("-", "--", "-.", ":")


def task_of(key: str) -> str:
    """``eval_sudoku_solved`` -> ``sudoku``."""
    return key.removeprefix("eval_").removesuffix("_solved")


@dataclass(frozen=True)
class Picture:
    """A figure, the name of its files, and its caption, which is also read out in its place."""

    stem: str
    caption: str
    figure: Figure


def accuracy_picture(cells: Sequence[Values]) -> Picture:
    """``accuracy`` with a caption that names what is on the front."""
    said = []
    for task, own in by_key("task", cells).items():
        best = [f"{c['label']} ({c['nfe']:.3g} passes, {100 * c['solved']:.1f} %)" for c in front(own)]
        said.append(f"{task}: {', '.join(best)}")
    caption = (
        "Problems solved against forward passes, with 95 % intervals. The stepped line is the Pareto front: what is on it "
        f"solves more than anything measured with as few passes. On it are, for {'; '.join(said)}. Equal and near numbers of "
        "passes are set slightly apart." + " Gray: what is on no front." * (len({c["label"] for c in cells}) > NAMED)
    )
    return Picture("front", caption, accuracy(cells))


# ---- differences -----------------------------------------------------------------------------------------------------------


def differences(rows: Sequence[tuple[Values, str]], folder: str = "") -> list[Picture]:
    """Paired differences in problems solved, with their names: a figure (of up to 30 rows) for each axis.

    folder: named where there are several studies.
    """
    pictures = []
    titles = {"training": "untrained", "equal passes": "the baseline of as many passes"}
    for axis in dict.fromkeys(row["axis"] for row, _ in rows):
        title = f"{axis}: each against {titles.get(axis, 'its first value')}" + f" in {folder}" * bool(folder)
        stem = f"differences-{slug(f'{folder}-{axis}' if folder else axis)}"
        for part, some in pieces([(row, name) for row, name in rows if row["axis"] == axis], ROWS):
            pictures.append(Picture(stem + part, *_differences(some, title)))
    return pictures


@look()
def _differences(rows: Sequence[tuple[Values, str]], title: str) -> tuple[str, Figure]:
    width = max(8.5, 5 + 0.08 * max(len(name) for _, name in rows))
    figure = Figure(figsize=(width, 0.3 * len(rows) + 1.3), layout="constrained")
    axis = figure.subplots()
    clear = [row["solved_holm"] < ALPHA for row, _ in rows]
    for y, ((row, _), filled) in enumerate(zip(rows, clear, strict=True)):
        axis.plot([100 * v for v in row["solved_interval"]], [y, y], color=INK, linewidth=1.3)
        axis.plot(100 * row["solved"], y, "o", color=INK, markersize=6, markerfacecolor=INK if filled else "white")
    axis.axvline(0, color=SOFT, linewidth=1)
    axis.set_yticks(range(len(rows)), [name for _, name in rows])
    axis.set(ylim=(len(rows) - 0.4, -0.6), xlabel="difference in problems solved (percentage points), 95 % interval")
    axis.grid(axis="y", visible=False)
    axis.set_title(title)
    return (
        f"{title}. Paired differences on the same problems; {sum(clear)} of {len(rows)} are clear after Holm's adjustment "
        f"(filled, p < {ALPHA}), the others are hollow."
    ), figure


# ---- small multiples ----------------------------------------------------------------------------------------------------


def pieces(rows: Sequence[Any], size: int) -> Iterator[tuple[str, Sequence[Any]]]:
    """Pieces of up to ``size`` rows, with what tells their names apart."""
    for start in range(0, len(rows), size):
        yield f"-{start // size + 1}" if len(rows) > size else "", rows[start : start + size]


@look()
def _each_task(
    cells: Sequence[Values], name: str, size: int, draw: Callable[[str, Sequence[Values]], tuple[str, Figure]]
) -> list[Picture]:
    """``draw`` for the cells of every task, in pieces."""
    pictures = []
    for task, own in by_key("task", cells).items():
        for part, some in pieces(own, size):
            caption, figure = draw(task, some)
            pictures.append(Picture(f"{name}-{slug(task)}{part}", f"{task}: {caption}", figure))
    return pictures


def steps(cells: Sequence[Values]) -> list[Picture]:
    """End tokens and confidence over the steps, a panel a decoder."""
    return _each_task([c for c in cells if "eos_share" in c["curves"]], "steps", PANELS, _steps)


def _steps(task: str, cells: Sequence[Values]) -> tuple[str, Figure]:
    figure, axes = panels(len(cells), 3, 3.4, 2.4, sharey=True)
    for axis, cell in zip(axes, cells, strict=True):
        curves = cell["curves"]
        share, ends, others = (np.array(curves[k], float) for k in ("eos_share", "end_confidence", "other_confidence"))
        at = np.arange(1, len(share) + 1)
        style: Any = {"markersize": 1.5 + 60 / max(24, len(at)), "linewidth": 1.2}
        axis.bar(at, share, width=0.9, color=_END, alpha=0.3, label="share of end tokens among the commits")
        axis.plot(at, ends, "s--", color=_END, label="probability of the committed end tokens", **style)
        axis.plot(at, others, "o-", color=_OTHER, label="probability of the other committed tokens", **style)
        axis.set_title(fill(cell["label"], 34))
        axis.set(xlim=(0.3, len(at) + 0.7), ylim=(0, 1.04), xlabel="step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    legend(figure, axes)
    return (
        "what each step commits. Bars: the share of end tokens among the tokens committed. Lines: the mean probability of the "
        "committed end tokens and of the others. A step that commits nothing of a kind has no point."
    ), figure


def order(cells: Sequence[Values]) -> list[Picture]:
    """When each part of the canvas is committed, a heat map a decoder."""
    return _each_task([c for c in cells if "order" in c["curves"]], "order", PANELS, _order)


def _order(task: str, cells: Sequence[Values]) -> tuple[str, Figure]:
    figure, axes = panels(len(cells), 4, 2.6, 2.3, sharex=True, sharey=True)
    for axis, cell in zip(axes, cells, strict=True):
        shares = np.ma.masked_invalid(forward_fill(cell["curves"]["order"]))
        style: Any = {"cmap": "cividis", "extent": (0, 100, 100, 0), "aspect": "auto", "interpolation": "nearest"}
        image = axis.imshow(shares, vmin=0, vmax=1, **style)
        axis.set_title(fill(cell["label"], 24))
        axis.set_facecolor("#d5d9df")
        axis.grid(visible=False)
        axis.set(xticks=(0, 50, 100), yticks=(0, 50, 100))
    bar = figure.colorbar(image, ax=axes, shrink=0.9, aspect=30, pad=0.02)
    bar.set_label("share of the position's commits")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.supxlabel("position in the canvas (%)", fontsize=9)
    figure.supylabel("progress (% of the steps)", fontsize=9)
    return (
        "when each part of the canvas is committed. Time runs downwards: a decoder that writes from left to right draws a "
        "diagonal from the top left, one that fills the end first a bright top right. Grey was never committed."
    ), figure


def forward_fill(shares: np.ndarray) -> np.ndarray:
    """A decode of fewer steps than there are parts of time leaves parts empty: there, the step before is still under way."""
    starts = [time for time, row in enumerate(shares) if np.nansum(row) > 0]
    longest = max(np.diff(starts), default=len(shares))
    return np.stack([shares[max((s for s in starts if t - longest < s <= t), default=t)] for t in range(len(shares))])


def lengths(cells: Sequence[Values]) -> list[Picture]:
    """Distributions of text lengths, one above the other."""
    return _each_task([c for c in cells if c["lengths"]], "lengths", ROWS, _lengths)


def _lengths(task: str, cells: Sequence[Values]) -> tuple[str, Figure]:
    figure = Figure(figsize=(8.5, 0.5 * len(cells) + 1.0), layout="constrained")
    axis = figure.subplots()
    names = [fill(cell["label"], 40) for cell in cells]
    found = [cell["lengths"] for cell in cells]
    axis.boxplot(found, orientation="horizontal", tick_labels=names, widths=0.6, flierprops={"markersize": 3})
    axis.invert_yaxis()
    axis.set(xlabel="tokens before the first end token", title=task)
    return "lengths of the texts: median, quartiles, and what lies far from them.", figure


# ---- training --------------------------------------------------------------------------------------------------------------


@look()
def training(runs: Sequence[Values]) -> Picture:
    """Validation accuracy, reward, length, log-prob mismatch and more over the updates; the mean over seeds and their range."""
    names = list(dict.fromkeys(key for run in runs for key in run["metrics"]))
    shown = {key: f"{task_of(key)}: validation solved" for key in names if key.endswith("_solved")}
    shown |= {key: title for key, title in _CURVES.items() if key in names}
    figure, axes = panels(len(shown), 3, 3.6, 2.6)
    for axis, (key, title) in zip(axes, shown.items(), strict=True):
        measured = key.startswith("eval_")
        for number, (label, own) in enumerate(by_key("label", runs).items()):
            seeds = over_seeds([run["metrics"][key] for run in own if key in run["metrics"]], 1 if measured else 10)
            style: Any = {"color": color(number), "linestyle": line(number), "marker": "o" if measured else ""}
            axis.plot(seeds["mean"], label=legible(label), linewidth=1.5, markersize=4, **style)
            axis.fill_between(seeds.index, seeds["min"], seeds["max"], alpha=0.18, color=color(number), linewidth=0)
        axis.set_title(title)
        axis.set_xlabel("update")
        # Where all is rounding, a linear axis has round ticks.
        if key == "logprob_mismatch" and axis.get_ylim()[1] > _EXACT:
            axis.set_yscale("symlog", linthresh=_EXACT)
            axis.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
        if key in ("logprob_mismatch", "kl"):
            axis.set_ylim(bottom=0)
        if key.endswith("_solved") or key == "groups_without_variance":
            axis.set_ylim(0, min(axis.get_ylim()[1], 1.03))
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    legend(figure, axes)
    caption = (
        "Training over the updates, a line a setting: the mean over its seeds, with their range as a band. What is logged at "
        "every update is a running mean over ten."
    )
    return Picture("curves", caption, figure)


def over_seeds(curves: Sequence[pd.Series], window: int) -> pd.DataFrame:
    """Mean, min and max of running means over ``window`` entries, at the updates that all seeds have."""
    smooth = [curve.dropna().rolling(window, min_periods=1).mean() for curve in curves]
    if not smooth:
        return pd.DataFrame(index=pd.RangeIndex(0), columns=["mean", "min", "max"], dtype=float)
    return pd.concat(smooth, axis=1, join="inner").sort_index().agg(["mean", "min", "max"], axis=1)


def line(number: int) -> str:
    return _LINES[(number + number // len(COLORS)) % len(_LINES)]


def legible(label: str) -> str:
    """A label that matplotlib shows: what starts with an underscore it takes for hidden."""
    return f" {label}" if label.startswith("_") else label
