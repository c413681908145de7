"""``unmask demo``: the shipped model under seven decoders, canvases first, then the table of an evaluation."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from unmask.config import read_flags
from unmask.evaluation.command import run_evaluation
from unmask.evaluation.config import EvalConfig
from unmask.evaluation.generate import GenerateArguments, run

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
    work = f"{a.limit} problems of each of two tasks under {len(DECODERS)} decoders"
    print(f"Three canvases, then {work}: about {0.4 + a.limit / 10:.1f} minutes on two idle cores.", flush=True)
    show_canvases()
    print(flush=True)
    run_evaluation(config)


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
        [text] = run(GenerateArguments(prompt=prompt, decoder=decoder, delay=delay if sys.stdout.isatty() else 0))
        print("✓ solved" if task.grade(problem, text).solved else "✗ not solved", flush=True)
