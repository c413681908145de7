"""``python -m benchmarks decode``: our step beside the bare forward pass, and whole decodes beside the released code."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    gemm_peak,
    pass_flops,
    peak_bytes,
    reset_peak,
    run_in_subprocess,
    seconds,
    spread,
    stand_in,
    subprocess_main,
)
from benchmarks.config import STAND_IN, BenchDecode
from benchmarks.reference import load_reference, reference_decode
from unmask.decoding import Decoder, decode, make_decoder
from unmask.decoding.canvas import Canvases
from unmask.decoding.decode import DecodingLoop
from unmask.decoding.trajectory import Trajectory
from unmask.errors import UserError
from unmask.evaluation.evaluate import environment, task_prompts
from unmask.io.files import check_writable, write_json
from unmask.models.load import load
from unmask.models.masked_lm import MaskedLM
from unmask.models.memory import GIB
from unmask.tasks import make_task

HEAD_SCALE = (
    8.0  # the stand-in's head: confidences as far apart as a trained model's, so that no order hangs on rounding
)


def bench_decode(config: BenchDecode, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure every cell in a fresh process; writes and returns the result."""
    output = Path(config.output)
    check_writable(output)
    peak = gemm_peak(config.dtype, config.device)
    table: list[dict[str, Any]] = []
    result = {"config": asdict(config), "environment": environment(), "gemm_flops": peak, "cells": table}
    for model, length, spec, temperature in product(config.model, config.length, config.decoder, config.temperature):
        label = f"{model} · L = {length} · {spec} · T = {temperature:g}"
        progress(label)
        request = {**asdict(config), "cell": [model, length, spec, temperature]}
        found = run_in_subprocess("benchmarks.decoding", label, request)
        cell = {"model": model, "length": length, "decoder": spec, "temperature": temperature, **found}
        if "step" in cell:
            cell["of_gemm_peak"] = cell["flops"] / cell["step"]["median"] / peak
        table.append(cell)
        write_json(output, result)  # what is measured is kept, should a later cell fail
    return result


def prompts(config: BenchDecode, lm: MaskedLM) -> Tensor:
    """(rows, P) int64 without padding."""
    if lm.name == STAND_IN:
        generator = torch.Generator().manual_seed(1)
        low = len(lm.tokenizer)  # plain text ids: no end token, no mask
        return torch.randint(low, config.vocabulary, (config.rows, config.prompt), generator=generator).to(lm.device)
    task = make_task("countdown", lm.task_defaults)
    problems = task.problems("test", 16 * config.rows)
    by_length: dict[int, list[str]] = defaultdict(list)
    for text in task_prompts(lm, task, problems):
        by_length[lm.encode([text])[0].shape[1]].append(text)
    most = max(by_length.values(), key=len)
    return lm.encode([most[i % len(most)] for i in range(config.rows)])[0]


@torch.no_grad()
def measure(config: BenchDecode, model: str, length: int, spec: str, temperature: float) -> dict[str, Any]:
    """One cell, in this process."""
    decoder = make_decoder(spec, max_new_tokens=length, temperature=temperature)
    if model == STAND_IN:
        lm = stand_in(config, config.dtype, config.device)
        lm.model.get_output_embeddings().weight.mul_(HEAD_SCALE)
    else:
        lm = load(model, config.dtype, config.device)
    prompt = prompts(config, lm)
    if prompt.shape[1] + length > lm.max_length:
        raise UserError(f"{model} takes {lm.max_length} tokens, but prompt and canvas have {prompt.shape[1] + length}")
    mask, seeds = torch.ones_like(prompt, dtype=torch.bool), torch.arange(len(prompt), device=prompt.device)

    def ours() -> Trajectory:
        return decode(lm, prompt, mask, decoder, seeds=seeds)

    before = reset_peak(config.device)
    trajectory = ours()
    found: dict[str, Any] = {
        "passes": trajectory.steps,
        "prompt": prompt.shape[1],
        "peak_gib": peak_bytes(config.device) / GIB,
        "before_gib": before / GIB,
    }
    if decoder.cache == "none":
        found |= measure_passes(config, lm, decoder, trajectory, seeds)
    reference = None
    if config.reference is not None:
        reference = reference_decode(load_reference(config.reference), lm, prompt, decoder)
    if reference is not None or decoder.cache != "none":
        times: dict[str, list[float]] = {"decode": [], "reference": []}
        if reference is not None and decoder.temperature == 0 and decoder.confidence != "random":
            found["same_tokens"] = bool(torch.equal(reference(), trajectory.tokens))
            if not found["same_tokens"] and decoder.eos == "keep":
                found["ties"] = boundary_ties(lm, decoder, trajectory, seeds)
        for _ in range(config.repeats):
            times["decode"].append(seconds(ours, config.device))
            if reference is not None:
                times["reference"].append(seconds(reference, config.device))
        found["decode"] = spread(times["decode"])
        found.setdefault("tokens_per_second", trajectory.tokens.numel() / found["decode"]["median"])
        if reference is not None:
            found["reference"] = spread(times["reference"])
            found["reference_over_ours"] = spread(
                [r / d for r, d in zip(times["reference"], times["decode"], strict=True)]
            )
    return found


def measure_passes(
    config: BenchDecode, lm: MaskedLM, decoder: Decoder, trajectory: Trajectory, seeds: Tensor
) -> dict[str, Any]:
    """Seconds a pass of our step, of the trunk with the logits that it needs, and of the trunk alone; they alternate."""
    steps, width, length = trajectory.steps, *trajectory.prompt.shape[1:], *trajectory.tokens.shape[1:]
    chosen = sorted({round(i * (steps - 1) / max(1, config.passes - 1)) for i in range(min(config.passes, steps))})
    loop = DecodingLoop(lm, decoder, early_stop=False)
    sums: dict[str, list[float]] = {way: [0.0] * config.repeats for way in ("step", "needed", "trunk")}
    flops = 0.0
    for repeat, s in product(range(-1, config.repeats), chosen):  # -1 warms up
        rows = standing_at(lm, trajectory, s, seeds)
        open_ = loop.step_quota_and_mask(rows)[2].flatten().nonzero()[:, 0]
        ids = rows.ids.repeat(decoder.copies, 1)
        positions = open_ // length * ids.shape[1] + width + open_ % length
        ways: dict[str, Callable[[], Any]] = {
            "step": lambda rows=rows: loop.advance(rows),  # type: ignore[misc]
            "needed": lambda ids=ids, at=positions: lm.model(input_ids=ids, positions=at),  # type: ignore[misc]
            "trunk": lambda ids=ids, at=positions: lm.model(input_ids=ids, positions=at[:0]),  # type: ignore[misc]
        }
        for way, work in ways.items():
            taken = seconds(work, config.device)
            if repeat >= 0:
                sums[way][repeat] += taken / len(chosen)
        flops += pass_flops(lm, len(ids), ids.shape[1], len(positions)) / len(chosen) / (config.repeats + 1)
    step = spread(sums["step"])
    return {
        **{way: spread(values) for way, values in sums.items()},
        "timed": len(chosen),
        "step_over_needed": spread([a / b for a, b in zip(sums["step"], sums["needed"], strict=True)]),
        "step_over_trunk": spread([a / b for a, b in zip(sums["step"], sums["trunk"], strict=True)]),
        "flops": flops,
        "tokens_per_second": trajectory.tokens.numel() / (step["median"] * steps),
    }


def boundary_ties(lm: MaskedLM, decoder: Decoder, trajectory: Trajectory, seeds: Tensor) -> int:
    """How often the last candidate that a step took and the first that it left have one float32 probability.

    There the released code, which compares such probabilities, takes any of the two.
    """
    loop, length, ties = DecodingLoop(lm, decoder, early_stop=False), trajectory.tokens.shape[1], 0
    for s in range(trajectory.steps):
        rows = standing_at(lm, trajectory, s, seeds)
        _, quota, open_ = loop.step_quota_and_mask(rows)
        place = torch.arange(rows.width, rows.width + length, device=quota.device).expand(len(rows), -1)
        p = lm.logits(rows.ids, rows.attention_mask, place).softmax(-1).amax(-1).masked_fill(~open_, -1.0)
        ranked = torch.nn.functional.pad(p.sort(1, descending=True).values, (0, 1), value=-1.0)
        last, following = ranked.gather(1, quota[:, None] - 1), ranked.gather(1, quota[:, None])
        ties += int(((last == following) & (following >= 0)).sum())
    return ties


def standing_at(lm: MaskedLM, trajectory: Trajectory, s: int, seeds: Tensor) -> Canvases:
    """The rows of a trajectory as they were before step ``s``; those that were done by then are left out."""
    canvas = trajectory.state(0)
    rows = Canvases.new(trajectory.prompt, trajectory.prompt_mask, canvas, lm.mask_id, seeds, range(len(seeds)))
    rows.canvas.copy_(trajectory.state(s))
    step = torch.where(trajectory.step < s, trajectory.step, -1)
    rows = replace(rows, step=step, at=torch.full_like(seeds, s), passes=[s] * len(seeds))
    return rows.take((step < 0).any(1).nonzero()[:, 0])


if __name__ == "__main__":
    subprocess_main(
        lambda request: measure(BenchDecode(**{k: v for k, v in request.items() if k != "cell"}), *request["cell"])
    )
