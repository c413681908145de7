"""``python -m benchmarks NAME``: time and memory of decoding and updates beside what they need at least; studies."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.config import BenchDecode, BenchGap, BenchGPU, BenchMemory, BenchRL, BenchServe, BenchShapes
from benchmarks.report.command import command as report
from benchmarks.study.command import command as study
from unmask.config import overview, read_flags
from unmask.errors import UserError, unknown

BENCHMARKS: dict[str, tuple[type[Any], str]] = {
    "decode": (BenchDecode, "time and memory of a decoding step, beside the bare forward pass"),
    "rl": (BenchRL, "time and peak memory of an update"),
    "gap": (BenchGap, "how far each objective scores from what was sampled"),
    "serve": (BenchServe, "unmask serve under load, beside offline decoding"),
    "memory": (BenchMemory, "the memory formula beside measured peaks"),
    "shapes": (BenchShapes, "kernels, bytes and live memory at LLaDA-8B's size, predicted from tensors without data"),
}


def gpu(arguments: list[str]) -> None:
    config = read_flags(BenchGPU, arguments, "python -m benchmarks gpu")
    if failed := import_module("benchmarks.gpu").command(config):
        raise UserError(f"{failed} lines failed: see {config.output}/page.md")


EXPERIMENTS = {
    "study": (study, "a grid of trainings and evaluations with equal budgets, resumable"),
    "report": (report, "figures and one HTML file of evaluations, trainings and studies"),
    "gpu": (gpu, "what docs/performance.md lacks for want of a GPU, in one go"),
}


def command(arguments: list[str]) -> None:
    """Run one benchmark, or a command of experiments."""
    known = {name: what for name, (_, what) in {**BENCHMARKS, **EXPERIMENTS}.items()}
    if not arguments:
        raise UserError(f"python -m benchmarks lacks an argument: choose from {', '.join(known)}")
    name, *rest = arguments
    if name in ("-h", "--help"):
        print(overview("python -m benchmarks", "NAME", known), end="")
    elif name in EXPERIMENTS:
        if name in ("study", "report") and find_spec("scipy") is None:
            raise UserError(f"python -m benchmarks {name} needs scipy: pip install -e '.[benchmarks]'")
        EXPERIMENTS[name][0](rest)
    elif name in BENCHMARKS:
        benchmark(name, rest)
    else:
        raise unknown("benchmark", name, known)


def benchmark(name: str, arguments: list[str]) -> None:
    """Run one benchmark, write its result (JSON) and its table (Markdown beside it), and print the table."""
    config = read_flags(BENCHMARKS[name][0], arguments, f"python -m benchmarks {name}")
    from rich.text import Text

    from unmask.io.files import check_writable, write_text
    from unmask.io.terminal import console, fitting_table
    from unmask.results.tables import Table

    check_writable(Path(config.output))
    module = import_module(f"benchmarks.{name}")
    with console(stderr=True).status("") as status:
        result = module.run(config, lambda what: status.update(Text(what)))
    title, rows = module.table(config, result)
    headings, cells = list(rows[0]), [list(row.values()) for row in rows]
    screen = console()
    screen.print(
        fitting_table(screen, title, headings, cells, drop_first=("% GEMM", "+GiB", "T", "trunk ms", "step ms"))
    )
    write_text(Path(config.output).with_suffix(".md"), Table(headings, cells).markdown())
    print(f"result  {config.output}")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    from unmask.cli import run_command
    from unmask.io.terminal import standard_streams

    with standard_streams():
        return run_command(lambda: command(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
