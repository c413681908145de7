"""The command line of ``unmask study``."""

from __future__ import annotations

import sys
from pathlib import Path

from unmask.config import command_config
from unmask.io.files import read_text
from unmask.study.config import StudyConfig


def command(arguments: list[str]) -> None:
    """``unmask study CONFIG``."""
    about = (
        "A grid of trainings and evaluations, resumable. evaluate holds tables of unmask eval settings and decoder fields (at "
        "least one), train tables of unmask rl settings, tables what to show; a list makes one run of each value."
    )
    config = command_config(StudyConfig, arguments, "unmask study", about)
    from unmask.evaluation.progress import progress_bars
    from unmask.study.run import study

    with progress_bars() as progress:
        study(config, Path(arguments[0]).parent, progress)
    print(read_text(Path(config.output) / "table.md"), end="")
    print(f"\nfigures: unmask report {config.output}", file=sys.stderr)
