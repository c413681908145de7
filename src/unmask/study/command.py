"""The command line of ``unmask study``."""

from __future__ import annotations

import sys
from pathlib import Path

from unmask.config import command_config
from unmask.io.files import read_text
from unmask.io.terminal import console
from unmask.study.config import StudyConfig


def command(arguments: list[str]) -> None:
    """``unmask study CONFIG``."""
    about = (
        "A grid of trainings and evaluations, resumable. evaluate holds tables of unmask eval settings and decoder fields (at "
        "least one), train tables of unmask rl settings, tables what to show; a list makes one run of each value."
    )
    config = command_config(StudyConfig, arguments, "unmask study", about)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from unmask.study.run import study

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
    print(read_text(Path(config.output) / "table.md"), end="")
    print(f"\nfigures: unmask report {config.output}", file=sys.stderr)
