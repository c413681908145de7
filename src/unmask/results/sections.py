"""The sections of a report: which there are, in which order, and what each says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unmask.io.files import check_writable, slug, write_text, writing_to
from unmask.results import figures, tables
from unmask.results.collect import Material, collect
from unmask.results.curves import curves
from unmask.results.page import Section, render
from unmask.results.style import Picture, look


def report(folders: Sequence[Path], output: Path) -> tuple[str, list[Path]]:
    """Write the figures and report.html into ``output``; returns the main tables as Markdown, and the files.

    Raises:
        UserError: for a folder that holds nothing to report, where ``output`` cannot be written, and for a page too large.
    """
    material = collect(folders)
    page = output / "report.html"
    check_writable(page)
    with look():
        sections = [s for s in _sections(material) if s.tables or s.pictures]
    html = render(material.folders, sections)
    with writing_to(output):
        written = [path for section in sections for shown in section.pictures for path in shown.save(output)]
        write_text(page, html)
    main = [table for section in sections if section.name in ("results", "training") for table in section.tables]
    return "\n".join(f"{table.caption}\n\n{table.markdown()}" for table in main), [*written, page]


def _sections(material: Material) -> Iterator[Section]:
    """All sections; those without data have neither tables nor pictures."""
    results, runs = material.results, material.runs
    yield Section(
        "results",
        "Results",
        "Solved and score with 95 % intervals. NFE: forward passes a sequence. Length: tokens before the first end token.",
        [*tables.chosen_tables(material.tables), *tables.results_tables(results)],
    )
    yield Section("front", "Accuracy against forward passes", pictures=[figures.accuracy(results)] if results else [])
    yield _differences(material)
    yield Section(
        "steps",
        "End tokens and confidence over the steps",
        pictures=list(figures.steps(results)),
    )
    yield Section("order", "Order of the commits", pictures=list(figures.order(results)))
    yield Section(
        "training",
        "Training",
        "The log-prob mismatch is the mean difference between the log-probability of a sampled token as it was recorded and as "
        "the objective scores it.",
        [tables.runs_table(runs)] if runs else [],
        [curves(runs)] if runs else [],
    )
    yield Section("lengths", "Lengths", pictures=list(figures.lengths(results)))
    yield Section(
        "cost",
        "Cost",
        "Passes of an evaluation, updates and completions are counted; passes in training are those of full batches, without "
        "validation. Seconds are those of the machine that ran, with whatever else it did; compare them within one folder at "
        "most.",
        ([tables.evaluation_costs(results)] if results else []) + ([tables.training_costs(runs)] if runs else []),
    )


def _differences(material: Material) -> Section:
    """A table and a figure for each axis of each study."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in material.differences:
        groups.setdefault((row["folder"], row["axis"]), []).append(row)
    several = len(material.notes) > 1
    pictures: list[Picture] = []
    for (folder, axis), rows in groups.items():
        title = tables.differences_title(rows) + (f" in {folder}" if several else "")
        stem = "differences-" + slug("-".join([folder] * several + [axis]))
        pictures += figures.differences(rows, stem, title)
    says = " ".join(f"{folder}: {note}" if several else note for folder, note in material.notes.items())
    return Section(
        "differences", "Paired differences", says, [tables.differences_table(g) for g in groups.values()], pictures
    )
