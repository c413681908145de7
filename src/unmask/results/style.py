"""The look of the report's figures, and a drawn figure as bytes: the same ones for the same data."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from unmask.io.files import atomic_write
from unmask.results.accuracy import COLORS, MARKERS

# The page turns these into its own colours, light and dark; no series may have them.
INK, SOFT, GRID, PAPER = "#1d2127", "#5c6672", "#d5d9df", "#ffffff"
OTHER = "#aab2bd"
PANELS = 12
"""At most so many panels stand in one figure of small multiples."""
_LINES = ("-", "--", "-.", ":")
_SERIES = [INK if color == "#000000" else color for color in COLORS]
_LOOK: Any = {
    "svg.hashsalt": "unmask",
    "text.parse_math": False,  # a name may have dollar signs
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": PAPER,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@contextmanager
def look() -> Iterator[None]:
    """Figures made and drawn inside have the report's look, whatever the user's own settings are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_LOOK)
        yield


def color(number: int) -> str:
    return _SERIES[number % len(_SERIES)]


def marker(number: int) -> str:
    """Sixty-four series have a pair of colour and marker each of its own."""
    return MARKERS[(number + number // len(_SERIES)) % len(MARKERS)]


def line(number: int) -> str:
    return _LINES[(number + number // len(_SERIES)) % len(_LINES)]


@dataclass(frozen=True)
class Picture:
    """A drawn figure; ``caption`` is also what is read out in its place."""

    stem: str
    caption: str
    svg: str
    png: bytes

    def save(self, folder: Path) -> list[Path]:
        written = [folder / f"{self.stem}.png", folder / f"{self.stem}.svg"]
        for path, data in zip(written, (self.png, self.svg.encode()), strict=True):
            with atomic_write(path) as partial:
                partial.write_bytes(data)
        return written


def picture(stem: str, caption: str, figure: Figure) -> Picture:
    """Draw a figure, as SVG and as PNG of 150 dots an inch."""
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", dpi=150, metadata={"Date": None})
    figure.savefig(png, format="png", dpi=150)
    return Picture(stem, caption, svg.getvalue(), png.getvalue())


def panels(
    count: int, columns: int, width: float, height: float, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of small panels, ``width`` x ``height`` inches each, in rows of up to ``columns``; those left over are empty."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey).flat)
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[max(0, count - columns) : count]:
        axis.tick_params(labelbottom=True)  # where shared axes are labelled in the last row alone
    return figure, axes[:count]


def legible(label: str) -> str:
    """A label that matplotlib shows: what starts with an underscore it takes for hidden."""
    return f" {label}" if label.startswith("_") else label


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend under all panels, each label once; the figure grows by what it takes, in width where a label is longer."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    longest = max(map(len, found))
    figure.set_figwidth(max(figure.get_figwidth(), (longest + 6) / 10))  # letters an inch, on the safe side
    columns = max(1, min(len(found), int(figure.get_figwidth() * 12 / (longest + 6))))
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(found) // columns))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns)
