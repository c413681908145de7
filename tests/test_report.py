"""``unmask report``: what the page shows is what the folders say; one file, valid, small, the same every time."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree.ElementTree import Element

import html5lib
import matplotlib
import numpy as np
import pytest
from PIL import Image

from browser import open_page
from report_folders import CELLS, cell, curves, evaluation, lines, records, result, run, study
from unmask.errors import UserError
from unmask.evaluation.records import summarize
from unmask.io.files import write_json
from unmask.io.schema import STEPS
from unmask.results import page
from unmask.results.accuracy import percent
from unmask.results.collect import Folder, Material, collect, setting, varying
from unmask.results.command import command
from unmask.results.sections import _differences, report
from unmask.results.style import Picture
from unmask.results.tables import results_tables


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    """One folder of each kind, and the folder with their report."""
    at = tmp_path_factory.mktemp("mixed")
    folders = [evaluation(at / "eval", CELLS, curves=curves()), study(at / "study"), run(at / "run", 0)]
    report(folders, at / "report")
    return folders, at / "report"


# ---- the page --------------------------------------------------------------------------------------------------------------


def tree(path: Path) -> Element:
    """The page under the strict rules of HTML5, without namespaces."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(path.read_text(encoding="utf-8"))


def text(element: Element) -> str:
    return " ".join("".join(element.itertext()).split())


def tables(root: Element) -> dict[str, list[dict[str, tuple[str, float | None]]]]:
    """Caption -> rows, each heading -> (text, value to sort by)."""
    found = {}
    for table in root.iter("table"):
        headings = [text(th) for th in table.findall("thead/tr/th")]
        rows = []
        for row in table.findall("tbody/tr"):
            values = [(text(c), float(v) if (v := c.get("data-value")) else None) for c in row]
            rows.append(dict(zip(headings, values, strict=True)))
        caption = table.find("caption")
        assert caption is not None
        found[text(caption)] = rows
    return found


def test_the_page_shows_the_numbers_of_the_folders(mixed: tuple[list[Path], Path]) -> None:
    root = tree(mixed[1] / "report.html")
    shown = tables(root)
    rows = {(r["folder"][0], r["decoder"][0], r["train.objective"][0]): r for r in shown["sudoku"]}
    assert len(rows) == 3 + 4
    for decoder, own in CELLS.items():
        numbers, row = summarize(own), rows["eval", decoder, "–"]  # hostile names survive, and as text
        assert row["solved % [95 %]"] == (percent(numbers["solved"], numbers["solved_interval"]), numbers["solved"])
        assert row["cell accuracy % [95 %]"] == (percent(numbers["score"], numbers["score_interval"]), numbers["score"])
        assert row["NFE"] == (f"{numbers['nfe']:.1f}", numbers["nfe"])
        assert row["tokens/forward"][1] == 32 / numbers["nfe"] and row["length"][1] == 24.5
    pooled = rows["study", "full", "cj"]  # 9 and 10 of 10 under two seeds
    assert pooled["seeds"][1] == 2 and pooled["solved % [95 %]"][1] == 0.95
    differences = shown["training: each against untrained"]
    assert [(r["train.objective"][0], r["solved, points [95 %]"][1]) for r in differences] == [
        ("cj", 0.95),
        ("diffu", 0.2),
    ]
    assert differences[0]["solved, points [95 %]"][0].startswith("+95.0 [")
    says = [text(p) for p in root.iter("p")]
    assert any("Holm's p holds for all comparisons" in p for p in says)
    costs = {(r["folder"][0], r["decoder"][0], r["train.objective"][0]): r for r in shown["Evaluation"]}
    assert (
        costs["eval", "full", "–"]["passes in all"][1] == 640 and costs["eval", "full", "–"]["ms a sequence"][1] == 500
    )
    assert costs["study", "full", "cj"]["passes in training, at most"] == ("12,345", 12345)
    assert costs["study", "full", "cj"]["seconds"][1] == 3.0  # of both seeds
    training = {r["run"][0]: r for r in shown["Training"]}
    assert training["run"]["seconds in rollouts"][1] == 4.0 and training["cj--seed1"]["seconds in rollouts"][1] == 60.0
    assert training["run"]["completions sampled"][1] == 4 * 8 and training["run"]["passes in training, at most"] == (
        "–",
        None,
    )


def test_the_page_is_one_valid_file_that_asks_for_nothing(mixed: tuple[list[Path], Path]) -> None:
    root = tree(mixed[1] / "report.html")
    sections = [s.get("id") for s in root.iter("section")]
    assert sections == ["results", "front", "differences", "steps", "order", "training", "lengths", "cost", "folders"]
    assert [a.get("href") for a in root.iter("a")] == [f"#{s}" for s in sections]
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    for element in root.iter():
        for name in ("src", "href", "action", "data", "poster"):
            assert element.get(name, "#").startswith(("data:", "#")), element.attrib
    styles = "".join(text(s) for s in root.iter("style"))
    assert "url(" not in styles and "@import" not in styles
    images = list(root.iter("img"))
    assert all(len(i.get("alt", "")) > 40 and int(i.get("width", 0)) > 100 for i in images)
    assert sum(i.get("src", "").startswith("data:image/svg+xml;") for i in images) == len(images)
    stems = {"front", "differences-training", "steps-sudoku", "order-sudoku", "curves", "lengths-sudoku"}
    kinds = {"differences-decoder", "differences-train.objective"}  # of the objectives, under the one seed of both
    written = {f"{s}.{k}" for s in stems | kinds for k in ("png", "svg")} | {"report.html"}
    assert {p.name for p in mixed[1].iterdir()} == written and len(images) == len(stems | kinds)
    facts = [json.loads("".join(pre.itertext())) for pre in root.iter("pre")]
    assert {"model": {"name": "toy"}, "split": "test"} in facts and {"unmask": "1"} in facts
    assert [text(s) for s in root.iter("summary")] == [
        "eval: configuration",
        "eval: environment",
        "study: environment",
        "run: configuration",
    ]


def test_the_same_folders_give_the_same_bytes(mixed: tuple[list[Path], Path], tmp_path: Path) -> None:
    """Also in another process, with other hashes and other settings of matplotlib."""
    folders, first = mixed
    (tmp_path / "matplotlibrc").write_text("axes.linewidth: 5\nxtick.major.size: 20\n")
    code = "import sys; from unmask.results.command import command; command(sys.argv[1:])"
    arguments = [*map(str, folders), "--output", str(tmp_path / "again")]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for path in first.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_a_browser_shows_it(mixed: tuple[list[Path], Path]) -> None:
    with open_page(mixed[1] / "report.html", width=360, touch=True) as (shown, problems):
        assert shown.evaluate("document.documentElement.scrollWidth") == 360
        assert shown.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 100)")
        assert problems == []
    with open_page(mixed[1] / "report.html", colors="dark") as (shown, problems):
        table = shown.locator("section#training table, section#cost table").last
        heading = table.get_by_role("button", name="passes in training, at most")

        def column() -> list[str]:
            return table.locator("tbody tr").evaluate_all("rows => rows.map(r => r.cells[0].textContent)")

        heading.click()
        assert column()[-1] == "run"  # it has no such number
        heading.click()
        assert column()[-1] == "run"
        assert table.locator("th[aria-sort=descending]").count() == 1
        results = shown.locator("section#results table")
        nfe = "rows => rows.map(r => Number(r.querySelector('.number:nth-child(7)').dataset.value))"
        results.get_by_role("button", name="NFE").click()
        values = results.locator("tbody tr").evaluate_all(nfe)
        assert values == sorted(values) and values[-1] == 64 and 7 in values  # as numbers, not as text
        results.get_by_role("button", name="NFE").click()
        assert results.locator("tbody tr").evaluate_all(nfe) == sorted(values, reverse=True)
        assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
        assert problems == []


def test_a_page_never_exceeds_its_limit() -> None:
    """SVG where it is light, PNG where it is heavy or room is short, smaller PNG, and at last a refusal."""
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    png = io.BytesIO()
    Image.fromarray(noise).save(png, "PNG")  # 1.4 MB, nothing to compress

    def pictures(letters: int, count: int) -> list[Picture]:
        svg = f"<svg>{'x' * letters}</svg>"
        return [Picture(f"p{i}", "a caption", svg, png.getvalue()) for i in range(count)]

    def shown(*pictures: Picture) -> list[tuple[str, int]]:
        """Kind and size of every image."""
        text = page.render([], [page.Section("s", "S", pictures=list(pictures))])
        assert len(text.encode()) < page.LIMIT == 5_000_000
        found = re.findall(r'src="data:image/(svg|png)([^"]*)" alt="a caption" width="512" height="384"', text)
        assert len(found) == len(pictures)
        return [(kind, len(data)) for kind, data in found]

    assert [kind for kind, _ in shown(*pictures(1000, 3))] == ["svg"] * 3
    assert [kind for kind, _ in shown(*pictures(page.HEAVY + 1, 1))] == ["png"]
    assert [kind for kind, _ in shown(*pictures(page.HEAVY - 100, 9))] == ["svg"] * 9
    heavy = shown(*pictures(page.HEAVY + 1, 5))  # two PNG have room, the others are made smaller
    assert [kind for kind, _ in heavy] == ["png"] * 5 and sum(size > 1_500_000 for _, size in heavy) == 2
    facts = [Folder("a", "b", {"configuration": "x" * page.LIMIT})]
    with pytest.raises(UserError, match=r"a page of 5\.1 MB, more than 5: give fewer folders"):
        page.render(facts, [page.Section("s", "S", pictures=pictures(1000, 1))])


# ---- what goes in ----------------------------------------------------------------------------------------------------------


def test_a_study_reads_as_its_summary_says(tmp_path: Path) -> None:
    from unmask.results.summary import read_cells, summarize_study

    folder = study(tmp_path / "study")
    computed = collect([folder])
    summary = summarize_study(read_cells(folder))
    write_json(folder / "summary.json", {**summary, "note": "of fewer cells"})  # the cells are what counts
    assert collect([folder]).notes == computed.notes == {"study": summary["note"]}
    assert computed.differences == [{"folder": "study", **d} for d in summary["differences"]]
    (folder / "study.yaml").write_text("compare: [train.objective]\n")
    assert {d["axis"] for d in collect([folder]).differences} == {
        d["axis"] for d in summarize_study(read_cells(folder), ["train.objective"])["differences"]
    }
    two = _differences(collect([folder, study(tmp_path / "second")]))
    assert two.says.startswith("study: ") and " second: " in two.says and len(two.pictures) == len(two.tables) == 5
    by_label = {r.label: r for r in computed.results}
    assert list(by_label) == ["full · untrained", "ass · untrained", "full · cj", "full · diffu"]
    assert by_label["full · cj"].lengths == [*range(30, 40)] * 2
    assert [run.label for run in computed.runs] == ["cj, ass"] * 2 and computed.runs[1].costs["seconds_update"] == 30


def test_curves_are_means_over_the_seeds_that_have_a_value(tmp_path: Path) -> None:
    folder = study(tmp_path / "study")
    short = {**curves(), **{key: curves()[key][:2] for key in STEPS}, "eos_share": [0.5, None]}
    cells = [cell("full", "10", "cj", 0, curves=curves()), cell("full", "10", "cj", 1, curves=short)]
    (folder / "cells.jsonl").write_text(lines(cells))
    (found,) = collect([folder]).results
    assert np.array_equal(found.curves["eos_share"], [0.25, 0.25, math.nan, 1.0], equal_nan=True)
    assert found.curves["order"].shape == (16, 32) and np.isnan(found.curves["order"][:, 31]).all()
    assert np.array_equal(found.curves["order"][:, 5], np.eye(16)[4])


def test_lengths_come_from_the_records(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "eval", CELLS)
    assert [r.lengths for r in collect([folder]).results] == [[*range(20, 30)]] * 3
    for path in (folder / "records").iterdir():
        path.unlink()
    assert [r.lengths for r in collect([folder]).results] == [[]] * 3  # a committed summary is enough for the rest


def test_labels_name_what_differs(tmp_path: Path) -> None:
    assert varying([{"a": 1, "b": 2, "old": 0}, {"a": 1, "b": 3}]) == ["b"]  # an older file lacks a setting
    free, cj = {"d": "x", "train.o": None, "train.n": None}, {"d": "x", "train.o": "cj", "train.n": 4}
    assert varying([free, cj]) == ["train.o"]  # once is enough
    assert varying([free, cj, {**cj, "train.n": 8}]) == ["train.n"]
    assert setting(free, ["d", "train.n"]) == "x, untrained" and setting(cj, ["train.o", "train.n"]) == "cj, n=4"
    assert setting({**cj, "train.n": None}, ["train.n"]) == "n=–"  # trained, without that setting
    names = ["a/test", "b/test"]
    folders = [evaluation(tmp_path / name, {"full": records(4, 2, 8)}) for name in names]
    assert [r.label for r in collect(folders).results] == ["full · a/test", "full · b/test"]
    assert [r.label for r in collect(folders[:1]).results] == ["full"]
    runs = [run(tmp_path / str(i), i, lora_r=r) for i, r in enumerate((None, None, 4))]
    assert [r.label for r in collect(runs).runs] == ["lora_r=–", "lora_r=–", "lora_r=4"]
    assert [r.label for r in collect(runs[:2]).runs] == ["cj, ass"] * 2


def test_each_section_only_where_there_is_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(run(tmp_path / f"run{seed}", seed)) for seed in (0, 1)]
    command(folders)  # into the first of them
    root = tree(tmp_path / "run0" / "report.html")
    assert [s.get("id") for s in root.iter("section")] == ["training", "cost", "folders"]
    assert "passes in training, at most" not in tables(root)["Training"][0]  # no row has a number for it
    said = capsys.readouterr().out
    assert "| run1 | cj | ass | 4 | sudoku | 25.0 % | 60.0 % (2) | 60.0 % |" in said
    assert (tmp_path / "run0" / "curves.png").stat().st_size > 10_000 and (tmp_path / "run0" / "curves.svg").is_file()
    assert f"page    {tmp_path / 'run0' / 'report.html'}" in said
    bare = evaluation(tmp_path / "bare", {"full": records(4, 2, 8)})
    report([bare], tmp_path / "out")
    assert [s.get("id") for s in tree(tmp_path / "out" / "report.html").iter("section")] == [
        "results",
        "front",
        "lengths",
        "cost",
        "folders",
    ]


# ---- arithmetic ------------------------------------------------------------------------------------------------------------


def test_names_and_intervals_that_matplotlib_would_refuse(tmp_path: Path) -> None:
    cells = {"_hidden.yaml": records(4, 2, 8), "$\\nothing{$": records(4, 2, 8)}
    report([evaluation(tmp_path / "eval", cells, solved_interval=[0.6, 0.4999])], tmp_path)
    alone = run(tmp_path / "a", 0, model="_a"), run(tmp_path / "b", 0, model="_$b$")
    report(alone, tmp_path)


def test_seeds_have_a_column_only_where_there_are_several() -> None:
    (table,) = results_tables([result(7, 0.5)])
    assert "seeds" not in table.headings and len(table.rows[0]) == len(table.headings)
    (table,) = results_tables([result(7, 0.5), result(7, 0.5, seeds=3)])
    assert table.rows[1][table.headings.index("seeds")].value == 3


# ---- mistakes --------------------------------------------------------------------------------------------------------------


def test_a_mistake_is_one_sentence(tmp_path: Path) -> None:
    good = evaluation(tmp_path / "good", {"full": records(4, 2, 8)})
    (tmp_path / "empty").mkdir()
    cut = evaluation(tmp_path / "cut", {"full": records(4, 2, 8)})
    (cut / "summary.json").write_text('{"config": ')
    strange = evaluation(tmp_path / "strange", {"full": records(4, 2, 8)})
    write_json(strange / "summary.json", {"config": {}})
    unfinished = evaluation(tmp_path / "unfinished", {"full": records(4, 2, 8)})
    (unfinished / "summary.json").unlink()
    broken = evaluation(tmp_path / "broken", {"full": records(4, 2, 8)})
    with (broken / "records" / "sudoku--full.jsonl").open("a") as file:
        file.write("{\n")
    waiting = run(tmp_path / "waiting", 0)
    (waiting / "metrics.jsonl").write_text("")
    sft = run(tmp_path / "other", 0)
    (sft / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    no_cells = study(tmp_path / "no_cells")
    (no_cells / "cells.jsonl").write_text("")
    twice = study(tmp_path / "twice")
    (twice / "cells.jsonl").write_text(2 * (twice / "cells.jsonl").read_text())
    for arguments, message in (
        ([], "no folder given|lacks"),
        ([tmp_path / "nowhere"], "nowhere does not exist: give a folder of unmask rl"),
        ([good / "summary.json"], "summary.json is a file: give a folder of unmask rl"),
        ([tmp_path / "empty"], "holds no reinforcement-learning run"),
        ([good, good], "good is given twice: give it once"),
        ([cut], r"cut/summary\.json is damaged \(.*\): give a whole folder"),
        ([strange], r"strange/summary\.json is damaged \(it lacks 'environment'\): give a whole folder"),
        ([unfinished], "not finished: start its unmask eval command again"),
        ([broken], r"broken/records/sudoku--full\.jsonl:5 is damaged"),
        ([waiting], "metrics.jsonl is empty: let the run make its first update"),
        ([sft], "no rewards among the metrics"),
        ([no_cells], "holds no finished cell of a study"),
        ([twice], "cells.jsonl holds a cell twice: give a whole study"),
        ([good, "--output", "/proc/nothing"], "cannot write to /proc/nothing.*; choose another --output"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            command([*map(str, arguments)])
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("report.html")) and not list(tmp_path.rglob("*.partial"))
    assert collect([good]).results and isinstance(collect([good]), Material)


def test_the_readers_settings_do_not_leak(tmp_path: Path) -> None:
    with matplotlib.rc_context({"axes.linewidth": 5.0}):
        report([evaluation(tmp_path / "eval", {"full": records(4, 2, 8)})], tmp_path)
        assert matplotlib.rcParams["axes.linewidth"] == 5.0
