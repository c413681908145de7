"""The command line of ``python -m benchmarks study``, read without torch."""

from __future__ import annotations

from pathlib import Path

from benchmarks.study.config import StudyConfig
from unmask.config import command_config
from unmask.io.files import read_text


def command(arguments: list[str]) -> None:
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
