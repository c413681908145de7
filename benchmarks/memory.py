"""The memory formula (``unmask.models.memory``) beside measured peaks, each cell in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import peak_bytes, reset_peak, run_in_subprocess, stand_in, subprocess_main
from benchmarks.config import BenchMemory, BenchRL
from benchmarks.update import bench_trainer, random_rollout
from unmask.decoding import decode, make_decoder
from unmask.evaluation.evaluate import environment
from unmask.io.files import check_writable, write_json
from unmask.models.masked_lm import MaskedLM
from unmask.models.memory import GIB, MemoryEstimate, Workload, decoding_memory, training_memory

# Small allocations too go back to the system when they are freed, so that resident memory is what lives.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def bench_memory(config: BenchMemory, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure every cell in a fresh process; writes and returns the result."""
    output = Path(config.output)
    check_writable(output)
    os.environ.update(ALLOCATOR)
    cells = []
    for work, length, completions in product(config.work, config.length, config.completions):
        progress(f"{work}, L = {length}, {completions} completions")
        request = {**asdict(config), "cell": [work, length, completions]}
        found = run_in_subprocess("benchmarks.memory", f"{work} at L = {length}", request)
        cells.append({"work": work, "length": length, "completions": completions, **found})
    result = {"config": asdict(config), "environment": environment(), "cells": cells}
    write_json(output, result)
    return result


def measure(config: BenchMemory, work: str, length: int, completions: int) -> dict[str, Any]:
    """Peak bytes above those of a process that has done the same with a model of almost no size, and the formula's parts."""
    small = replace(config, vocabulary=256, d_model=64, n_layers=1, n_heads=1, mlp_hidden_size=64)
    _do(small, work, length, completions, before=0.0)
    before = reset_peak(config.device)
    lm, peak = _do(config, work, length, completions, before)
    found = estimate(config, lm, work, length, completions)
    return {"measured": peak, "formula": found.total, **asdict(found)}


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


def _do(config: BenchMemory, work: str, length: int, completions: int, before: float) -> tuple[MaskedLM, float]:
    """The work itself; returns the plain model and the peak above ``before``."""
    if work == "decode":
        lm = stand_in(config, config.dtype, config.device)
        prompt = torch.randint(128, config.vocabulary, (completions, config.prompt), device=config.device)
        decode(lm, prompt, torch.ones_like(prompt, dtype=torch.bool), make_decoder("ass", max_new_tokens=length))
        return lm, peak_bytes(config.device) - before
    shape = {k: getattr(config, k) for k in ("vocabulary", "d_model", "n_layers", "n_heads", "mlp_hidden_size")}
    update = BenchRL(
        **shape,
        steps=(config.steps,),
        rows=completions,
        rows_per_forward=config.rows_per_forward,
        prompt=config.prompt,
        length=length,
        lora=config.lora if work.startswith("lora") else 0,
        bf16=work.startswith("lora") and config.dtype == "bfloat16",
        gradient_checkpointing="checkpointing" in work,
        device=config.device,
    )
    trainer = bench_trainer(update, "cj", autocast=True)
    if update.gradient_checkpointing:  # Trainer.train would do this
        trainer.lm.model.activation_checkpointing_enable({"use_reentrant": False})
    model: Any = trainer.accelerator.prepare(trainer.model)
    model.train()
    rollout = random_rollout(update, trainer.lm, config.steps)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
    for _ in range(2):  # gradients and moments are there in every update but the first
        trainer.update(model, rollout, 0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    peak = peak_bytes(config.device) - before
    # The formula wants the model without the adapter.
    return stand_in(config, update.dtype, config.device) if update.lora else trainer.lm, peak


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows."""
    headings = ["work", "L", "completions", "measured GiB", "formula GiB", "formula / measured"]
    rows = [
        [
            c["work"],
            str(c["length"]),
            str(c["completions"]),
            f"{c['measured'] / GIB:.3f}",
            f"{c['formula'] / GIB:.3f}",
            f"{c['formula'] / c['measured']:.2f}",
        ]
        for c in result["cells"]
    ]
    return headings, rows


if __name__ == "__main__":
    subprocess_main(
        lambda request: measure(BenchMemory(**{k: v for k, v in request.items() if k != "cell"}), *request["cell"])
    )
