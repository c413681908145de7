"""Committed cells reproduce the committed tables and figures exactly, and the documents quote them."""

from __future__ import annotations

import re

import pytest

from benchmarks.report.study import read_study
from benchmarks.study import publish
from benchmarks.study.lines import read_cells
from unmask.results.statistics import pareto_front

STUDIES = sorted(p.parent for p in publish.RESULTS.glob("*/cells.jsonl"))
INTERVAL = re.compile(r"(?<![\d.])[+-]?\d+\.\d \[[+-]?\d+\.\d, [+-]?\d+\.\d\]")


def documents() -> str:
    return "\n".join(document.read_text() for document in publish.DOCUMENTS)


@pytest.mark.parametrize("folder", STUDIES, ids=lambda p: p.name)
def test_tables_and_figures_follow_from_the_cells(folder: publish.Path) -> None:
    assert (folder / "table.md").read_text() == publish.tables(folder)[0]
    # A study begun from the committed cells does none of them again: what its file asks for has their keys.
    assert {line["key"] for line in read_cells(folder)} <= publish.study(folder.name)[1].labels.keys()
    cells = read_study(folder, folder.name).cells
    drawn = re.findall(r"<!-- (.*?) -->", (folder / "front.svg").read_text())  # its texts
    for task in {cell["task"] for cell in cells}:
        front = pareto_front([c for c in cells if c["task"] == task], lambda c: (c["nfe"], c["solved"]))
        assert all(any(text.endswith(f"  {cell['label']}") for text in drawn) for cell in front)
        assert any(text.startswith(f"{task}, ") for text in drawn)
    places = {m.group("title") for m in publish.PLACE.finditer(documents()) if m.group("study") == folder.name}
    assert places == {table["title"] for table in publish.study(folder.name)[0].tables}


def test_the_documents_quote_the_tables() -> None:
    """The tables of the document are those of the cells, and every interval in its sections on studies stands in one."""
    for document in publish.DOCUMENTS:
        assert publish.with_tables(document.read_text()) == document.read_text()
    committed = {i for folder in STUDIES for i in INTERVAL.findall((folder / "table.md").read_text())}
    quoted = [
        interval
        for section in re.split(r"\n##+ ", documents())
        if "results/study/" in section
        for interval in INTERVAL.findall(section)
    ]
    concluded = INTERVAL.findall((publish.ROOT / "docs" / "conclusions.md").read_text())
    assert len(quoted) > 50 and len(concluded) > 5
    assert [i for i in quoted + concluded if i not in committed] == []
