"""Figures of results by hand: the front, markers and labels that are seen, differences, bands."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest

from benchmarks.report.figures import differences, forward_fill, over_seeds, training
from report_folders import result
from unmask.results import figures
from unmask.results.statistics import pareto_front
from unmask.results.style import color, marker, save_figure


def test_the_front_by_hand() -> None:
    points = [(7, 0.5), (7, 0.6), (20, 0.6), (20, 0.55), (64, 0.9), (5, 0.1), (128, 0.9)]
    assert pareto_front(points, lambda p: p) == [(5, 0.1), (7, 0.6), (64, 0.9)]
    figure = figures.accuracy([*(result(*p) for p in points), result(6, 0.99, aside=True)])
    (stepped,) = (line for line in figure.axes[0].lines if line.get_label() == "Pareto front")
    assert list(zip(*stepped.get_data(), strict=True))[:-1] == [(5, 10), (7, 60), (64, 90)]


def test_equal_passes_are_set_apart_and_others_stay() -> None:
    placed = figures.spread_markers(pd.Series([7.0, 64, 7, 20, 7.1]))
    assert placed[1] == pytest.approx(64) and placed[3] == pytest.approx(20)
    assert placed[0] < placed[2] < placed[4] and placed[2] == pytest.approx(7)
    assert all(abs(placed[i] / 7 - 1) < 0.06 for i in (0, 2, 4))
    assert len(set(many := figures.spread_markers(pd.Series([7.0] * 40)))) == 40 and max(many) < 10


def test_no_marker_and_no_label_is_cut() -> None:
    """Results set apart stay inside the panel, and a figure is as wide as its longest label; the points have numbers."""
    figure = figures.accuracy([result(5.5, 0.5, f"{i}" * 90) for i in range(7)])
    figure.draw_without_rendering()
    (low, high), whole = figure.axes[0].get_xlim(), figure.bbox
    places = [x for line in figure.axes[0].containers for x in line[0].get_xdata()]
    assert len(places) == 7 and low < min(places) and max(places) < high
    assert [text.get_text() for text in figure.axes[0].texts] == ["1"]  # of equals the first is on the front
    (legend,) = figure.legends
    assert whole.x0 <= legend.get_window_extent().x0 and legend.get_window_extent().x1 <= whole.x1


def test_of_many_only_the_front_has_names() -> None:
    figure = figures.accuracy([result(7 + i, 0.1 * (i == 3), f"d{i}") for i in range(30)])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["Pareto front", "on no front: see the tables", "1  d0", "2  d3"]


def shown_ticks(axis: Any, which: str) -> list[float]:
    """The numbers at an axis's ticks; a label that no reader takes in at a glance fails."""
    low, high = getattr(axis, f"get_{which}lim")()
    ticks = getattr(axis, f"{which}axis").get_major_ticks()
    labels = [(t.get_loc(), t.label1.get_text()) for t in ticks if low <= t.get_loc() <= high]
    assert len(labels) >= 2 and all(label and len(label) <= 6 for _, label in labels), labels
    return [place for place, _ in labels]


@pytest.mark.parametrize(
    ("passes", "solved"), [([7], 0.0), ([20, 22], 0.004), ([1, 1], 1.0), ([33.3, 40.1], 0.6), ([7, 20, 64], 0.6)]
)
def test_axes_of_an_evaluation_have_numbers(passes: list[float], solved: float) -> None:
    figure = figures.accuracy([result(n, solved, f"_$\\nothing{i}$") for i, n in enumerate(passes)])
    figure.draw_without_rendering()
    shown_ticks(figure.axes[0], "x")
    assert min(shown_ticks(figure.axes[0], "y")) == 0 and figure.axes[0].get_ylim()[1] <= 103


@pytest.mark.parametrize(("level", "gap"), [(0.0, 0.0), (0.001, 7.49351e-09), (0.5, 3e-4), (1.0, 2.0)])
def test_axes_of_a_training_have_numbers(level: float, gap: float) -> None:
    values = {"eval_sudoku_solved": level, "groups_without_variance": level, "logprob_mismatch": gap}
    metrics = pd.DataFrame({k: pd.Series({1: v / 2, 2: v, 3: v}) for k, v in values.items()})
    figure = training([{"label": "_$cj", "metrics": metrics}]).figure
    figure.draw_without_rendering()
    ticks = [(axis.get_title(), shown_ticks(axis, "y")) for axis in figure.axes]
    assert all(min(at) == 0 and max(at) <= 1 for title, at in ticks if "replay" not in title)


def test_runs_that_share_no_curve_are_drawn_together() -> None:
    runs = [{"label": key, "metrics": pd.DataFrame({key: pd.Series({1: 0.5})})} for key in ("agreement", "reward")]
    figure = training(runs).figure
    assert [[len(drawn.get_xdata()) for drawn in axis.lines] for axis in figure.axes] == [[0, 1], [1, 0]]


def test_a_difference_is_clear_after_holm() -> None:
    row = {"axis": "decoder", "cell": {"task": "t", "decoder": "a"}, "against": {"task": "t", "decoder": "b"}}
    row |= {"solved": 0.1, "solved_interval": [0, 0.2]}
    (drawn,) = differences([({**row, "solved_holm": h}, "a − b") for h in (0.04, 0.06)])
    assert "1 of 2 are clear after Holm" in drawn.caption


def test_a_short_decode_fills_its_time() -> None:
    """Four steps are rows 0, 4, 8 and 12 of 16; each lasts until the next, and the last as long as the others."""
    order = np.zeros((16, 2))
    order[[0, 4, 8, 12], 0] = [0.1, 0.2, 0.3, 0.4]
    order[:, 1] = math.nan
    filled = forward_fill(order)
    assert filled[:, 0].tolist() == [v for v in (0.1, 0.2, 0.3, 0.4) for _ in range(4)] and np.isnan(filled[:, 1]).all()
    order[12, 0] = 0  # every row was finished before the last step
    assert forward_fill(order)[:, 0].tolist() == [v for v in (0.1, 0.2, 0.3, 0.0) for _ in range(4)]


def test_bands_by_hand() -> None:
    one = over_seeds([pd.Series({1: 1.0, 2: 3.0, 3: 8.0})], 2)
    assert one["mean"].tolist() == one["min"].tolist() == [1.0, 2.0, 5.5]
    found = over_seeds([pd.Series({0: 1.0, 2: 2.0, 4: 9.0}), pd.Series({0: 3.0, 2: math.nan, 4: 1.0})], 1)
    assert found.to_dict("index") == {0: {"mean": 2, "min": 1, "max": 3}, 4: {"mean": 5, "min": 1, "max": 9}}


def test_series_are_told_apart_without_colors() -> None:
    assert len({(color(i), marker(i)) for i in range(64)}) == 64
    assert len({marker(i) for i in range(8)}) == 8 == len({color(i) for i in range(8)})


def test_the_readers_settings_neither_matter_nor_leak(tmp_path: Path) -> None:
    cells = [result(7, 0.5), result(64, 0.9, "$\\nothing{$")]
    with matplotlib.rc_context({"axes.linewidth": 5.0, "xtick.major.size": 20}):
        own = save_figure(figures.accuracy(cells), tmp_path / "own.v1")
        assert matplotlib.rcParams["axes.linewidth"] == 5.0
    assert [p.name for p in own] == ["own.v1.png", "own.v1.svg"]
    again = save_figure(figures.accuracy(cells), tmp_path / "again")
    assert [p.read_bytes() for p in own] == [p.read_bytes() for p in again]
