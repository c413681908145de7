"""Copy studies and searches into the documents: ``python -m benchmarks.study.publish STUDY...`` or ``tune``.

The cells of ``runs/study/STUDY`` go to ``docs/results/study/STUDY`` with the tables and the figure that follow from them, and
the tables that its file names go into docs/results.md or docs/results-rl.md, between ``<!-- study STUDY: TITLE -->`` and
``<!-- end -->``. A study need not be finished. ``tune``: the searches in ``runs/tune/NAME-BUDGET``, which go to
``docs/results`` and docs/tune.md.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.report.study import read_study
from benchmarks.study.config import StudyConfig
from benchmarks.study.grid import Grid, read_grid
from benchmarks.study.lines import Lines, cell_lines, read_cells, run_lines
from benchmarks.study.tables import markdown, read_out
from unmask.config import read_config
from unmask.errors import UserError
from unmask.io.files import as_yaml
from unmask.results import figures
from unmask.results.style import save_figure
from unmask.results.tables import Table, percent, points

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "docs" / "results" / "study"
SEARCHES = ROOT / "docs" / "results"
PLACE = re.compile(r"(<!-- (?:study (?P<study>[\w-]+): (?P<title>.+?)|searches) -->\n).*?(?=<!-- end -->)", re.DOTALL)
DOCUMENTS = [ROOT / "docs" / name for name in ("results.md", "results-rl.md", "tune.md")]


def study(name: str) -> tuple[StudyConfig, Grid]:
    """A study's file and what it asks for."""
    path = ROOT / "configs" / "study" / f"{name}.yaml"
    config = read_config(StudyConfig, path)
    return config, read_grid(config, path.parent)


@cache
def tables(folder: Path) -> tuple[str, dict[str, str]]:
    """table.md of a study's committed cells, and the tables for reading by title."""
    config, grid = study(folder.name)
    summary, found = read_out(read_cells(folder), config.compare, config.baselines, grid.tables)
    return markdown(summary, found), {table.title: table.titled_markdown() for table in found}


def figure(folder: Path) -> Figure:
    """Accuracy against passes of a study's committed cells."""
    return figures.accuracy(read_study(folder, folder.name).cells)


def searches() -> str:
    """A table of the committed searches of ``unmask tune``."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in SEARCHES.glob("tune-*.json")]
    found.sort(key=lambda search: (_model(search), list(search["config"]["tasks"]), search["config"]["budget"]))
    headings = ["model", "task", "budget", "winner", "best preset", "decoders", "passes spent"]
    headings += ["winner on test: NFE", "solved % [95 %]", "best preset on test: NFE", "solved % [95 %]", "difference"]
    rows = []
    for search in found:
        settings, test = search["config"], search["test"]
        if settings["metric"] != "solved":
            raise SystemExit(
                f"a search of {settings['tasks']} is for {settings['metric']}: the table is of problems solved"
            )
        row = [
            _model(search),
            *settings["tasks"],
            str(settings["budget"]),
            *(test[side]["decoder"] for side in ("winner", "best_preset")),
        ]
        row += [str(len(search["candidates"])), f"{sum(search['forward_passes'].values()):,}"]
        for entry in (test["winner"], test["best_preset"]):
            row += [f"{entry['nfe']:.1f}", percent(entry["solved"], entry["solved_interval"])]
        rows.append([*row, points(test["difference"], test["difference_interval"])])
    return Table(headings, rows, 5).markdown()


def _model(search: dict[str, Any]) -> str:
    return str(search["config"]["model"]["name"])


def with_tables(text: str) -> str:
    """The document with every table as the committed results say it; an unfinished study's may have no cell yet."""

    def table(place: re.Match[str]) -> str:
        name, title = place.group("study"), place.group("title")
        if not name:
            return place.group(1) + searches()
        if title not in {table["title"] for table in study(name)[0].tables}:
            raise SystemExit(f"configs/study/{name}.yaml has no table {title!r}: correct the place in the document")
        return place.group(1) + tables(RESULTS / name)[1].get(title, "")

    return PLACE.sub(table, text)


def publish(name: str) -> None:
    """Copy one study, its cells under the labels of its file as it is now."""
    run, folder = ROOT / "runs" / "study" / name, RESULTS / name
    config, grid = study(name)
    if not (run / "cells.jsonl").is_file():
        raise SystemExit(f"{run} holds no cells: run python -m benchmarks study configs/study/{name}.yaml first")
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("cells.jsonl", "runs.jsonl"):
        shutil.copy(run / file, folder)
    Lines(folder / "cells.jsonl", "cell", grid.labels, cell_lines).write()
    Lines(folder / "runs.jsonl", "train", grid.trainings, run_lines).write()
    if not grid.trainings:
        (folder / "runs.jsonl").unlink()
    summarised = {"compare": config.compare, "baselines": config.baselines, "tables": config.tables}
    (folder / "study.yaml").write_text(as_yaml(summarised), encoding="utf-8")
    (folder / "table.md").write_text(tables(folder)[0], encoding="utf-8")
    png, _ = save_figure(figure(folder), folder / "front")
    png.unlink()


def main(names: list[str]) -> None:
    for name in names:
        if name == "tune":
            for front in (ROOT / "runs" / "tune").glob("*-[0-9]*/front.json"):
                shutil.copy(front, SEARCHES / f"tune-{front.parent.name}.json")
        else:
            publish(name)
    for document in DOCUMENTS:
        document.write_text(with_tables(document.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
