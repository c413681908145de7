"""The memory formula (``unmask.models.memory``) beside measured peaks, each cell in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import torch

from benchmarks.common import in_subprocess, peak_bytes, reset_peak, stand_in, write_result
from benchmarks.config import BenchMemory, BenchRL
from benchmarks.rl import prepare_update, random_rollout
from unmask.decoding import decode, make_decoder
from unmask.models.masked_lm import MaskedLM
from unmask.models.memory import GIB, MemoryEstimate, Workload, decoding_memory, training_memory

# Small allocations too go back to the system when they are freed, so that resident memory is what lives.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def run(config: BenchMemory, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure every cell in a fresh process."""
    os.environ.update(ALLOCATOR)
    cells = []
    for work, length, completions in product(config.work, config.length, config.completions):
        progress(f"{work}, L = {length}, {completions} completions")
        found = in_subprocess("memory", config, work, length, completions)
        cells.append({"work": work, "length": length, "completions": completions, **found})
    return write_result(config, cells)


def table(config: BenchMemory, result: dict[str, Any]) -> tuple[str, list[dict[str, str]]]:
    """Title, and text by heading for each cell."""
    rows = [
        {
            "work": c["work"],
            "L": str(c["length"]),
            "completions": str(c["completions"]),
            "measured GiB": f"{c['measured'] / GIB:.3f}",
            "formula GiB": f"{c['formula'] / GIB:.3f}",
            "formula / measured": f"{c['formula'] / c['measured']:.2f}",
        }
        for c in result["cells"]
    ]
    shape = f"{config.n_layers} layers of {config.d_model}, V = {config.vocabulary}"
    return f"peak memory, {shape}, P = {config.prompt}, S = {config.steps}", rows


def measure(config: BenchMemory, work: str, length: int, completions: int) -> dict[str, Any]:
    """Peak bytes above those of a process that has done the same with a model of almost no size, and the formula's parts."""
    small = replace(config, vocabulary=256, d_model=64, n_layers=1, n_heads=1, mlp_hidden_size=64)
    _work(small, work, length, completions)
    before = reset_peak(config.device)
    lm, peak = _work(config, work, length, completions)
    found = estimate(config, lm, work, length, completions)
    return {"measured": peak - before, "formula": found.total, **asdict(found)}


def estimate(config: BenchMemory, lm: MaskedLM, work: str, length: int, completions: int) -> MemoryEstimate:
    """What the formula says of a cell. ``lm`` may be without weights."""
    decoding = work == "decode"
    load = Workload(
        getattr(torch, "float32" if work.startswith("all") else config.dtype),
        completions if decoding else min(config.rows_per_forward, completions * config.steps),
        config.prompt,
        length,
        lora=config.lora if work.startswith("lora") else 0,
        checkpointing="checkpointing" in work,
        completions=completions,
        steps=config.steps,
        cuda=config.device != "cpu",
    )
    return decoding_memory(lm, load) if decoding else training_memory(lm, load)


def _work(config: BenchMemory, work: str, length: int, completions: int) -> tuple[MaskedLM, float]:
    """The work itself; returns the model without adapter, and the peak in bytes."""
    if work == "decode":
        lm = stand_in(config, config.dtype, config.device)
        prompt = torch.randint(128, config.vocabulary, (completions, config.prompt), device=config.device)
        decode(lm, prompt, torch.ones_like(prompt, dtype=torch.bool), make_decoder("ass", max_new_tokens=length))
        return lm, peak_bytes(config.device)
    shared = ("vocabulary", "d_model", "n_layers", "n_heads", "mlp_hidden_size", "rows_per_forward", "prompt", "device")
    update = BenchRL(
        **{key: getattr(config, key) for key in shared},
        steps=(config.steps,),
        rows=completions,
        length=length,
        lora=config.lora if work.startswith("lora") else 0,
        bf16=work.startswith("lora") and config.dtype == "bfloat16",
        gradient_checkpointing="checkpointing" in work,
    )
    trainer, model = prepare_update(update, "cj", autocast=True)
    rollout = random_rollout(update, trainer.lm, config.steps)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
    for _ in range(2):  # gradients and moments are there in every update but the first
        trainer.update(model, rollout, 0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    peak = peak_bytes(config.device)
    return stand_in(config, update.dtype, config.device) if update.lora else trainer.lm, peak
