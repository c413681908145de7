"""The command line of ``unmask bench``."""

from __future__ import annotations

from typing import Any

from unmask.bench.config import BenchDecode, BenchGap, BenchMemory, BenchRL
from unmask.flags import overview, read_flags
from unmask.spec import UserError, unknown

BENCHMARKS: dict[str, tuple[type[Any], str]] = {
    "decode": (BenchDecode, "time and memory of a decoding step, beside the bare forward pass"),
    "rl": (BenchRL, "time and peak memory of an update"),
    "gap": (BenchGap, "how far each objective scores from what was sampled"),
    "memory": (BenchMemory, "the memory formula beside measured peaks"),
}


def command(arguments: list[str]) -> None:
    """``unmask bench NAME``."""
    if not arguments:
        raise UserError(f"unmask bench lacks an argument: choose from {', '.join(BENCHMARKS)}")
    if arguments[0] in ("-h", "--help"):
        print(overview("unmask bench", "NAME", {name: what for name, (_, what) in BENCHMARKS.items()}), end="")
        return
    name = arguments[0]
    if name not in BENCHMARKS:
        raise unknown("benchmark", name, BENCHMARKS)
    config = read_flags(BENCHMARKS[name][0], arguments[1:], f"unmask bench {name}")
    from unmask.bench import tables

    getattr(tables, name)(config)
