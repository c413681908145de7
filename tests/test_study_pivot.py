"""Tables for reading: what stands where, what is compared, which requests are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from report_folders import study
from unmask import UserError
from unmask.results import pivot
from unmask.results.collect import collect
from unmask.results.report import report
from unmask.results.summary import markdown, read_cells, summarize_study
from unmask.study.grid import StudyConfig, jobs_of, labels, settings_of


def line(solved: str, passes: int, **cell: Any) -> dict[str, Any]:
    """A cell of a study with as many points as problems solved, out of twice as many."""
    n = len(solved)
    settings = {"task": "t", "decoder": "a", **cell}
    return {
        "key": f"{solved}{settings}",
        "cell": {k: v for k, v in settings.items() if k != "task"} | {"task": settings["task"]},
        "problems": f"p{n}",
        "solved": solved,
        "points": [float(c == "1") for c in solved],
        "possible": [2] * n,
        "nfe": [passes - 0.5] * n,
        "committed": [14] * n,
        "length": [3] * n,
        "budget": {"nfe": passes},
        "score_name": "s",
    }


CELLS = [
    line("1100", 7, decoder="a", x=None),
    line("1111", 7, decoder="b", x=None),
    line("1000", 7, decoder="a", x=0.5),
    line("0000" * 10, 9, decoder="b", x=0.5),
    line("1111" * 10, 9, decoder="a", x=0.5, task="u"),
    line("0000" * 10, 9, decoder="b", x=0.5, task="u"),
]


def shown(cells: list[dict[str, Any]] = CELLS, baselines: tuple[str, ...] = (), **table: Any) -> str:
    settings = [{**c["cell"], "plan": c["budget"]["nfe"]} for c in cells]
    (chosen,) = pivot.pivots([{"title": "T", **table}], settings, baselines=baselines)
    summary = summarize_study(cells, (), baselines, [chosen])
    (table,) = pivot.tables([chosen], summary)
    text = table.titled_markdown()
    assert markdown(summary, [chosen]).startswith(f"{text}\n**All cells**\n\n| decoder |")
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
    cells = [line("1100", 7, x=x, task=task) for x, task in ((2, "t"), (2, "u"), (1, "t"), (1, "u"))]
    text = shown(cells, rows=["decoder"], columns=["task", "x"], show=["length"])
    assert "| decoder | t x=2 | t x=1 | u x=2 | u x=1 |" in text


def test_differences_and_their_stars() -> None:
    table = {"rows": ["task", "x"], "columns": ["decoder"], "show": []}
    text = shown(**table, against=["decoder"])
    assert (
        "| task | x | b |" in text and text.count("\n| ") == 1 + 1 + 2
    )  # the first decoder has none, nor has a row alone
    assert "| t | – | +50.0 [+0.0, +100.0] |" in text and "| u | 0.5 | -100.0 [-100.0, -100.0]* |" in text
    assert "Difference: in points of solved from the cell of decoder a" in text and "over all 2 of this kind" in text
    text = shown(**{**table, "show": ["score"]}, against=["decoder"])
    assert (
        "| u | 0.5 | 50.0 [50.0, 50.0] | 0.0 [0.0, 0.0] | -50.0 [-50.0, -50.0]* |" in text
    )  # of the metric that is shown
    text = shown(baselines=("a",), **table, against=["equal passes", "x"])
    assert "| task | x | a difference (x) | b difference (equal passes) |" in text
    assert "from the baseline of as many passes" in text and "from the cell of x –" in text


def trained(solved: str, decoder: str | None, objective: str | None, seed: int | None) -> dict[str, Any]:
    made = line(solved, 7, **{"train.decoder": decoder, "train.objective": objective, "train.seed": seed})
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
    table = {"title": "T", "rows": ["train.objective"], "against": ["training", "train.objective"]}
    pooled = pivot.Pivot(**table, mean_over=["train.decoder"])
    summary = summarize_study(study, (), (), [pooled])
    (pool,) = summary["pools"]
    expected = summarize_study([base, *seeds])
    assert "train.decoder" in summary["axes"] and "train.decoder" not in pool["axes"]
    for part in ("cells", "differences"):
        without = [dict(entry) for entry in expected[part]]
        for entry in without:
            for key in {"cell", "against"} & set(entry):
                entry[key] = {k: v for k, v in entry[key].items() if k != "train.decoder"}
        assert pool[part] == without and len(pool[part]) == 3
    (shown,), (plain,) = pivot.tables([pooled], summary), pivot.tables([pivot.Pivot(**table)], expected)
    assert shown.rows == plain.rows and [row[0] for row in shown.rows] == ["untrained", "cj", "diffu"]
    assert shown.notes == [
        "Mean over train.decoder and the seeds, 3 to 4 trainings each, which intervals and tests take as a sample of such "
        "trainings.",
        *plain.notes,
    ]
    nothing_trained = summarize_study([base], (), (), [pooled])
    assert [table.notes for table in pivot.tables([pooled], nothing_trained)] == [[]]


def test_a_mean_is_over_axes_of_the_training() -> None:
    cells = [trained("0011", d, "cj", 0) for d in ("full", "ass")]
    assert "| cj | 7 |" in shown(cells, rows=["train.objective"], mean_over=["train.decoder"], show=["nfe"]).replace(
        "6.5", "7"
    )
    for table, says in (
        (
            {"rows": ["train.objective"], "mean_over": ["decoder"]},
            "unknown axis of the training in mean_over .* 'decoder'",
        ),
        ({"rows": ["train.decoder"], "mean_over": ["train.decoder"]}, "unknown axis in the table 'T' 'train.decoder'"),
        ({"rows": ["decoder"], "mean_over": ["train.decoder"], "against": ["train.decoder"]}, "unknown comparison"),
    ):
        with pytest.raises(UserError, match=says) as error:
            shown(cells, **table)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"columns": ["x"]}, "table 1 of tables lacks rows: add it"),
        ({"rows": ["task", "decoder", "x"], "show": []}, "the table 'T' shows nothing: give show or against"),
        ({"rows": {"decoder": 1}}, "rows of table 1 of tables is {'decoder': 1}"),
        ({"rows": ["decoder", "taks"]}, r"unknown axis in the table 'T' 'taks': did you mean 'task'"),
        ({"rows": ["decoder"], "columns": ["y"]}, "unknown axis in the table 'T' 'y'"),
        ({"rows": ["decoder"], "where": {"y": 1}}, "unknown axis in the table 'T' 'y'"),
        (
            {"rows": ["decoder"], "where": {"x": [0.5, 3]}},
            "unknown x in where of the table 'T' '3': choose from 0.5, –",
        ),
        ({"rows": ["decoder"], "where": {"x": ["0.5"]}}, "unknown x in where of the table 'T' '0.5'"),  # a text
        ({"rows": ["decoder"], "where": {"x": None, "task": "u"}}, "no cell is in the table 'T': change its where"),
        (
            {"rows": ["decoder"], "columns": ["x"]},
            "two cells share a place in the table 'T': add task or plan to its rows",
        ),
        ({"rows": ["task", "decoder", "x"], "against": ["equal passes"]}, "unknown comparison in the table 'T'"),
        ({"rows": ["task", "decoder", "x"], "show": ["accuracy"]}, "unknown show of table 1 of tables 'accuracy'"),
        ({"rows": ["task", "decoder", "x"], "colour": "red"}, "unknown parameter of table 1 of tables 'colour'"),
    ],
)
def test_mistakes_are_one_sentence(table: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        shown(**table)
    assert "\n" not in str(error.value)


def test_each_table_has_its_title() -> None:
    table = {"title": "T", "rows": ["decoder"]}
    with pytest.raises(UserError, match="two of tables have the title 'T'"):
        pivot.pivots([table, table], [{"decoder": "a", "plan": 7}])


def test_a_table_without_any_text_is_none() -> None:
    summary = summarize_study(CELLS[:1])
    assert not list(pivot.tables([pivot.Pivot(title="T", rows=["x"], show=[], against=["decoder"])], summary))


def test_settings_are_those_of_the_cells_without_seeds(tmp_path: Path) -> None:
    train = {"tasks": ["countdown"], "seed": [0, 1], "objective": ["cj", "diffu"]}
    evaluate = {"task": "countdown", "decoder": ["full", "ass"]}
    jobs = jobs_of(StudyConfig(output="runs/x", train=[train], evaluate=[evaluate]), tmp_path)
    found = settings_of(jobs, labels(jobs)[0])
    assert len(found) == 2 * (1 + 2) and {s["plan"] for s in found} == {64, 7}
    assert not any("seed" in key for s in found for key in s)


def test_a_report_begins_with_them(tmp_path: Path) -> None:
    folder = study(tmp_path / "study")
    table = {"title": "Which <objective>", "rows": ["train.objective"], "columns": ["decoder"], "against": ["training"]}
    (folder / "study.yaml").write_text(yaml.safe_dump({"tables": [table, {**table, "where": {"decoder": "none"}}]}))
    (shown,) = pivot.tables([pivot.Pivot(**table)], summarize_study(read_cells(folder)))
    (own,) = collect([folder]).folders
    assert own.tables[0] == shown and len(own.tables) == 2  # the other has no cell yet; then all cells
    assert [row[0] for row in shown.rows] == ["untrained", "cj", "diffu"]
    text, _ = report([folder], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert text.startswith(shown.titled_markdown())
    assert "Which &lt;objective&gt;" in page and shown.notes[0].replace("'", "&#39;") in page
