"""Tables and figures of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from rich.console import Console
from rich.table import Table

from unmask.io.terminal import fitting_table

# Okabe-Ito, safe for colour-blind readers; each colour also has its own marker.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999"]
MARKERS = "osD^vPX*"


def percent(share: float, interval: tuple[float, float] | list[float] | None = None) -> str:
    text = f"{100 * share:.1f}"
    return text if interval is None else f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def points(difference: float, interval: Sequence[float], **_: Any) -> str:
    """A difference of shares in percentage points, with its interval."""
    low, high = interval
    return f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


HEADINGS = ["task", "decoder", "NFE", "solved % [95 %]", "score % [95 %]", "tokens/forward", "length", "seconds"]
DIFFERENCE = "to best, points [95 %]"


def headings(summary: dict[str, Any]) -> list[str]:
    return HEADINGS[:4] + [DIFFERENCE] * any("to_best" in cell for cell in summary["cells"]) + HEADINGS[4:]


def table_rows(summary: dict[str, Any]) -> list[list[str]]:
    """One row a cell, under ``headings``."""
    differs = any("to_best" in cell for cell in summary["cells"])
    return [
        [
            cell["task"],
            cell["decoder"],
            f"{cell['nfe']:.1f}".removesuffix(".0"),
            percent(cell["solved"], cell["solved_interval"]),
            *[points(**cell["to_best"]) if "to_best" in cell else "best"] * differs,
            percent(cell["score"], cell["score_interval"]),
            f"{cell['tokens_per_forward']:.1f}",
            f"{cell['length']:.1f}",
            f"{cell['seconds']:.1f}",
        ]
        for cell in summary["cells"]
    ]


def title(summary: dict[str, Any]) -> str:
    """One line over the table."""
    config = summary["config"]
    return f"{config['model']['name']}, {config['split']} split, {summary['cells'][0]['problems']} problems a task"


def terminal_table(summary: dict[str, Any], screen: Console) -> Table:
    """The table as a terminal shows it, a line between tasks."""
    rows = table_rows(summary)
    last_of_task = [i for i in range(len(rows) - 1) if rows[i][0] != rows[i + 1][0]]
    spare = ["tokens/forward", "length", "seconds", "score % [95 %]"]
    return fitting_table(screen, title(summary), headings(summary), rows, 2, spare, last_of_task)


def markdown(headings: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns are text, the others numbers."""
    lines = [headings, ["---"] * left + ["---:"] * (len(headings) - left), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n"


def markdown_table(summary: dict[str, Any]) -> str:
    return markdown(headings(summary), table_rows(summary), left=2)


def passes_axis(axis: Axes) -> None:
    """A log axis of forward passes, after its data: ticks at powers of two, or at round numbers where it has fewer than two."""
    axis.set_xscale("log", base=2)
    low, high = axis.get_xlim()
    if math.floor(math.log2(high)) - math.ceil(math.log2(low)) < 1:
        axis.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}")


def share_axis(axis: Axes, whole: float = 1.0) -> None:
    """An axis of shares, after its data: from 0 to the largest, at most a little above ``whole``, where markers end."""
    axis.set_ylim(0, min(axis.get_ylim()[1], 1.03 * whole))


@matplotlib.rc_context({"text.parse_math": False})  # a name may have dollar signs
def accuracy_figure(summary: dict[str, Any]) -> Figure:
    """Problems solved against forward passes, one panel a task, with 95 % intervals."""
    tasks = list(dict.fromkeys(c["task"] for c in summary["cells"]))
    decoders = list(dict.fromkeys(c["decoder"] for c in summary["cells"]))
    figure = Figure(figsize=(5.2 * len(tasks), 4.2))
    axes = figure.subplots(1, len(tasks), squeeze=False, sharey=True)
    for axis, task in zip(axes[0], tasks, strict=True):
        for cell in (c for c in summary["cells"] if c["task"] == task):
            i = decoders.index(cell["decoder"])
            low, high = cell["solved_interval"]
            axis.errorbar(
                cell["nfe"] * 1.03 ** (i - (len(decoders) - 1) / 2),
                100 * cell["solved"],
                yerr=[[100 * (cell["solved"] - low)], [100 * (high - cell["solved"])]],
                fmt=MARKERS[i % len(MARKERS)],
                color=COLORS[i % len(COLORS)],
                capsize=3,
                markersize=7,
                label=cell["decoder"],
            )
        passes_axis(axis)
        axis.set_xlabel("NFE, log scale (equal ones set slightly apart)")
        axis.set_title(f"{task} ({next(c['problems'] for c in summary['cells'] if c['task'] == task)} problems)")
        axis.grid(alpha=0.3)
        share_axis(axis, 100)
    axes[0][0].set_ylabel("problems solved (%)")
    axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    return figure


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """``stem``.png and .svg."""
    written = [stem.with_suffix(kind) for kind in (".png", ".svg")]
    for path in written:
        figure.savefig(path, dpi=150)
    return written


def write_figures(summary: dict[str, Any], output: Path) -> list[Path]:
    """accuracy.{png,svg}."""
    return save_figure(accuracy_figure(summary), output / "accuracy")
