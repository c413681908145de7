"""The command line: a table of commands. A user's mistake is one sentence on stderr and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from unmask.config import command_config, convert, overview, read_flags, split_spec
from unmask.errors import UserError, unknown
from unmask.io.files import each_line, writing_to
from unmask.io.launcher import rank
from unmask.io.terminal import standard_streams

if TYPE_CHECKING:
    from unmask.tasks import Grade, Task

# Heavy imports stand inside the commands, so that --help and a typo answer at once.


TRAINER_ARGS = "trainer_args holds other fields of transformers.TrainingArguments."


def _say(text: str) -> None:
    """Print, in one of several processes."""
    if not rank():
        print(text)


def sft(arguments: list[str]) -> None:
    from unmask.training.config import SFTConfig

    about = f"Supervised training with the masked diffusion loss. {TRAINER_ARGS}"
    config = command_config(SFTConfig, arguments, "unmask sft", about)
    from unmask.training.sft import train

    _say(f"checkpoint  {train(config)}")


def rl(arguments: list[str]) -> None:
    from unmask.rl.config import DiffusionGRPOConfig

    about = f"Reinforcement learning (GRPO) along the trajectories of any decoder. {TRAINER_ARGS}"
    switch = "Print what the run would do (batches, forward passes, memory) and stop; no weights are read."
    given = [a for a in arguments if a != "--dry-run"]
    config = command_config(DiffusionGRPOConfig, given, "unmask rl", about, dry_run=switch)
    if given != arguments:
        from unmask.rl.dry_run import dry_run

        return _say(dry_run(config))
    from unmask.rl.run import train

    _say(f"checkpoint  {train(config)}")


@dataclass
class ExportArguments:
    """Merge a checkpoint's adapter into its base model and write a plain checkpoint that every command takes."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """A checkpoint-N folder of a run."""
    output: Annotated[str, tyro.conf.Positional]
    """The folder to write; it must not exist."""


def export_checkpoint(arguments: list[str]) -> None:
    a = read_flags(ExportArguments, arguments, prog="unmask export")
    from unmask.models.load import load
    from unmask.training.run_folder import export

    output = Path(a.output)
    if output.exists():
        raise UserError(f"{output} exists: choose a new folder")
    with writing_to(output, "folder"):
        output.parent.mkdir(parents=True, exist_ok=True)
        print(f"checkpoint  {export(load(a.checkpoint, device='cpu'), output)}")


def lm_eval(arguments: list[str]) -> None:
    if not {"-h", "--help"}.isdisjoint(arguments) and find_spec(
        "lm_eval"
    ):  # its help knows no models, so it needs none
        sys.argv = ["lm-eval", *arguments]
        import_module("lm_eval.__main__").cli_evaluate()
    import_module("unmask.evaluation.lm_eval").command(arguments)


@dataclass
class GradeArguments:
    """Grade completions made elsewhere: JSON lines with question, completion and ground_truth."""

    file: Annotated[str, tyro.conf.Positional]
    task: str
    """Task spec, e.g. ``countdown``, ``sudoku``, ``gsm8k`` or ``math500``."""
    extraction: str | None = None
    """``default``, or ``published`` for the rules of the released evaluation; by default both are shown."""


def grade_file(task: Task, path: str) -> list[Grade]:
    """Grades of a completions file, in its order. Raises UserError naming the first line that is not a completion."""
    schema = {"question?": str, "completion": str, "ground_truth": object}
    fix = f"write a JSON object with the question, completion and ground_truth of a {task.name} problem"
    rows = each_line(Path(path), schema, fix, lambda row: (task.completion_truth(row), row["completion"]), own=False)
    grades = [task.grade(problem, completion) for problem, completion in rows]
    if not grades:
        raise UserError(f"{path} holds no completions")
    return grades


def grade(arguments: list[str]) -> None:
    a = read_flags(GradeArguments, arguments, prog="unmask grade")
    from unmask.results.statistics import pooled_bootstrap, wilson
    from unmask.results.tables import percent
    from unmask.tasks import make_task

    asked = make_task(a.task, {})
    named = "extraction" in split_spec(a.task)[1]
    if named and a.extraction is not None:
        raise UserError(f"--extraction {a.extraction} and --task {a.task} both name one: use one of them")
    for reading in [asked.extraction] if named else [a.extraction] if a.extraction else ["default", "published"]:
        task = replace(asked, extraction=convert(reading, Literal["default", "published"], "extraction"))
        grades = grade_file(task, a.file)
        solved, points, possible = ([getattr(g, name) for g in grades] for name in ("solved", "points", "possible"))
        share = percent(sum(solved) / len(grades), wilson(sum(solved), len(grades)))
        print(f"{a.task}, {reading} extraction")
        print(f"  solved         {share} % ({sum(solved)} of {len(grades)})")
        print(f"  {task.score_name:<14} {percent(sum(points) / sum(possible), pooled_bootstrap(points, possible))} %")


COMMANDS: dict[str, tuple[str | Callable[[list[str]], None], str]] = {
    "generate": ("unmask.evaluation.generate", "decode one prompt and watch the canvas fill, or many from a file"),
    "info": ("unmask.models.info", "what a checkpoint is, its self-test, the memory that decoding and training take"),
    "view": ("unmask.view.command", "one HTML page that shows a canvas filling, decoders side by side"),
    "eval": ("unmask.evaluation.command", "score a model on tasks under decoders: records, table, figure"),
    "sft": (sft, "train on worked responses with the masked diffusion loss"),
    "rl": (rl, "train on rewards with GRPO along the decoder's trajectories"),
    "report": ("unmask.results.command", "figures and one HTML file of evaluations, trainings and studies"),
    "tune": ("unmask.evaluation.command:tune_command", "the best decoder for a task within a budget of forward passes"),
    "study": ("unmask.study.command", "a grid of trainings and evaluations with equal budgets, resumable"),
    "export": (export_checkpoint, "merge a checkpoint's adapter into a plain checkpoint"),
    "lm-eval": (lm_eval, "lm-evaluation-harness's own command line, with --model unmask"),
    "grade": (grade, "grade completions made elsewhere"),
    "demo": ("unmask.evaluation.command:demo_command", "the shipped model under each decoder"),
}
"""What runs a command, a function or a module with the function ``command``, and what it does."""


def usage() -> str:
    return overview("unmask", "COMMAND", {name: what for name, (_, what) in COMMANDS.items()})


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code. Raises SystemExit after ``--help``, and where nobody takes the output."""
    with standard_streams():
        return _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    if arguments[0] == "--version":
        from unmask import __version__

        print(__version__)
        return 0

    def work() -> None:
        if arguments[0] not in COMMANDS:
            raise unknown("command", arguments[0], COMMANDS)
        command = COMMANDS[arguments[0]][0]
        if isinstance(command, str):
            module, _, name = command.partition(":")
            command = getattr(import_module(module), name or "command")
        command(arguments[1:])

    return run_command(work, arguments[0] in ("eval", "sft", "rl", "study", "tune", "demo"))


def run_command(work: Callable[[], None], resumes: bool = False) -> int:
    """The exit code of a command: 2 and one sentence for a user's mistake, 130 for Ctrl-C."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if cache := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):  # torch makes it as soon as it is imported
            with writing_to(cache, "TORCHINDUCTOR_CACHE_DIR"):
                os.makedirs(cache, exist_ok=True)
        work()
    except UserError as error:
        print(f"unmask: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        advice = "; what is written stays, and the same command goes on from there" if resumes else ""
        print(f"\nunmask: interrupted{advice}", file=sys.stderr)
        return 130
    return 0
