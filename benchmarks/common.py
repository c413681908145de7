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
from pathlib import Path
from typing import Any

import torch

from benchmarks.config import Shape
from unmask.errors import UserError
from unmask.models.llada import LLaDAConfig, LLaDAModelLM
from unmask.models.load import DTYPES
from unmask.models.masked_lm import MaskedLM
from unmask.models.scratch import character_tokenizer

CLEAR = Path("/proc/self/clear_refs")


def stand_in(shape: Shape, dtype: str, device: str) -> MaskedLM:
    """A LLaDA of the asked shape; its character tokenizer covers the first ids of the vocabulary.

    Initial weights are large enough for attention to tell positions apart: with the usual 0.02 all masked positions look
    alike, and the order of commits hangs on rounding.
    """
    tokenizer = character_tokenizer()
    fields = {k: getattr(shape, k) for k in ("d_model", "n_layers", "n_heads", "mlp_hidden_size")}
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


def run_in_subprocess(module: str, what: str, request: dict[str, Any]) -> dict[str, Any]:
    """Run ``python -m module REQUEST`` and read the JSON of its last line. Raises UserError naming ``what`` where it fails."""
    command = [sys.executable, "-m", module, json.dumps(request)]
    found_from = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": found_from}
    run = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=environment)
    if run.returncode == 2:  # the user's mistake, in the sentence of ``subprocess_main``
        raise UserError(run.stderr.strip().splitlines()[-1])
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{what} failed ({last}): lower the rows, the length or the vocabulary")
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def subprocess_main(work: Callable[[dict[str, Any]], Any]) -> None:
    """The other side of ``run_in_subprocess``: print what ``work`` makes of the request in the command line."""
    try:
        print(json.dumps(work(json.loads(sys.argv[1]))))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


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
    elif CLEAR.exists():  # Linux
        CLEAR.write_text("5", encoding="utf-8")
    return peak_bytes(device)


def peak_bytes(device: str) -> float:
    """Highest resident memory of this process since ``reset_peak``, or allocated memory of the GPU."""
    if device != "cpu":
        return float(torch.cuda.max_memory_allocated())
    if CLEAR.exists():
        status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def free_bytes(device: str) -> float:
    """Memory that a benchmark may take."""
    if device != "cpu":
        return float(torch.cuda.mem_get_info()[0])
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


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
