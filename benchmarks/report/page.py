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

from benchmarks.report import figures
from benchmarks.report.collect import collect
from benchmarks.report.figures import Picture, task_of
from benchmarks.report.source import Source
from unmask.io.files import check_writable, write_text, writing_to
from unmask.results.figures import Values
from unmask.results.style import save_figure
from unmask.results.tables import Table, percent, plain


@dataclass(frozen=True)
class Section:
    """A part of the page; ``name`` is its anchor."""

    name: str
    title: str
    says: str = ""
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


def report(folders: Sequence[Path], output: Path) -> tuple[str, list[Path]]:
    """Write the figures and report.html into ``output``; returns the main tables as Markdown, and the files.

    Raises:
        UserError: for a folder that holds nothing to report, and where ``output`` cannot be written.
    """
    sources = collect(folders)
    page = output / "report.html"
    check_writable(page)
    sections = [s for s in _sections(sources) if s.tables or s.pictures]
    written: list[Path] = []
    images: dict[str, str] = {}
    with writing_to(output):
        for picture in (p for section in sections for p in section.pictures):
            png, svg = save_figure(picture.figure, output / picture.stem)
            images[picture.stem] = f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"
            written += [png, svg]
        write_text(page, _render(sources, sections, images))
    main = [table for section in sections if section.name in ("results", "training") for table in section.tables]
    return "\n".join(table.titled_markdown() for table in main), [*written, page]


def _sections(sources: Sequence[Source]) -> Iterator[Section]:
    """All sections; those without data have neither tables nor pictures."""
    cells = [cell for source in sources for cell in source.cells]
    runs = [run for source in sources for run in source.runs]
    yield Section(
        "results",
        "Results",
        "Solved and score with 95 % intervals. NFE: forward passes a sequence. Length: tokens before the first end token. "
        "Seconds are those of the machine that ran, with whatever else it did.",
        [_named(s, table, sources) for s in sources for table in s.tables],
    )
    front = [figures.accuracy_picture(cells)] if cells else []
    yield Section("front", "Accuracy against forward passes", pictures=front)
    studies = [source for source in sources if source.compared]
    several = len(studies) > 1
    yield Section(
        "differences",
        "Paired differences",
        " ".join(f"{s.name}: {s.note}" if several else s.note for s in studies),
        [_named(s, table, studies) for s in studies for table in s.compared],
        [p for s in studies for p in figures.differences(s.differences, s.name if several else "")],
    )
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


def _named(source: Source, table: Table, sources: Sequence[Source]) -> Table:
    """The table with its folder in the title, where there are several."""
    return replace(table, title=f"{source.name}: {table.title}") if len(sources) > 1 else table


def runs_table(runs: Sequence[Values]) -> Table:
    """First, best and last validation accuracy of every run, and what it took."""
    costs = {"updates": "updates", "completions": "completions sampled", "training_passes": "passes, at most"}
    costs |= {"seconds_rollout": "seconds in rollouts", "seconds_update": "seconds in updates"}
    rows = []
    for run in runs:
        names = [run["name"], *(plain(run["settings"].get(key)) for key in ("objective", "decoder"))]
        for key in (k for k in run["metrics"] if k.endswith("_solved")):
            curve = run["metrics"][key].dropna()
            best = f"{percent(curve.max())} % ({curve.idxmax()})"
            shares = [f"{percent(curve.iloc[0])} %", best, f"{percent(curve.iloc[-1])} %"]
            rows.append([*names, task_of(key), *shares, *(f"{run[k]:,.10g}" if k in run else "" for k in costs)])
    headings = ["run", "objective", "decoder", "validation", "first", "best (update)", "last", *costs.values()]
    return Table(headings, rows, 4, "Validation accuracy and cost").without_empty()


def _render(folders: Sequence[Source], sections: Sequence[Section], images: dict[str, str]) -> str:
    here = files("benchmarks.report")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["json"] = partial(json.dumps, indent=2, ensure_ascii=False, default=str)
    template = environment.from_string((here / "page.html").read_text(encoding="utf-8"))
    style = (here / "page.css").read_text(encoding="utf-8")
    return template.render(folders=folders, sections=sections, images=images, style=style)
