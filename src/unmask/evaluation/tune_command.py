"""The command line of ``unmask tune``."""

from __future__ import annotations

from unmask.config import read_flags
from unmask.evaluation.tune_config import TuneConfig


def command(arguments: list[str]) -> None:
    """``unmask tune``."""
    config = read_flags(TuneConfig, arguments, prog="unmask tune")
    from unmask.evaluation.progress import progress_bars
    from unmask.evaluation.tune import tune
    from unmask.evaluation.tune_report import show, write

    with progress_bars() as progress:
        result = tune(config, progress)
    show(result, write(result, config))
