"""Copy studies into the documents: ``python tools/publish.py STUDY...`` after ``unmask study configs/study/STUDY.yaml``.

The cells of ``runs/study/STUDY`` go to ``docs/results/study/STUDY`` with the tables and the figure that follow from them, and
the tables that its file names go into docs/results.md, between ``<!-- study STUDY: TITLE -->`` and ``<!-- end -->``. A study
need not be finished.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from functools import cache
from pathlib import Path

import yaml

from unmask.config import read_config
from unmask.report import figures
from unmask.report.collect import collect
from unmask.report.style import look
from unmask.study import pivot
from unmask.study.grid import Job, StudyConfig, jobs_of, labels, settings_of
from unmask.study.summary import markdown, read_cells, summarise_study

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "study"
DOCUMENT = ROOT / "docs" / "results.md"
PLACE = re.compile(r"(<!-- study (?P<study>[\w-]+): (?P<title>.+?) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def study(name: str) -> tuple[StudyConfig, list[Job]]:
    """A study's file and its jobs."""
    path = ROOT / "configs" / "study" / f"{name}.yaml"
    config = read_config(StudyConfig, path)
    return config, jobs_of(config, path.parent)


@cache
def tables(folder: Path) -> tuple[str, dict[str, str]]:
    """table.md of a study's committed cells, and the tables for reading by title."""
    config, jobs = study(folder.name)
    summary = summarise_study(read_cells(folder), config.compare, config.baselines)
    shown = pivot.pivots(config, settings_of(jobs, labels(jobs)[0]))
    return markdown(summary, shown), {table.title: table.markdown() for table in pivot.tables(shown, summary)}


def figure(folder: Path) -> str:
    """front.svg of a study's committed cells."""
    with look():
        return figures.accuracy(collect([folder]).results).svg


def with_tables(text: str) -> str:
    """The document with every study's tables as the committed cells say them."""

    def table(place: re.Match[str]) -> str:
        return f"{place.group(1)}{tables(RESULTS / place.group('study'))[1].get(place.group('title'), '')}"

    return PLACE.sub(table, text)


def publish(name: str) -> None:
    """Copy one study."""
    run, folder = ROOT / "runs" / "study" / name, RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    config, jobs = study(name)
    cells = {json.loads(line)["key"]: line for line in (run / "cells.jsonl").read_text().splitlines(keepends=True)}
    in_order = [cells.pop(cell.key) for job in jobs for cell in job.cells if cell.key in cells]
    if cells:
        raise SystemExit(f"{run} holds cells that configs/study/{name}.yaml does not name: {', '.join(cells)}")
    (folder / "cells.jsonl").write_text("".join(in_order))
    if (run / "runs.jsonl").stat().st_size:
        shutil.copy(run / "runs.jsonl", folder)
    summarised = {"compare": config.compare, "baselines": config.baselines, "tables": config.tables}
    (folder / "study.yaml").write_text(yaml.safe_dump(summarised, sort_keys=False))
    (folder / "table.md").write_text(tables(folder)[0])
    (folder / "front.svg").write_text(figure(folder))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        publish(name)
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text()))
