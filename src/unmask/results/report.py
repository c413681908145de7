"""The sections of a report, and one HTML file of them that asks for nothing outside itself."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment

from unmask.io.files import check_writable, write_text, writing_to
from unmask.results import figures
from unmask.results.collect import Folder, Material, collect, runs_table
from unmask.results.figures import Picture
from unmask.results.style import save_figure
from unmask.results.tables import Table


@dataclass(frozen=True)
class Section:
    """A part of the page; ``name`` is its anchor."""

    name: str
    title: str
    says: str = ""
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


def report(folders: Sequence[Path], output: Path) -> tuple[str, list[Path]]:
    """Write the figures and report.html of ``folders`` into ``output``; returns the main tables as Markdown, and the files.

    Raises:
        UserError: for a folder that holds nothing to report, and where ``output`` cannot be written.
    """
    return write_report(collect(folders), [], output)


def write_report(material: Material, more: Sequence[Section], output: Path) -> tuple[str, list[Path]]:
    """``report`` of what was collected, with ``more`` sections before those on the steps."""
    page = output / "report.html"
    check_writable(page)
    sections = [s for s in _sections(material, more) if s.tables or s.pictures]
    written: list[Path] = []
    sources: dict[str, str] = {}
    with writing_to(output):
        for picture in (p for section in sections for p in section.pictures):
            png, svg = save_figure(picture.figure, output / picture.stem)
            sources[picture.stem] = f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"
            written += [png, svg]
        write_text(page, _render(material.folders, sections, sources))
    main = [table for section in sections if section.name in ("results", "training") for table in section.tables]
    return "\n".join(table.titled_markdown() for table in main), [*written, page]


def _sections(material: Material, more: Sequence[Section]) -> Iterator[Section]:
    """All sections; those without data have neither tables nor pictures."""
    cells, runs, folders = material.cells, material.runs, material.folders
    tables = [(folder, table) for folder in folders for table in folder.tables]
    yield Section(
        "results",
        "Results",
        "Solved and score with 95 % intervals. NFE: forward passes a sequence. Length: tokens before the first end token. "
        "Seconds are those of the machine that ran, with whatever else it did.",
        [replace(t, title=f"{f.name}: {t.title}") if len(folders) > 1 else t for f, t in tables],
    )
    front = [figures.accuracy_picture(cells)] if cells else []
    yield Section("front", "Accuracy against forward passes", pictures=front)
    yield from more
    yield Section("steps", "End tokens and confidence over the steps", pictures=figures.steps(cells))
    yield Section("order", "Order of the commits", pictures=figures.order(cells))
    yield Section(
        "training",
        "Training",
        "The log-prob mismatch is the mean difference between a sampled token's log-probability as it was recorded and as the "
        "objective scores it. Passes in training are those of full batches, without validation.",
        [runs_table(runs)] if runs else [],
        [figures.training(runs)] if runs else [],
    )
    yield Section("lengths", "Lengths", pictures=figures.lengths(cells))


def _render(folders: Sequence[Folder], sections: Sequence[Section], sources: dict[str, str]) -> str:
    here = files("unmask.results")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["json"] = partial(json.dumps, indent=2, ensure_ascii=False, default=str)
    template = environment.from_string((here / "page.html").read_text(encoding="utf-8"))
    style = (here / "page.css").read_text(encoding="utf-8")
    return template.render(folders=folders, sections=sections, sources=sources, style=style)
