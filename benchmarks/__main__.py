"""``python -m benchmarks NAME``: time and memory of decoding and updates, each beside what it needs at least."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.config import BenchDecode, BenchGap, BenchMemory, BenchRL
from unmask.config import overview, read_flags
from unmask.errors import UserError, unknown

BENCHMARKS: dict[str, tuple[type[Any], str]] = {
    "decode": (BenchDecode, "time and memory of a decoding step, beside the bare forward pass"),
    "rl": (BenchRL, "time and peak memory of an update"),
    "gap": (BenchGap, "how far each objective scores from what was sampled"),
    "memory": (BenchMemory, "the memory formula beside measured peaks"),
}


def command(arguments: list[str]) -> None:
    """One benchmark by its name."""
    if not arguments:
        raise UserError(f"python -m benchmarks lacks an argument: choose from {', '.join(BENCHMARKS)}")
    if arguments[0] in ("-h", "--help"):
        print(overview("python -m benchmarks", "NAME", {name: what for name, (_, what) in BENCHMARKS.items()}), end="")
        return
    name = arguments[0]
    if name not in BENCHMARKS:
        raise unknown("benchmark", name, BENCHMARKS)
    config = read_flags(BENCHMARKS[name][0], arguments[1:], f"python -m benchmarks {name}")
    from benchmarks import tables

    getattr(tables, name)(config)


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark; returns the exit code."""
    from unmask.cli import run_command
    from unmask.io.terminal import standard_streams

    with standard_streams():
        return run_command(lambda: command(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
