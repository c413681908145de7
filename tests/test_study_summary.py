"""A study's summary by hand: draws, intervals, differences, adjustments; what stands where in its tables for reading."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.study import PLAN, Values
from benchmarks.study.statistics import Bootstrap, holm
from benchmarks.study.summary import Group, summarize
from benchmarks.study.tables import markdown, pivots, read_out
from unmask import UserError
from unmask.results.statistics import paired_difference, wilson


def line(solved: str, seed: int = 0, problems: str = "p", **cell: Any) -> dict[str, Any]:
    n = len(solved)
    settings = {"task": "t", "decoder": "a", **cell, "train.seed": seed}
    facts = {"key": f"{solved}{seed}{cell}", "cell": settings, "problems": problems, "score_name": "s"}
    lists = {"points": [2.0 * (c == "1") for c in solved], "possible": [2] * n, "nfe": [7] * n}
    return {**facts, "solved": solved, **lists, "committed": [14] * n, "length": list(range(n)), "budget": {"nfe": 7}}


def test_summary_by_hand() -> None:
    rng = np.random.default_rng(5)
    texts = ["".join(rng.choice(["0", "1"], 40, p=[0.6, 0.4])) for _ in range(4)]
    cells = [line(texts[i], seed=i % 2, decoder="ab"[i // 2]) for i in range(4)]
    summary = summarize(cells)
    first, second = summary["cells"]
    a, b = (np.array([[c == "1" for c in t] for t in pair], dtype=float) for pair in (texts[:2], texts[2:]))
    assert first["solved"] == a.mean() and second["score"] == b.mean() and first["seeds"] == 2
    assert first["nfe"] == 7 and first["tokens_per_forward"] == 2 and first["length"] == 19.5

    def drawn(values: np.ndarray) -> tuple[np.ndarray, float, float]:
        """A crossed bootstrap over seeds and problems in a plain loop, and its interval, at least Student's over the seeds."""
        draws = [values[rng.integers(0, 2, 2)][:, rng.integers(0, 40, 40)].mean() for _ in range(4000)]
        half, mean = stats.t.ppf(0.975, 1) * np.std(values.mean(1), ddof=1) / math.sqrt(2), values.mean()
        low, high = np.quantile(draws, [0.025, 0.975])
        return np.array(draws), min(low, mean - half), max(high, mean + half)

    (difference,), (draws, low, high) = summary["differences"], drawn(b - a)  # the same draws for both cells
    assert difference["axis"] == "decoder" and difference["solved"] == pytest.approx(b.mean() - a.mean())
    assert difference["solved_interval"] == pytest.approx([low, high], abs=0.02)
    p_of_seeds = stats.ttest_rel(b.mean(1), a.mean(1)).pvalue
    tail = min(np.mean(draws <= 0), np.mean(draws >= 0))
    assert difference["solved_p"] == pytest.approx(max(2 * tail, p_of_seeds), abs=0.03)
    _, low, high = drawn(a)
    assert first["solved_interval"] == pytest.approx([max(0, low), min(1, high)], abs=0.02)
    assert difference["score_interval"] == difference["solved_interval"]


def test_seeds_with_other_problems_are_drawn_apart() -> None:
    """The same problems under two seeds are as uncertain as once; other problems are new evidence."""
    text = "01" * 50
    same = Group({}, [line(text, 0), line(text, 1)])
    other = Group({}, [line(text, 0, "p"), line(text, 1, "q")])
    once = Group({}, [line(text, 0)])
    spread = [float(np.std(Bootstrap().draws(*g.shares["solved"], g.problems))) for g in (once, same, other)]
    assert spread[0] == pytest.approx(math.sqrt(0.25 / 100), rel=0.05)
    assert spread[1] == pytest.approx(spread[0], rel=0.03)
    first, second = Bootstrap(), Bootstrap()  # what a cell is given does not depend on the cells before it
    first.draws(*other.shares["solved"], ("q", "p"))
    assert np.array_equal(first.draws(*once.shares["solved"], ("p",)), second.draws(*once.shares["solved"], ("p",)))
    assert spread[2] == pytest.approx(spread[0] * math.sqrt(0.75), rel=0.05)  # Var = (1/2 + 1/4) of one seed's


def test_cells_are_compared_with_equal_ones_alone() -> None:
    cells = [line("0011", decoder=d, gamma=g) for d in "ab" for g in (1, 2)]
    cells += [line("0011", problems="q", decoder="c", gamma=1)]
    pairs = [(d["axis"], d["cell"]["decoder"], d["cell"]["gamma"]) for d in summarize(cells)["differences"]]
    assert pairs == [("decoder", "b", 1), ("decoder", "b", 2), ("gamma", "a", 2), ("gamma", "b", 2)]
    only = summarize(cells, ["gamma"])["differences"]
    assert {d["axis"] for d in only} == {"gamma"} and all(d["solved_p"] == 1 for d in only)


def test_one_seed_has_the_interval_of_an_evaluation_and_seeds_are_paired_by_name() -> None:
    (cell,) = summarize([line("1111")])["cells"]
    assert cell["solved_interval"] == list(wilson(4, 4)) and cell["solved_interval"][0] < 0.6
    # A study cut short: a has seeds 0 and 1, b has 1 and 2.
    runs = (("0000", 0, "a"), ("0011", 1, "a"), ("0111", 1, "b"), ("1111", 2, "b"))
    cells = [line(solved, seed, decoder=decoder) for solved, seed, decoder in runs]
    (difference,) = summarize(cells)["differences"]
    assert difference["solved"] == 0.25
    assert summarize([cells[0], cells[3]])["differences"] == []


def test_trained_models_are_compared_with_the_untrained_one() -> None:
    budget = {"nfe": 7, "updates": 1, "completions": 2, "training_passes": 3}
    base = {**line("0011"), "cell": {"task": "t", "decoder": "a", "train.objective": None, "train.seed": None}}
    runs = [(objective, seed) for objective in ("cj", "diffu") for seed in (0, 1)]
    trained = [{**line("0111", seed, **{"train.objective": o}), "budget": budget} for o, seed in runs]
    summary = summarize([base, *trained])
    assert summary["axes"]["train.objective"] == ["cj", "diffu"]
    found = [(d["axis"], d["cell"]["train.objective"], d["solved"]) for d in summary["differences"]]
    assert found == [("train.objective", "diffu", 0.0), ("training", "cj", 0.25), ("training", "diffu", 0.25)]
    assert summary["budgets"] == {"updates": 1, "completions": 2, "training_passes": 3}


def test_decoders_are_compared_with_the_baseline_of_as_many_passes() -> None:
    """With guidance 32 steps take 64 passes: guided cells are compared with guided baselines where there is one."""

    def compared(cells: list[tuple[str, str, int, int]], *baselines: str) -> dict[Any, float]:
        lines = [
            {**line(solved, decoder=decoder, cfg_scale=scale), "budget": {"nfe": passes}}
            for decoder, solved, passes, scale in cells
        ]
        summary = summarize(lines, ["decoder"], baselines)
        assert "Against the baseline of as many passes" in markdown(summary)
        found = [d for d in summary["differences"] if d["axis"] == "equal passes"]
        names = ("decoder", "cfg_scale")
        return {tuple(d[side][k] for side in ("cell", "against") for k in names): d["solved"] for d in found}

    cells = [("full", "0011", 64, 0), ("full:steps=7", "0001", 7, 0), ("ass", "0111", 7, 0), ("odd", "1111", 5, 0)]
    assert compared(cells, "full", "full:steps=7") == {("ass", 0, "full:steps=7", 0): 0.5}
    half = "full:steps=32"
    cells = [("full", "0000", 64, 0), (half, "0001", 64, 1), (half, "0011", 64, 2)]
    cells += [("ass", "0111", 64, 2), ("ass", "0111", 64, 0)]
    assert compared(cells, "full", half) == {("ass", 2, half, 2): 0.25, ("ass", 0, "full", 0): 0.75}


def test_holm_and_p_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([]) == [] and holm([0.6, 0.9]) == [1.0, 1.0]
    assert Bootstrap.p(np.array([-1.0, 1.0, 1.0, 1.0])) == pytest.approx(2 * 2 / 5)
    assert Bootstrap.p(np.array([-1.0, -1.0, -1.0, 1.0])) == pytest.approx(2 * 2 / 5)
    assert Bootstrap.p(np.ones(99)) == pytest.approx(0.02) and Bootstrap.p(np.zeros(9)) == 1


def test_paired_difference_is_narrower_than_two_intervals() -> None:
    a, b = [1.0, 0.0] * 100, [1.0, 0.0] * 95 + [0.0] * 10
    mean, (low, high) = paired_difference(a, b, [1.0] * 200)
    assert mean == pytest.approx(5 / 200) and 0 <= low < mean < high < 0.06


def pivot_line(solved: str, passes: int, **cell: Any) -> dict[str, Any]:
    """A cell of a study with as many points as problems solved, out of twice as many."""
    n = len(solved)
    changed = {"points": [float(c == "1") for c in solved], "nfe": [passes - 0.5] * n, "length": [3] * n}
    settings = {"decoder": "a", **cell, "task": cell.get("task", "t")}
    return {**line(solved, problems=f"p{n}"), **changed, "cell": settings, "budget": {"nfe": passes}}


CELLS = [
    *(pivot_line("1100", 7, x=None), pivot_line("1111", 7, x=None, decoder="b")),
    *(pivot_line("1000", 7, x=0.5), pivot_line("0000" * 10, 9, x=0.5, decoder="b")),
    *(pivot_line(s * 40, 9, x=0.5, decoder=d, task="u") for s, d in (("1", "a"), ("0", "b"))),
]


def shown(cells: list[Values] = CELLS, baselines: tuple[str, ...] = (), **table: Any) -> str:
    settings = [{**c["cell"], PLAN: c["budget"]["nfe"]} for c in cells]
    chosen = pivots([{"title": "T", **table}], settings, baselines=baselines)
    summary, (found,) = read_out(cells, (), baselines, chosen)
    text = found.titled_markdown()
    assert markdown(summary, [found]).startswith(f"{text}\n**All cells**\n\n| decoder |")
    return text


def test_a_table_by_hand() -> None:
    assert shown(rows=["decoder"], columns=["x"], where={"task": "t"}, show=["nfe", "score", "length"]).split("\n") == [
        "**T**",
        "",
        "| decoder | x=– NFE | x=– score % [95 %] | x=– length | x=0.5 NFE | x=0.5 score % [95 %] | x=0.5 length |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| a | 6.5 | 25.0 [0.0, 50.0] | 3 | 6.5 | 12.5 [0.0, 37.5] | 3 |",
        "| b | 6.5 | 50.0 [50.0, 50.0] | 3 | 8.5 | 0.0 [0.0, 0.0] | 3 |",
        "",
    ]


def test_one_quantity_needs_no_name_in_every_column() -> None:
    text = shown(rows=["plan"], columns=["task", "decoder"], where={"x": [0.5]}, show=["tokens_per_forward"])
    assert "| plan | t a | t b | u a | u b |" in text and "Shown: tokens/forward." in text
    assert "| 7 | 2.2 |  |  |  |\n| 9 |  | 1.6 | 1.6 | 1.6 |" in text  # where there is no cell, nothing


def test_columns_stand_by_their_axes_whatever_cell_came_first() -> None:
    cells = [pivot_line("1100", 7, x=x, task=task) for x, task in ((2, "t"), (2, "u"), (1, "t"), (1, "u"))]
    text = shown(cells, rows=["decoder"], columns=["task", "x"], show=["length"])
    assert "| decoder | t x=2 | t x=1 | u x=2 | u x=1 |" in text


def test_differences_and_their_stars() -> None:
    table = {"rows": ["task", "x"], "columns": ["decoder"], "show": []}
    text = shown(**table, against=["decoder"])  # the first decoder has none, nor has a row alone
    assert "| task | x | b |" in text and text.count("\n| ") == 1 + 1 + 2
    assert "| t | – | +50.0 [+0.0, +100.0] |" in text and "| u | 0.5 | -100.0 [-100.0, -100.0]* |" in text
    assert "Difference: in points of solved from the cell of decoder a" in text and "over all 2 of this kind" in text
    text = shown(**{**table, "show": ["score"]}, against=["decoder"])  # of the metric that is shown
    assert "| u | 0.5 | 50.0 [50.0, 50.0] | 0.0 [0.0, 0.0] | -50.0 [-50.0, -50.0]* |" in text
    text = shown(baselines=("a",), **table, against=["equal passes", "x"])
    assert "| task | x | a difference (x) | b difference (equal passes) |" in text
    assert "from the baseline of as many passes" in text and "from the cell of x –" in text


def trained(solved: str, decoder: str | None, objective: str | None, seed: int | None) -> dict[str, Any]:
    made = pivot_line(solved, 7, **{"train.decoder": decoder, "train.objective": objective, "train.seed": seed})
    budget = {"nfe": 7, "updates": 1, "completions": 2, "training_passes": 3}
    return made if objective is None else {**made, "budget": budget}


def test_a_mean_over_an_axis_takes_its_values_for_further_seeds() -> None:
    """Pooled over two rollout decoders of two seeds each = a study of four seeds under one."""
    rng = np.random.default_rng(0)
    base = trained("".join(rng.choice(["0", "1"], 40)), None, None, None)
    runs = [
        (o, d, s) for o in ("cj", "diffu") for d in ("full", "ass") for s in (0, 1) if (o, d, s) != ("diffu", "ass", 1)
    ]
    texts = {run: "".join(rng.choice(["0", "1"], 40, p=[0.7, 0.3])) for run in runs}
    study = [base, *(trained(texts[o, d, s], d, o, s) for o, d, s in runs)]
    seeds = [trained(texts[o, d, s], "full", o, s + 2 * (d == "ass")) for o, d, s in runs]
    pool, expected = summarize(study, mean_over=["train.decoder"]), summarize([base, *seeds])
    assert "train.decoder" in summarize(study)["axes"] and "train.decoder" not in pool["axes"]
    for part in ("cells", "differences"):
        without = [dict(entry) for entry in expected[part]]
        for entry in without:
            for key in {"cell", "against"} & set(entry):
                entry[key] = {k: v for k, v in entry[key].items() if k != "train.decoder"}
        assert pool[part] == without and len(pool[part]) == 3
    table = {"rows": ["train.objective"], "against": ["training", "train.objective"]}
    pooled, plain = shown(study, **table, mean_over=["train.decoder"]), shown([base, *seeds], **table)
    note = "Mean over train.decoder and the seeds, 3 to 4 trainings each, which intervals and tests take as a sample of"
    assert pooled.splitlines()[:7] == plain.splitlines()[:7] and note in pooled and note not in plain


def test_the_area_under_a_preset_by_hand() -> None:
    """Two decoders of one preset, at 4 and 16 used passes; between 2 and 32 its curve is 0, a slope and level."""
    study = [
        *(
            pivot_line(solved, passes + 0.5, decoder=d)
            for d, passes, solved in (("a", 4, "1000"), ("a:steps=9", 16, "1110"))
        ),
        pivot_line("1100", 2.5, decoder="b:steps=2"),
    ]
    area = (0 * 1 + 2 * (0.25 + 0.75) / 2 + 1 * 0.75) / 4
    text = shown(study, rows=["decoder"], show=["solved"], area=[2, 32], against=["decoder"])
    rows = {line.split(" | ")[0]: line for line in text.splitlines()}
    assert rows["| a"].startswith(f"| a | {100 * area:.1f} [") and rows["| b"].startswith("| b | 50.0 [")
    assert f"{100 * (0.5 - area):+.1f} [" in rows["| b"] and len([line for line in rows if line.startswith("| ")]) == 4
    assert "| decoder | area % [95 %] | difference |" in text and "in points of area from the cell of decoder a" in text
    twice = shown(
        [*study, pivot_line("0000", 4.5, decoder="a:steps=8")], rows=["decoder"], show=["solved"], area=[2, 32]
    )
    assert f"| a | {100 * (2 * (0.125 + 0.75) / 2 + 0.75) / 4:.1f} [" in twice  # as many passes: their mean
    # One problem at a time: the area of every problem's own curve, in the mean and paired.
    alone = [
        shown([{**c, "solved": c["solved"][i]} for c in study], rows=["decoder"], show=["solved"], area=[2, 32])
        for i in range(4)
    ]
    each = [float(text.split("| a | ")[1].split(" ")[0]) for text in alone]
    assert np.mean(each) == pytest.approx(100 * area, abs=0.1)


TRAINED = {"cells": [trained("0011", decoder, "cj", 0) for decoder in ("full", "ass")], "mean_over": ["train.decoder"]}
EVERY, ONE = {"rows": ["task", "decoder", "x"]}, {"rows": ["decoder"]}


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({**TRAINED, "rows": ["train.objective"], "mean_over": ["decoder"]}, "axis of the training .* 'decoder'"),
        ({**TRAINED, "rows": ["train.decoder"]}, "unknown axis .* 'train.decoder'"),
        ({**TRAINED, "rows": ["decoder"], "against": ["train.decoder"]}, "unknown comparison"),
        ({"columns": ["x"]}, "table 1 of tables lacks rows: add it"),
        ({**EVERY, "show": []}, "the table 'T' shows nothing: set show or against"),
        ({"rows": {"decoder": 1}}, "rows of table 1 of tables is {'decoder': 1}"),
        ({"rows": ["decoder", "taks"]}, r"unknown axis in the table 'T' 'taks': did you mean 'task'"),
        ({**ONE, "columns": ["y"]}, "unknown axis in the table 'T' 'y'"),
        ({**ONE, "where": {"y": 1}}, "unknown axis in the table 'T' 'y'"),
        ({**ONE, "where": {"x": [0.5, 3]}}, "unknown x in where of the table 'T' '3': choose from 0.5, –"),
        ({**ONE, "where": {"x": ["0.5"]}}, "unknown x in where of the table 'T' '0.5'"),  # a text
        ({**ONE, "where": {"x": None, "task": "u"}}, "no cell is in the table 'T': change its where"),
        ({**ONE, "columns": ["x"]}, "two cells share a place in the table 'T': add task or plan to its rows"),
        ({**EVERY, "against": ["equal passes"]}, "unknown comparison in the table 'T'"),
        ({**EVERY, "area": [4]}, r"area of the table 'T' is \[4.0\]: give the least and the most passes"),
        ({**EVERY, "area": [32, 4]}, "give the least and the most passes"),
        ({"rows": ["plan"], "area": [4, 32], "show": ["solved"]}, "unknown axis in the table 'T' 'plan'"),
        ({**EVERY, "area": [4, 32]}, "the table 'T' is of areas of problems solved: set show to"),
        ({**EVERY, "show": ["accuracy"]}, "unknown show of table 1 of tables 'accuracy'"),
        ({**EVERY, "colour": "red"}, "unknown parameter of table 1 of tables 'colour'"),
    ],
)
def test_mistakes_in_tables_are_one_sentence(table: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        shown(**table)
    assert "\n" not in str(error.value)


def test_each_table_has_its_title_and_some_text() -> None:
    table = {"title": "T", "rows": ["x"], "show": [], "against": ["decoder"]}
    settings = [{**CELLS[0]["cell"], PLAN: 7}]
    assert read_out(CELLS[:1], pivots=pivots([table], settings))[1] == []  # nothing to compare with, so no table
    with pytest.raises(UserError, match="two of tables have the title 'T'"):
        pivots([table, table], settings)
