"""``python -m benchmarks report``: what the page shows is what the folders say; one file, valid, small, the same every time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree.ElementTree import Element

import html5lib
import numpy as np
import pytest
import yaml

from benchmarks.report.collect import collect
from benchmarks.report.command import command
from benchmarks.report.page import report
from benchmarks.report.source import varying
from benchmarks.report.study import in_words, read_study, telling
from benchmarks.study.lines import read_cells
from benchmarks.study.summary import summarize
from browser import open_page
from report_folders import CELLS, cell, curves, evaluation, lines, records, run, study
from unmask.errors import UserError
from unmask.evaluation.records import summarize as summarize_records
from unmask.io.files import write_json
from unmask.io.schema import STEPS
from unmask.results.tables import percent


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a folder of each kind."""
    at = tmp_path_factory.mktemp("mixed")
    folders = [evaluation(at / "eval", CELLS, curves=curves()), study(at / "study"), run(at / "run", 0)]
    report(folders, at / "report")
    return at / "report" / "report.html"


def tree(path: Path) -> Element:
    """The page under the strict rules of HTML5, without namespaces."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(path.read_text(encoding="utf-8"))


def text(element: Element) -> str:
    return " ".join("".join(element.itertext()).split())


def tables(root: Element) -> dict[str, list[dict[str, str]]]:
    """Caption -> rows, each heading -> text."""
    found = {}
    for table in root.iter("table"):
        headings = [text(th) for th in table.findall("thead/tr/th")]
        caption = table.find("caption")
        assert caption is not None
        rows = table.findall("tbody/tr")
        found[text(caption)] = [dict(zip(headings, map(text, row), strict=True)) for row in rows]
    return found


def test_the_page_shows_the_numbers_of_the_folders(page: Path) -> None:
    root = tree(page)
    shown = tables(root)
    rows = {row["decoder"]: row for row in shown["eval: toy, test split, 10 problems a task"]}
    for decoder, own in CELLS.items():
        numbers, row = summarize_records(own), rows[decoder]  # hostile names survive, and as text
        assert row["solved % [95 %]"] == percent(numbers["solved"], numbers["solved_interval"])
        assert row["score % [95 %]"] == percent(numbers["score"], numbers["score_interval"])
        assert row["NFE"] == f"{numbers['nfe']:.0f}"
        assert row["tokens/forward"] == f"{32 / numbers['nfe']:.1f}" and row["length"] == "24.5"
    pooled = {(row["decoder"], row["train.objective"]): row for row in shown["study: All cells"]}["full", "cj"]
    assert pooled["seeds"] == "2" and pooled["solved % [95 %]"].startswith("95.0 [")  # 9 and 10 of 10 under two seeds
    assert pooled["passes in training, at most (thousands)"] == "12"
    untrained = shown["Against the untrained model"]
    found = [f"{row['train.objective']} {row['solved, points [95 %]'].split()[0]}" for row in untrained]
    assert found == ["cj +95.0", "diffu +20.0"]
    assert any("Holm's p holds for all comparisons" in text(p) for p in root.iter("p"))
    training = {row["run"]: row for row in shown["Validation accuracy and cost"]}
    assert training["run"]["seconds in rollouts"] == "4" and training["cj--seed1"]["seconds in rollouts"] == "60"
    assert training["run"]["completions sampled"] == str(4 * 8) and training["run"]["passes, at most"] == ""
    assert training["cj--seed1"]["passes, at most"] == "12,345"


def test_the_page_is_one_valid_file_that_asks_for_nothing(page: Path) -> None:
    root = tree(page)
    sections = [s.get("id") for s in root.iter("section")]
    assert sections == ["results", "front", "differences", "steps", "order", "training", "lengths", "folders"]
    assert [a.get("href") for a in root.iter("a")] == [f"#{s}" for s in sections]
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    for element in root.iter():
        for name in ("src", "href", "action", "data", "poster"):
            assert element.get(name, "#").startswith(("data:", "#")), element.attrib
    styles = "".join(text(s) for s in root.iter("style"))
    assert "url(" not in styles and "@import" not in styles
    images = list(root.iter("img"))
    assert all(len(i.get("alt", "")) > 40 and i.get("src", "").startswith("data:image/png;base64,") for i in images)
    stems = {"front", "steps-sudoku", "order-sudoku", "curves", "lengths-sudoku"}
    # The objectives are compared under the one seed that both have.
    stems |= {f"differences-{axis}" for axis in ("training", "decoder", "train.objective")}
    written = {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")} | {"report.html"}
    assert {p.name for p in page.parent.iterdir()} == written and len(images) == len(stems)
    facts = [json.loads("".join(pre.itertext())) for pre in root.iter("pre")]
    assert {"model": {"name": "toy"}, "split": "test"} in facts and {"unmask": "1"} in facts


def test_a_browser_shows_it(page: Path) -> None:
    with open_page(page, width=360, touch=True) as (shown, problems):
        assert shown.evaluate("document.documentElement.scrollWidth") == 360
        assert shown.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 100)")
        assert problems == []
    with open_page(page, colors="dark") as (shown, problems):
        results = shown.locator("section#results table").first
        column_of = "rows => rows.map(r => Number(r.cells[2].textContent))"
        results.get_by_role("button", name="NFE").click()
        assert results.locator("tbody tr").evaluate_all(column_of) == [7, 20, 64]  # as numbers, not as text
        results.get_by_role("button", name="NFE").click()
        assert results.locator("tbody tr").evaluate_all(column_of) == [64, 20, 7]
        assert results.locator("th[aria-sort=descending]").count() == 1
        assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
        assert problems == []


def test_a_study_reads_as_its_summary_says(tmp_path: Path) -> None:
    folder = study(tmp_path / "study")
    source = read_study(folder, "study")
    others = ["the first decoder", "the first train.objective", "the untrained model"]
    assert [t.title for t in source.compared] == [f"Against {other}" for other in others]
    assert [row for row, _ in source.differences] == summarize(read_cells(folder))["differences"]
    (folder / "study.yaml").write_text(yaml.safe_dump({"compare": ["train.objective"]}))
    assert len(read_study(folder, "study").compared) == 2  # and against the untrained model
    by_label = {cell["label"]: cell for cell in source.cells}
    assert list(by_label) == ["full · untrained", "ass · untrained", "full · cj", "full · diffu"]
    assert by_label["full · cj"]["lengths"] == [*range(30, 40)] * 2
    assert [run["label"] for run in source.runs] == ["cj, ass"] * 2 and source.runs[1]["seconds_update"] == 30
    table = {"title": "Which <objective>", "rows": ["train.objective"], "columns": ["decoder"], "against": ["training"]}
    later = {**table, "title": "Later", "where": {"decoder": "none"}}  # it has no cell yet
    (folder / "study.yaml").write_text(yaml.safe_dump({"tables": [table, later]}))
    said, (*_, page) = report([folder], tmp_path / "out")
    assert said.startswith("**Which <objective>**\n\n| train.objective | full NFE |") and said.count("**\n") == 3
    assert "Which &lt;objective&gt;" in page.read_text()


def test_curves_are_means_over_the_seeds_that_have_a_value(tmp_path: Path) -> None:
    folder = study(tmp_path / "study")
    short = {**curves(), **{key: curves()[key][:2] for key in STEPS}, "eos_share": [0.5, None]}
    cells = [cell("full", "10", "cj", 0, curves=curves()), cell("full", "10", "cj", 1, curves=short)]
    (folder / "cells.jsonl").write_text(lines(cells))
    (found,) = read_study(folder, "study").cells
    assert np.array_equal(found["curves"]["eos_share"], [0.25, 0.25, math.nan, 1.0], equal_nan=True)
    assert found["curves"]["order"].shape == (16, 32) and np.isnan(found["curves"]["order"][:, 31]).all()
    assert np.array_equal(found["curves"]["order"][:, 5], np.eye(16)[4])


def test_lengths_come_from_the_records(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "eval", CELLS)
    assert [c["lengths"] for c in collect([folder])[0].cells] == [[*range(20, 30)]] * 3
    for path in (folder / "records").iterdir():
        path.unlink()
    assert [c["lengths"] for c in collect([folder])[0].cells] == [[]] * 3  # a committed summary is enough for the rest


def test_labels_name_what_differs(tmp_path: Path) -> None:
    assert varying([{"a": 1, "b": 2, "old": 0}, {"a": 1, "b": 3}]) == ["b"]  # an older file lacks a setting
    free, cj = {"d": "x", "train.o": None, "train.n": None}, {"d": "x", "train.o": "cj", "train.n": 4}
    assert telling([free, cj]) == ["train.o"]  # once is enough
    assert telling([free, cj, {**cj, "train.n": 8}]) == ["train.n"]
    assert in_words(free, ["d", "train.n"]) == "x, untrained" and in_words(cj, ["train.o", "train.n"]) == "cj, n=4"
    assert in_words({**cj, "train.n": None}, ["train.n"]) == "n=–"  # trained, without that setting
    names = ["a/test", "b/test"]
    folders = [evaluation(tmp_path / name, {"full": records(4, 2, 8)}) for name in names]
    assert [c["label"] for source in collect(folders) for c in source.cells] == ["full · a/test", "full · b/test"]
    assert [c["label"] for c in collect(folders[:1])[0].cells] == ["full"]
    runs = [run(tmp_path / str(i), i, lora_r=r) for i, r in enumerate((None, None, 4))]
    assert [r["label"] for source in collect(runs) for r in source.runs] == ["lora_r=–", "lora_r=–", "lora_r=4"]
    assert [r["label"] for source in collect(runs[:2]) for r in source.runs] == ["cj, ass"] * 2


def test_each_section_only_where_there_is_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(run(tmp_path / f"run{seed}", seed)) for seed in (0, 1)]
    command(folders)  # into the first of them
    root = tree(tmp_path / "run0" / "report.html")
    assert [s.get("id") for s in root.iter("section")] == ["training", "folders"]
    assert "passes, at most" not in tables(root)["Validation accuracy and cost"][0]  # no row has a number for it
    said = capsys.readouterr().out
    assert "| run1 | cj | ass | sudoku | 25.0 % | 60.0 % (2) | 60.0 % | 4 | 32 |" in said
    assert (tmp_path / "run0" / "curves.png").stat().st_size > 10_000 and (tmp_path / "run0" / "curves.svg").is_file()
    assert f"page    {tmp_path / 'run0' / 'report.html'}" in said
    # Names and an interval that matplotlib would refuse.
    cells = {"_hidden.yaml": records(4, 2, 8), "$\\nothing{$": records(4, 2, 8)}
    report([evaluation(tmp_path / "bare", cells, solved_interval=[0.6, 0.4999])], tmp_path / "out")
    sections = [s.get("id") for s in tree(tmp_path / "out" / "report.html").iter("section")]
    assert sections == ["results", "front", "lengths", "folders"]


def test_a_mistake_is_one_sentence(tmp_path: Path) -> None:
    names = ("good", "cut", "strange", "unfinished", "broken")
    good, cut, strange, unfinished, broken = (evaluation(tmp_path / n, {"full": records(4, 2, 8)}) for n in names)
    (tmp_path / "empty").mkdir()
    (cut / "summary.json").write_text('{"config": ')
    write_json(strange / "summary.json", {"config": {}})
    (unfinished / "summary.json").unlink()
    with (broken / "records" / "sudoku--full.jsonl").open("a") as file:
        file.write("{\n")
    waiting, sft = (run(tmp_path / name, 0) for name in ("waiting", "other"))
    (waiting / "metrics.jsonl").write_text("")
    (sft / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    no_cells, twice, axis = (study(tmp_path / name) for name in ("no_cells", "twice", "axis"))
    (no_cells / "cells.jsonl").write_text("")
    (twice / "cells.jsonl").write_text(2 * (twice / "cells.jsonl").read_text())
    (axis / "study.yaml").write_text("compare: [decodr]\n")
    for arguments, message in (
        ([], "no folder|lacks"),
        ([tmp_path / "nowhere"], "nowhere does not exist: choose a folder of unmask rl"),
        ([good / "summary.json"], "summary.json is a file: choose a folder of unmask rl"),
        ([tmp_path / "empty"], "holds no reinforcement-learning run"),
        ([good, good], "good is named twice: name it once"),
        ([cut], r"cut/summary\.json is damaged \(.*\): choose a complete folder"),
        ([strange], r"strange/summary\.json is damaged \(it lacks 'environment'\): choose a complete folder"),
        ([unfinished], "not finished: start its unmask eval command again"),
        ([broken], r"broken/records/sudoku--full\.jsonl:5 is damaged"),
        ([waiting], "metrics.jsonl is empty: let the run make its first update"),
        ([sft], "no rewards among the metrics"),
        ([no_cells], "holds no finished cell of a study"),
        ([twice], "cells.jsonl holds a cell twice: choose a complete folder"),
        ([axis], "unknown axis in compare 'decodr': did you mean 'decoder'"),
        ([good, "--output", "/proc/nothing"], "cannot write to /proc/nothing.*; choose another --output"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            command([*map(str, arguments)])
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("report.html")) and not list(tmp_path.rglob("*.partial"))
