"""The command lines of ``unmask eval`` and ``unmask tune``, read without torch."""

from __future__ import annotations

import signal
from pathlib import Path

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
    from unmask.results import accuracy as report

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
    if processes.rank:
        return
    output = Path(config.output)
    with writing_to(output):
        figures = report.write_figures(summary, output)
        write_text(output / "table.md", report.markdown_table(summary))
    screen = console()
    screen.print(report.terminal_table(summary, screen))
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
