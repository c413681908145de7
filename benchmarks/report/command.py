"""The command line of ``python -m benchmarks report``, read without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from unmask.config import read_flags
from unmask.errors import UserError


@dataclass
class ReportArguments:
    """Figures and one HTML file of evaluations, trainings and studies, of one kind or mixed."""

    folders: Annotated[list[str], tyro.conf.Positional]
    """Folders of ``unmask eval``, ``unmask rl``, ``unmask distill`` or a study; runs that differ in the seed alone share a
    band."""
    output: str | None = None
    """Where report.html and the figures go; by default the first folder."""


def command(arguments: list[str]) -> None:
    a = read_flags(ReportArguments, arguments, prog="python -m benchmarks report")
    if not a.folders:
        raise UserError("no folder: name at least one folder of unmask eval, unmask rl, unmask distill or a study")
    from benchmarks.report.page import report

    said, written = report([Path(folder) for folder in a.folders], Path(a.output or a.folders[0]))
    print(said)
    for path in written:
        if path.suffix != ".svg":
            print(f"{'page' if path.suffix == '.html' else 'figure':<6}  {path}")
