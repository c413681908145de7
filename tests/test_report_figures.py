"""Figures of a report by hand: the front, markers and labels that are seen, differences, bands."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from report_folders import result
from unmask.results import figures
from unmask.results.accuracy import accuracy_figure
from unmask.results.collect import Run
from unmask.results.curves import band, curves, smooth


def test_the_front_by_hand() -> None:
    points = [(7, 0.5), (7, 0.6), (20, 0.6), (20, 0.55), (64, 0.9), (5, 0.1), (128, 0.9)]
    best = figures.front([result(*p) for p in points])
    assert [(r.numbers["nfe"], r.numbers["solved"]) for r in best] == [(5, 0.1), (7, 0.6), (64, 0.9)]


def test_equal_passes_are_set_apart_and_others_stay() -> None:
    placed = figures._spread_markers([7, 64, 7, 20, 7.1])
    assert placed[1] == pytest.approx(64) and placed[3] == pytest.approx(20)
    assert placed[0] < placed[2] < placed[4] and all(abs(p / 7 - 1) < 0.06 for p in (placed[0], placed[2], placed[4]))
    assert np.diff(np.log([placed[i] for i in (0, 2, 4)])) == pytest.approx([0.045, 0.045])
    assert placed[0] * placed[2] * placed[4] == pytest.approx(7 * 7 * 7.1)  # their middle is where it was
    swept = figures._spread_markers([60, 61, 62, 63, 64, 65, 66])
    assert swept == sorted(swept) and swept[0] > 55 and swept[-1] < 73
    assert len(set(figures._spread_markers([7.0] * 40))) == 40 and max(figures._spread_markers([7.0] * 40)) < 10


def test_no_marker_and_no_label_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results set apart stay inside the panel, and a figure is as wide as its longest label."""
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "picture", lambda stem, caption, figure: drawn.append(figure))
    near = [replace(result(5.5 + i / 100, 0.5), label=f"{i}" * 90) for i in range(7)]
    figures.accuracy(near)
    (figure,) = drawn
    (low, high), whole = figure.axes[0].get_xlim(), figure.bbox
    places = [x for line in figure.axes[0].containers for x in line[0].get_xdata()]
    assert len(places) == 7 and low < min(places) and max(places) < high
    (legend,) = figure.legends
    assert whole.x0 <= legend.get_window_extent().x0 and legend.get_window_extent().x1 <= whole.x1


def shown_ticks(axis: Any, which: str) -> list[float]:
    """The numbers that stand at an axis's ticks; a label that no reader takes in at a glance fails."""
    low, high = getattr(axis, f"get_{which}lim")()
    ticks = getattr(axis, f"{which}axis").get_major_ticks()
    labels = [(t.get_loc(), t.label1.get_text()) for t in ticks if low <= t.get_loc() <= high]
    assert len(labels) >= 2 and all(label and len(label) <= 6 for _, label in labels), labels
    return [place for place, _ in labels]


@pytest.mark.parametrize("passes", [[7], [20, 22], [1, 1], [33.3, 40.1], [5, 5.5, 6], [7, 20, 64], [300, 310]])
@pytest.mark.parametrize("solved", [0.0, 0.004, 0.6, 1.0])
def test_axes_of_an_evaluation_have_numbers(passes: list[float], solved: float) -> None:
    cells = [
        {"task": "t", "decoder": str(i), "nfe": n, "solved": solved, "problems": 9, "solved_interval": [solved] * 2}
        for i, n in enumerate(passes)
    ]
    figure = accuracy_figure({"cells": cells})
    plt.close(figure)
    figure.draw_without_rendering()
    shown_ticks(figure.axes[0], "x")
    assert min(shown_ticks(figure.axes[0], "y")) == 0 and figure.axes[0].get_ylim()[1] <= 103


@pytest.mark.parametrize("level", [0.0, 0.001, 0.5, 1.0])
@pytest.mark.parametrize("gap", [0.0, 7.49351e-09, 3e-4, 2.0])
def test_axes_of_a_training_have_numbers(monkeypatch: pytest.MonkeyPatch, level: float, gap: float) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("unmask.results.curves.picture", lambda stem, caption, figure: drawn.append(figure))
    values = {"eval_sudoku_solved": level, "groups_without_variance": level, "logprob_mismatch": gap}
    curves([Run("f", "n", {}, {k: {1: v / 2, 2: v, 3: v} for k, v in values.items()}, {}, "cj")])
    (figure,) = drawn
    figure.draw_without_rendering()
    for axis in figure.axes:
        ticks = shown_ticks(axis, "y")
        if "replay" not in axis.get_title():
            assert min(ticks) == 0 and max(ticks) <= 1


def test_a_difference_is_clear_after_holm() -> None:
    row = {"axis": "decoder", "cell": {"task": "t", "decoder": "a"}, "against": {"task": "t", "decoder": "b"}}
    rows = [
        {**row, "solved": 0.1, "solved_interval": [0, 0.2], "solved_p": 0.01, "solved_holm": h} for h in (0.04, 0.06)
    ]
    (drawn,) = figures.differences(rows, "stem", "title")
    assert "1 of 2 are clear after Holm" in drawn.caption


def test_a_short_decode_fills_its_time() -> None:
    """Four steps stand in rows 0, 4, 8 and 12 of 16; each lasts until the next, and the last as long as the others."""
    order = np.zeros((16, 2))
    order[[0, 4, 8, 12], 0] = [0.1, 0.2, 0.3, 0.4]
    order[:, 1] = math.nan
    filled = figures._forward_fill(order)
    assert filled[:, 0].tolist() == [v for v in (0.1, 0.2, 0.3, 0.4) for _ in range(4)] and np.isnan(filled[:, 1]).all()
    stopped = order.copy()
    stopped[12, 0] = 0  # every row was finished before the last step
    assert figures._forward_fill(stopped)[:, 0].tolist() == [v for v in (0.1, 0.2, 0.3, 0.0) for _ in range(4)]
    whole = np.random.default_rng(0).random((16, 32))
    assert np.array_equal(figures._forward_fill(whole), whole)


def test_bands_by_hand() -> None:
    assert smooth({1: 1.0, 2: 3.0, 3: 8.0}, 2) == {1: 1.0, 2: 2.0, 3: 5.5}
    found = band([{0: 1.0, 2: 2.0, 4: 9.0}, {0: 3.0, 4: 1.0}])
    assert found == ([0, 4], [2.0, 5.0], [1.0, 1.0], [3.0, 9.0])


def test_series_are_told_apart_without_colours() -> None:
    from unmask.results.style import color, marker

    assert len({(color(i), marker(i)) for i in range(64)}) == 64
    assert len({marker(i) for i in range(8)}) == 8 == len({color(i) for i in range(8)})
