"""The command line: a table of commands. A user's mistake is one sentence on stderr and exit code 2."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import tyro

import unmask
from unmask.config import command_config, overview, read_flags, split_spec
from unmask.errors import UserError, unknown
from unmask.io.files import each_line, writing_to
from unmask.io.launcher import rank
from unmask.io.terminal import standard_streams

# Heavy imports are inside the commands, so that --help and a typo answer at once.

TRAINER_ARGS = "Only in the file: trainer_args, a table of other fields of transformers.TrainingArguments"


def _say(text: str) -> None:
    """Print, in one of several processes."""
    if not rank():
        print(text)


def sft(arguments: list[str]) -> None:
    from unmask.training.config import SFTConfig

    about = f"Supervised training with the masked diffusion loss. {TRAINER_ARGS}, and the tables new_model and task_defaults."
    config = command_config(SFTConfig, arguments, "unmask sft", about)
    from unmask.training.sft import train

    _say(f"checkpoint  {train(config)}")


def rl(arguments: list[str]) -> None:
    from unmask.rl.config import DiffusionGRPOConfig

    about = (
        "Reinforcement learning (GRPO) along the trajectories of any decoder. --dry-run prints what the run would do "
        f"(batches, forward passes, memory) and reads no weights. {TRAINER_ARGS}."
    )
    flags = [a for a in arguments if a != "--dry-run"]
    config = command_config(DiffusionGRPOConfig, flags, "unmask rl", about)
    if flags != arguments:
        from unmask.rl.dry_run import dry_run

        return _say(dry_run(config))
    from unmask.rl.run import train

    _say(f"checkpoint  {train(config)}")


def distill(arguments: list[str]) -> None:
    from unmask.rl.config import DistillConfig

    about = (
        "Distillation into fewer passes: the model's own right decodes under a decoder of many passes teach it to write them "
        f"under one of few. {TRAINER_ARGS}."
    )
    config = command_config(DistillConfig, arguments, "unmask distill", about)
    from unmask.evaluation.command import decode_teacher
    from unmask.rl.distill import train

    decode_teacher(config)
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
    if {"-h", "--help"} & {*arguments} and find_spec("lm_eval"):  # needs no model
        sys.argv = ["lm-eval", *arguments]
        import_module("lm_eval.__main__").cli_evaluate()
    import_module("unmask.evaluation.lm_eval").command(arguments)


@dataclass
class GradeArguments:
    """Grade completions made elsewhere: JSON lines with question, completion and ground_truth."""

    file: Annotated[str, tyro.conf.Positional]
    task: str
    """Task spec, e.g. ``countdown``, or ``gsm8k:extraction=published``; without an extraction both are shown."""


def grade(arguments: list[str]) -> None:
    a = read_flags(GradeArguments, arguments, prog="unmask grade")
    from unmask.results.statistics import pooled_bootstrap, wilson
    from unmask.results.tables import percent
    from unmask.tasks import make_task
    from unmask.tasks.base import grade_completion

    asked = make_task(a.task, {})
    schema = {"question?": str, "completion": str, "ground_truth": object}
    fix = f"write a JSON object with the question, completion and ground_truth of a {asked.name} problem"
    rows = [*each_line(Path(a.file), schema, fix, lambda r: (asked.completion_truth(r), r["completion"]), own=False)]
    if not rows:
        raise UserError(f"{a.file} holds no completions")
    both: list[Literal["default", "published"]] = ["default", "published"]
    for extraction in [asked.extraction] if "extraction" in split_spec(a.task)[1] else both:
        task = replace(asked, extraction=extraction)
        grades = [grade_completion(task, problem, completion) for problem, completion in rows]
        solved, points, possible = ([getattr(g, name) for g in grades] for name in ("solved", "points", "possible"))
        share = percent(sum(solved) / len(grades), wilson(sum(solved), len(grades)))
        print(f"{a.task}, {extraction} extraction")
        print(f"  solved         {share} % ({sum(solved)} of {len(grades)})")
        print(f"  {task.score_name:<14} {percent(sum(points) / sum(possible), pooled_bootstrap(points, possible))} %")


COMMANDS = {
    "generate": ("evaluation.generate:command", "decode one prompt and watch the canvas fill, or many from a file"),
    "info": ("models.info:command", "what a checkpoint is, its self-test, the memory that decoding and training take"),
    "view": ("view.command:command", "one HTML page that shows a canvas filling, decoders side by side"),
    "serve": ("serve.command:command", "an OpenAI-compatible server, and a page on which one watches a canvas fill"),
    "eval": ("evaluation.command:command", "score a model on tasks under decoders: records, table, figure"),
    "sft": ("cli:sft", "train on worked responses with the masked diffusion loss"),
    "rl": ("cli:rl", "train on rewards with GRPO along the decoder's trajectories"),
    "distill": ("cli:distill", "teach a model to write in few passes what it writes in many"),
    "tune": ("evaluation.command:tune_command", "the best decoder for a task within a budget of forward passes"),
    "export": ("cli:export_checkpoint", "merge a checkpoint's adapter into a plain checkpoint"),
    "lm-eval": ("cli:lm_eval", "lm-evaluation-harness's own command line, with --model unmask"),
    "grade": ("cli:grade", "grade completions made elsewhere"),
    "demo": ("evaluation.command:demo_command", "the shipped model under each decoder"),
}
"""The function that runs a command, and what the command does."""


COMPLETION = """\
# unmask --completion > ~/.local/share/bash-completion/completions/unmask      (zsh: bashcompinit, then source the file)
_unmask() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} words=
  case $COMP_CWORD,${{COMP_WORDS[1]}} in
    1,*) words="{commands}" ;;
{flags}  esac
  if [[ $word == -* || $COMP_CWORD == 1 ]]; then COMPREPLY=($(compgen -W "$words" -- "$word")); fi
}}
complete -o default -F _unmask unmask"""


def completion() -> str:
    """A bash script that completes commands and, from their help, flags; what else is typed are files."""
    flags = ""
    for name in COMMANDS:
        if name == "lm-eval":  # its flags are not ours
            continue
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
            _run([name, "--help"])
        found = sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", said.getvalue())))
        flags += f'    *,{name}) words="{" ".join(found)}" ;;\n'
    return COMPLETION.format(commands=" ".join(COMMANDS), flags=flags)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code. Raises SystemExit after ``--help``, and where the output cannot be written."""
    with standard_streams():
        return run_command(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> None:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(overview("unmask", "COMMAND", {name: does for name, (_, does) in COMMANDS.items()}), end="")
    elif name == "--version":
        print(unmask.__version__)
    elif name == "--completion":
        print(completion())
    elif name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    else:
        module, function = COMMANDS[name][0].split(":")
        getattr(import_module(f"unmask.{module}"), function)(arguments[1:])


def run_command(work: Callable[[], None]) -> int:
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
        print("\nunmask: interrupted; the same command resumes a run that has written results", file=sys.stderr)
        return 130
    return 0
