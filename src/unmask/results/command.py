"""The command line of ``unmask report``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from unmask.config import read_flags
from unmask.errors import UserError


@dataclass
class ReportArguments:
    """Figures and one HTML file of evaluations and training runs, of one kind or mixed."""

    folders: Annotated[list[str], tyro.conf.Positional]
    """Folders of ``unmask eval`` or ``unmask rl``; runs that differ in nothing but the seed share a band."""
    output: str | None = None
    """Where report.html and the figures go; by default the first folder."""


def command(arguments: list[str]) -> None:
    """``unmask report DIR…``."""
    a = read_flags(ReportArguments, arguments, prog="unmask report")
    if not a.folders:
        raise UserError("no folder: name at least one folder of unmask eval or unmask rl")
    from unmask.results.report import report

    print_report(*report([Path(folder) for folder in a.folders], Path(a.output or a.folders[0])))


def print_report(tables: str, written: Sequence[Path]) -> None:
    print(tables)
    for path in written:
        if path.suffix != ".svg":
            print(f"{'page' if path.suffix == '.html' else 'figure':<6}  {path}")
