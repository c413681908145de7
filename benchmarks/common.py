"""What benchmarks share: a stand-in model, processes of their own, medians, the machine's own speed."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.config import Shape
from unmask.errors import UserError
from unmask.evaluation.evaluate import environment
from unmask.io.files import write_json
from unmask.models.llada import LLaDAConfig, LLaDAModelLM
from unmask.models.load import DTYPES
from unmask.models.masked_lm import MaskedLM
from unmask.models.scratch import character_tokenizer

PEAK_RESET = Path("/proc/self/clear_refs")  # Linux


def stand_in(shape: Shape, dtype: str, device: str) -> MaskedLM:
    """A LLaDA of the asked shape; its character tokenizer covers the first ids of the vocabulary.

    Initial weights are large enough for attention to tell positions apart: with the usual 0.02 all masked positions look
    alike, and the order of commits hangs on rounding.
    """
    tokenizer = character_tokenizer()
    fields = {k: getattr(shape, k) for k in ("d_model", "n_layers", "n_heads", "mlp_hidden_size", "block_length")}
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            fields |= {"vocab_size": shape.vocabulary, "mask_token_id": tokenizer.mask_token_id}
            model = LLaDAModelLM(LLaDAConfig(init_std=shape.d_model**-0.5, **fields))
    finally:
        torch.set_default_dtype(before)
    return MaskedLM.wrap(model.eval(), tokenizer, "stand-in")


def in_subprocess(name: str, config: Any, *cell: Any) -> dict[str, Any]:
    """``measure(config, *cell)`` of the benchmark ``name``, in a fresh process. Raises UserError naming the cell."""
    command = [sys.executable, "-m", "benchmarks.common", name, json.dumps([asdict(config), cell])]
    found_from = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": found_from}
    run = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=environment)
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        if run.returncode == 2:  # the user's mistake, in one sentence
            raise UserError(last)
        raise UserError(
            f"the cell {' '.join(map(str, cell))} failed ({last}): lower the rows, the length or the vocabulary"
        )
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def _measure_here(name: str, request: str) -> None:
    """The other side of ``in_subprocess``."""
    from benchmarks.__main__ import BENCHMARKS

    config, cell = json.loads(request)
    try:
        print(json.dumps(import_module(f"benchmarks.{name}").measure(BENCHMARKS[name][0](**config), *cell)))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def write_result(config: Any, cells: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Write and return the result of a benchmark: its settings, the machine and a dictionary a cell."""
    result = {"config": asdict(config), "environment": environment(), **more, "cells": cells}
    write_json(Path(config.output), result)
    return result


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def spread_text(found: dict[str, float]) -> str:
    """``median (low-high)``."""
    return "{median:.2f} ({low:.2f}-{high:.2f})".format(**found)


def seconds(work: Callable[[], Any], device: str) -> float:
    """Wall time of one call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize()


def reset_peak(device: str) -> float:
    """Count the peak from here on; returns the bytes in use now."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif PEAK_RESET.exists():
        PEAK_RESET.write_text("5", encoding="utf-8")
    return peak_bytes(device)


def peak_bytes(device: str) -> float:
    """Highest resident memory of this process since ``reset_peak``, or allocated memory of the GPU."""
    if device != "cpu":
        return float(torch.cuda.max_memory_allocated())
    if PEAK_RESET.exists():
        status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def gemm_peak(dtype: str, device: str) -> float:
    """The best rate of a square matrix product here, in FLOP/s."""
    best = 0.0
    for n in (1024, 2048) if device == "cpu" else (4096, 8192):
        a = torch.randn(n, n, dtype=DTYPES[dtype], device=device)
        times = [seconds(lambda a=a: a @ a, device) for _ in range(6)]  # type: ignore[misc]
        best = max(best, 2 * n**3 / min(times))
    return best


def pass_flops(lm: MaskedLM, rows: int, width: int, positions: int) -> float:
    """Multiplications and additions of one forward pass over (rows, width) tokens with logits at some positions."""
    config = lm.model.config
    embedding = lm.model.get_output_embeddings().weight
    vocabulary, d = embedding.shape
    head = 2 * positions * vocabulary * d
    matrices = sum(p.numel() for p in lm.model.parameters() if p.dim() == 2 and p.shape[0] != vocabulary)
    attention = 4 * width * width * config.hidden_size * config.num_hidden_layers
    return float(head + rows * (2 * width * matrices + attention))


if __name__ == "__main__":
    _measure_here(*sys.argv[1:])
