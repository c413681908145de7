"""``unmask demo``: the shipped model under seven decoders, canvases first, then a table that grows."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unmask.config import read_flags
from unmask.evaluation.command import show_evaluation
from unmask.evaluation.config import EvalConfig
from unmask.evaluation.generate import GenerateArguments, show_decoding
from unmask.io.terminal import console

DECODERS = ["full", "semi-ar", "eoser", "full:steps=7", "ass", "eoser-ass", "hybrid"]
"""At L/2 passes, then at the logarithmic budget."""
CANVASES = [("sudoku", "full", 0.05), ("countdown", "semi-ar", 0.05), ("countdown", "eoser-ass", 0.5)]
"""Task, decoder, seconds between steps."""


@dataclass
class DemoArguments:
    """The shipped model under seven decoders: live canvases, then a table and a figure."""

    limit: int = 16
    """Problems a task."""
    output: str = "runs/demo"


def command(arguments: list[str]) -> None:
    """``unmask demo``."""
    a = read_flags(DemoArguments, arguments, prog="unmask demo")
    config = EvalConfig(decoder=DECODERS, limit=a.limit, output=a.output)
    minutes = 0.4 + a.limit / 10
    print(
        f"Three canvases, then {a.limit} problems of each of two tasks under {len(DECODERS)} decoders: "
        f"about {minutes:.1f} minutes on two idle cores.",
        flush=True,
    )
    show_canvases()
    print()
    show_evaluation(grow_table(config), Path(config.output))


def show_canvases() -> None:
    """Decode a problem three times, each with the grader's word."""
    from unmask.models.load import load
    from unmask.tasks import make_task

    lm = load("tiny")
    for name, decoder, delay in CANVASES:
        task = make_task(name, lm.task_defaults)
        problem = task.problems("test", 1)[0]
        print(f"\n$ unmask generate {problem.question!r} --decoder {decoder}", flush=True)
        prompt = task.instruction(problem)
        text = show_decoding(
            GenerateArguments(prompt=prompt, decoder=decoder, delay=delay if sys.stdout.isatty() else 0)
        )
        print("✓ solved" if task.grade(problem, text).solved else "✗ not solved", flush=True)


def grow_table(config: EvalConfig) -> dict[str, Any]:
    """The summary of all decoders, evaluated one by one; a terminal sees one table grow, anything else a line a result."""
    from rich.live import Live

    from unmask.evaluation.evaluate import evaluate
    from unmask.results.tables import evaluation_for_terminal, percent

    screen = console()
    with Live(console=screen, transient=True) if screen.is_terminal else nullcontext() as live:
        for count in range(1, len(DECODERS) + 1):
            summary = evaluate(replace(config, decoder=DECODERS[:count]))
            if live is not None:
                live.update(evaluation_for_terminal(summary, screen), refresh=True)
                continue
            for cell in (c for c in summary["cells"] if c["decoder"] == DECODERS[count - 1]):
                solved = percent(cell["solved"], cell["solved_interval"])
                print(
                    f"{cell['task']:<10} {cell['decoder']:<13} {cell['nfe']:5.1f} passes  solved {solved} %", flush=True
                )
    return summary
