"""Committed cells reproduce the committed tables and figures exactly, and the documents quote them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from unmask.config import read_config
from unmask.report import figures
from unmask.report.collect import collect
from unmask.report.style import look
from unmask.study.grid import StudyConfig, jobs_of
from unmask.study.summary import markdown, read_cells, summarise_study

ROOT = Path(__file__).parent.parent
STUDIES = sorted(p.parent for p in (ROOT / "docs" / "results" / "study").glob("*/cells.jsonl"))
INTERVAL = re.compile(r"[+-]?\d+\.\d \[[+-]?\d+\.\d, [+-]?\d+\.\d\]")


@pytest.mark.parametrize("folder", STUDIES, ids=lambda p: p.name)
def test_tables_and_figures_follow_from_the_cells(folder: Path) -> None:
    path = ROOT / "configs" / "study" / f"{folder.name}.yaml"
    config, cells = read_config(StudyConfig, path), read_cells(folder)
    named = {cell.key for job in jobs_of(config, path.parent) for cell in job.cells}
    assert {cell["key"] for cell in cells} <= named  # some may be still to come
    summary = summarise_study(cells, config.compare, config.baselines)
    assert (folder / "table.md").read_text() == markdown(summary)
    with look():
        assert figures.accuracy(collect([folder]).results).svg == (folder / "front.svg").read_text()


def test_the_documents_quote_the_tables() -> None:
    """Every interval in the sections on studies stands in a committed table."""
    committed = "".join((folder / "table.md").read_text() for folder in STUDIES)
    quoted = [
        interval
        for section in (ROOT / "docs" / "results.md").read_text().split("\n## ")
        if "results/study/" in section
        for interval in INTERVAL.findall(section)
    ]
    assert len(quoted) > 50 and [i for i in quoted if i not in committed] == []
