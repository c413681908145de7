"""The look of all figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from unmask.io.files import atomic_write

# Okabe-Ito, safe for color-blind readers; each color also has its own marker.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#1d2127", "#999999"]
MARKERS = "osD^vPX*"
INK, SOFT, OTHER = "#1d2127", "#5c6672", "#aab2bd"
_LOOK: Any = {
    "svg.hashsalt": "unmask",
    "text.parse_math": False,  # a name may have dollar signs
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#d5d9df",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


@contextmanager
def look() -> Iterator[None]:
    """Figures made and drawn inside have this look, whatever the user's own settings are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_LOOK)
        yield


def color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def marker(number: int) -> str:
    """Sixty-four series have a pair of color and marker each of its own."""
    return MARKERS[(number + number // len(COLORS)) % len(MARKERS)]


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """``stem``.png and .svg, each whole or not at all; the same bytes for the same figure."""
    written = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    with look():
        for path in written:
            with atomic_write(path) as partial:
                metadata = {"Date": None} if path.suffix == ".svg" else None
                figure.savefig(partial, format=path.suffix[1:], dpi=100, metadata=metadata)
    return written


def panels(count: int, columns: int, width: float, height: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure of small panels, ``width`` x ``height`` inches each, in rows of up to ``columns``."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[max(0, count - columns) : count]:
        axis.tick_params(labelbottom=True)  # where shared axes are labelled in the last row alone
    return figure, axes[:count]


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend under all panels, each label once, numbered ones in their order; the figure grows by what it takes."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    found = dict(sorted(found.items(), key=lambda item: _number(item[0])))
    longest = max(map(len, found))
    figure.set_figwidth(max(figure.get_figwidth(), (longest + 6) / 10))  # letters an inch, on the safe side
    columns = max(1, min(len(found), int(figure.get_figwidth() * 12 / (longest + 6))))
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(found) // columns))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns)


def _number(label: str) -> int:
    """The number that a label begins with, 0 where it has none."""
    first = label.partition("  ")[0]
    return int(first) if first.isdecimal() else 0
