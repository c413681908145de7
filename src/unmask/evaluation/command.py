"""The command lines of ``unmask eval`` and ``unmask tune``, read without torch."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from unmask.config import read_flags
from unmask.evaluation.config import EvalConfig, TuneConfig
from unmask.io.files import write_text, writing_to
from unmask.io.terminal import console


def command(arguments: list[str]) -> None:
    """``unmask eval``."""
    run_evaluation(read_flags(EvalConfig, arguments, prog="unmask eval"))


def run_evaluation(config: EvalConfig) -> None:
    """Evaluate with progress bars, then write the figures and the table of the folder and print the table."""
    from unmask.evaluation.distributed import AgreedError, init_distributed
    from unmask.evaluation.evaluate import evaluate
    from unmask.evaluation.progress import progress_bars

    processes = init_distributed()
    if processes.rank:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C comes to all, and rank 0 has a word for it
    elif processes.world > 1:  # another rank's end comes as SIGTERM; the terminal shall have its cursor back
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with progress_bars() as progress:
            summary = evaluate(config, progress)
    except AgreedError:
        processes.exit_after_rank0()
        raise
    if not processes.rank:
        show_evaluation(summary, Path(config.output))


def show_evaluation(summary: dict[str, Any], output: Path) -> None:
    """Write the figures and the table of an evaluation's folder and print the table."""
    from unmask.results.collect import evaluation_cells
    from unmask.results.figures import accuracy
    from unmask.results.style import save_figure
    from unmask.results.tables import evaluation_for_terminal, evaluation_table

    with writing_to(output):
        figures = save_figure(accuracy(evaluation_cells(summary)), output / "accuracy")
        write_text(output / "table.md", evaluation_table(summary).markdown())
    screen = console()
    screen.print(evaluation_for_terminal(summary, screen))
    print(f"records  {output / 'records'}\nsummary  {output / 'summary.json'}")
    for figure in (f for f in figures if f.suffix == ".png"):
        print(f"figure   {figure}")


def tune_command(arguments: list[str]) -> None:
    """``unmask tune``."""
    config = read_flags(TuneConfig, arguments, prog="unmask tune")
    from unmask.evaluation.progress import progress_bars
    from unmask.evaluation.tune import tune
    from unmask.evaluation.tune_report import report

    with progress_bars() as progress:
        result = tune(config, progress)
    report(result, Path(config.output))
