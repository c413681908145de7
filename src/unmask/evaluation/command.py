"""The command lines of ``unmask eval``, ``unmask tune`` and ``unmask demo``, read without torch."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unmask.config import read_flags
from unmask.errors import UserError
from unmask.evaluation.config import EvalConfig, TuneConfig
from unmask.evaluation.generate import GenerateArguments
from unmask.evaluation.generate import run as generate
from unmask.evaluation.progress import progress_bars
from unmask.io.files import read_json, write_text, writing_to
from unmask.io.terminal import console

if TYPE_CHECKING:
    from unmask.rl.config import DistillConfig

# of the demo: decoders at L/2 passes, then at the logarithmic budget; task, decoder and seconds between steps of the canvases
DECODERS = ["full", "semi-ar", "eoser", "full:steps=7", "ass", "eoser-ass", "hybrid"]
FAST = ["eoser-ass", "threshold"]  # for the model that was trained for few passes
CANVASES = [("sudoku", "full", 0.05), ("countdown", "semi-ar", 0.05), ("countdown", "eoser-ass", 0.5)]


def command(arguments: list[str]) -> None:
    """``unmask eval``."""
    run_evaluation(read_flags(EvalConfig, arguments, prog="unmask eval"))


def run_evaluation(config: EvalConfig) -> None:
    """Evaluate with progress bars, then write the figures and the table of the folder and print the table."""
    from unmask.evaluation.distributed import AgreedError, init_distributed
    from unmask.evaluation.evaluate import evaluate

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
    from unmask.results.figures import accuracy, evaluation_cells
    from unmask.results.style import save_figure
    from unmask.results.tables import evaluation_for_terminal, evaluation_table

    output = Path(config.output)
    with writing_to(output):
        save_figure(accuracy(evaluation_cells(summary)), output / "accuracy")
        write_text(output / "table.md", evaluation_table(summary).markdown())
    screen = console()
    screen.print(evaluation_for_terminal(summary, screen))
    print(f"records  {output / 'records'}\nsummary  {output / 'summary.json'}\nfigure   {output / 'accuracy.png'}")


def decode_teacher(config: DistillConfig) -> None:
    """Where ``teacher`` names decoders, decode the training problems under them into the run folder; resumes.

    Raises:
        UserError: for what ``evaluate`` refuses, wrong rewards, a decoder of another canvas, decodes of another teacher.
    """
    if config.teacher_folders == config.teacher:
        return
    import torch

    from unmask.decoding import make_decoder
    from unmask.io.launcher import world_size
    from unmask.rl.data import weighted_rewards
    from unmask.tasks import make_task

    tasks = [make_task(spec, {}) for spec in config.tasks]
    weighted_rewards(config.reward_funcs, tasks, config.reward_weights)  # a typo is found now, not behind the decoding
    # The training would inherit the evaluation's process group, which is gloo.
    if world_size() > 1 and torch.cuda.is_available():
        fix = "make the teacher with unmask eval --split train --trajectories, then name its folder"
        raise UserError(f"on several GPUs teacher {config.teacher} cannot be decoded in the same launch: {fix}")
    length = config.max_completion_length
    for spec in config.teacher:
        if (own := make_decoder(spec, max_new_tokens=length).max_new_tokens) != length:
            raise UserError(f"the teacher {spec} has a canvas of {own} tokens, this run of {length}: set both alike")
    evaluation = EvalConfig(
        model=str(config.model),
        dtype="bfloat16" if config.bf16 else config.dtype,
        task=config.tasks,
        decoder=config.teacher,
        limit=config.problems,
        split="train",
        max_new_tokens=length,
        batch_size=config.rows_per_forward,
        seed=config.seed + 1,  # as reinforcement learning draws its problems
        output=config.teacher_folders[0],
        trajectories=True,
    )
    settings = Path(evaluation.output) / "config.json"
    if settings.is_file():  # an evaluation may grow, and what a teacher has not been asked for would be learned
        before = read_json(settings, {"decoders": dict, "tasks": dict, "limit": object}, f"remove {evaluation.output}")
        asked = {*config.teacher}, {*config.tasks}, config.problems
        if ({*before["decoders"]}, {*before["tasks"]}, before["limit"]) != asked:
            raise UserError(f"{evaluation.output} holds the decodes of another teacher: remove it")
    run_evaluation(evaluation)


def tune_command(arguments: list[str]) -> None:
    """``unmask tune``."""
    config = read_flags(TuneConfig, arguments, prog="unmask tune")
    from unmask.evaluation.tune import report, tune

    with progress_bars() as progress:
        result = tune(config, progress)
    report(result, Path(config.output))


@dataclass
class DemoArguments:
    """The shipped model under seven decoders: live canvases, then a table and a figure."""

    limit: int = 16
    """Problems a task."""
    output: str = "runs/demo"


def demo_command(arguments: list[str]) -> None:
    """``unmask demo``: canvases first, each with the grader's word, then the table of an evaluation."""
    a = read_flags(DemoArguments, arguments, prog="unmask demo")
    config = EvalConfig(decoder=DECODERS, limit=a.limit, output=a.output)
    work = f"{a.limit} problems of each of two tasks under {len(DECODERS)} decoders"
    print(f"Three canvases, then {work}: about {0.4 + a.limit / 10:.1f} minutes on two idle cores.", flush=True)
    from unmask.models.load import load
    from unmask.tasks import make_task

    lm = load("tiny")
    for name, decoder, delay in CANVASES:
        task = make_task(name, lm.task_defaults)
        problem = task.problems("test", 1)[0]
        print(f"\n$ unmask generate {problem.question!r} --decoder {decoder}", flush=True)
        delay = delay if sys.stdout.isatty() else 0
        [text] = generate(GenerateArguments(prompt=task.instruction(problem), decoder=decoder, delay=delay))
        print("✓ solved" if task.grade(problem, text).solved else "✗ not solved", flush=True)
    print(flush=True)
    run_evaluation(config)
    print("\nThe same model after `unmask distill` and `unmask rl`: tiny-fast", flush=True)
    run_evaluation(EvalConfig(model="tiny-fast", decoder=FAST, limit=a.limit, output=str(Path(a.output) / "fast")))
