"""The command lines of ``python -m benchmarks study`` and ``report``, read without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.study.config import StudyConfig
from unmask.config import command_config, read_flags
from unmask.io.files import read_text


def study_command(arguments: list[str]) -> None:
    about = (
        "A grid of trainings and evaluations, resumable. evaluate holds tables of unmask eval settings and decoder fields (at "
        "least one), train tables of unmask rl settings, tables what to show; a list makes one run of each value."
    )
    config = command_config(StudyConfig, arguments, "python -m benchmarks study", about)
    from benchmarks.study.run import study
    from unmask.evaluation.progress import progress_bars

    with progress_bars() as progress:
        study(config, Path(arguments[0]).parent, progress)
    print(read_text(Path(config.output) / "table.md"), end="")


@dataclass
class ReportArguments:
    """Figures and one HTML file of a study, finished or not."""

    folder: Annotated[str, tyro.conf.Positional]
    """The study's folder."""
    output: str | None = None
    """Where report.html and the figures go; by default the study's folder."""


def report_command(arguments: list[str]) -> None:
    a = read_flags(ReportArguments, arguments, prog="python -m benchmarks report")
    from benchmarks.study.report import report
    from unmask.results.command import print_report

    print_report(*report(Path(a.folder), Path(a.output or a.folder)))
