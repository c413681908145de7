"""The command line of ``unmask study``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from unmask.flags import read_flags
from unmask.terminal import console


@dataclass
class StudyArguments:
    """A grid of trainings and evaluations, resumable. Keys of the file may follow as flags: ``--jobs 2 --output DIR``."""

    config: Annotated[str, tyro.conf.Positional]
    """YAML file of a study."""


def command(arguments: list[str]) -> None:
    """``unmask study CONFIG``."""
    if not arguments or arguments[0].startswith("-"):
        read_flags(StudyArguments, arguments, prog="unmask study")
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from unmask.config import read_config
    from unmask.study.grid import StudyConfig
    from unmask.study.run import study

    config = read_config(StudyConfig, arguments[0], arguments[1:])
    screen = console(stderr=True)
    text = TextColumn("{task.fields[working]}", style="dim", markup=False)
    bar = Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), text, console=screen)
    said = -1

    def progress(done: int, total: int, working: list[str]) -> None:
        nonlocal said
        if not bar.tasks:  # only now: a mistake in the request leaves nothing but its sentence
            bar.start()
            bar.add_task("", total=total, working="")
        bar.update(bar.tasks[0].id, completed=done, working=", ".join(working))
        if not screen.is_terminal and done != said:
            print(f"{done} of {total} jobs done; at work: {', '.join(working) or 'none'}", file=sys.stderr, flush=True)
            said = done

    try:
        study(config, Path(arguments[0]).parent, progress)
    finally:
        if bar.tasks:
            bar.stop()
    print((Path(config.output) / "table.md").read_text(), end="")
    print(f"\nfigures: unmask report {config.output}", file=sys.stderr)
