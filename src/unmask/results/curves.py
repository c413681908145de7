"""Curves of training runs over the updates, one line a setting with a band over its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import PercentFormatter

from unmask.results.accuracy import share_axis
from unmask.results.collect import Curve, Run
from unmask.results.style import Picture, color, legend, legible, line, panels, picture

_PANELS = (
    ("eval_reward", "validation: mean reward"),
    ("reward", "mean reward of the rollouts"),
    ("length", "tokens before the first end token"),
    ("logprob_mismatch", "log-prob mismatch (nats a token)"),
    ("entropy", "entropy of scored tokens (nats)"),
    ("groups_without_variance", "groups without variance"),
    ("kl", "KL to the starting policy (nats a token)"),
)


_EXACT = 1e-6
"""Mismatches below it are rounding."""


def task_of(key: str) -> str:
    """``eval_sudoku_solved`` -> ``sudoku``."""
    return key.removeprefix("eval_").removesuffix("_solved")


def smooth(curve: Curve, window: int) -> Curve:
    """Running mean over the last ``window`` entries."""
    steps = sorted(curve)
    values = [curve[s] for s in steps]
    return {s: sum(part := values[max(0, i + 1 - window) : i + 1]) / len(part) for i, s in enumerate(steps)}


def band(seeds: Sequence[Curve]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Updates that all seeds have, and the seeds' mean, least and largest value at each."""
    steps = sorted(set.intersection(*(set(c) for c in seeds)))
    values = [[c[s] for c in seeds] for s in steps]
    return steps, [sum(v) / len(v) for v in values], list(map(min, values)), list(map(max, values))


def curves(runs: Sequence[Run]) -> Picture:
    """Validation accuracy, reward, length, log-prob mismatch and more over the updates; the mean over seeds and their range."""
    names = list(dict.fromkeys(k for run in runs for k in run.curves))
    shown = [(k, f"{task_of(k)}: validation solved") for k in names if k.endswith("_solved")]
    shown += [(k, title) for k, title in _PANELS if k in names]
    figure, axes = panels(len(shown), 3, 3.6, 2.6)
    for axis, (key, title) in zip(axes, shown, strict=True):
        for number, label in enumerate(dict.fromkeys(run.label for run in runs)):
            seeds = [run.curves[key] for run in runs if run.label == label and key in run.curves]
            if not seeds:
                continue
            measured = key.startswith("eval_")
            seeds = seeds if measured else [smooth(c, 10) for c in seeds]
            steps, means, lows, highs = band(seeds)
            style: Any = {"color": color(number), "linestyle": line(number), "linewidth": 1.5}
            axis.plot(steps, means, label=legible(label), marker="o" if measured else "", markersize=4, **style)
            if len(seeds) > 1:
                axis.fill_between(steps, lows, highs, alpha=0.18, color=color(number), linewidth=0)
        axis.set_title(title)
        axis.set_xlabel("update")
        if (
            key == "logprob_mismatch" and axis.get_ylim()[1] > _EXACT
        ):  # else all is rounding, and a linear axis has round ticks
            axis.set_yscale("symlog", linthresh=_EXACT)
            axis.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
        if key in ("logprob_mismatch", "kl"):
            axis.set_ylim(bottom=0)
        if key.endswith("_solved") or key == "groups_without_variance":
            share_axis(axis)
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    legend(figure, axes)
    caption = (
        "Training over the updates, a line a setting: the mean over its seeds, with their range as a band. What is logged at "
        "every update is a running mean over ten."
    )
    return picture("curves", caption, figure)
