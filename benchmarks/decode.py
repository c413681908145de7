"""``python -m benchmarks decode``: our step beside the bare forward pass, and whole decodes beside the released code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from statistics import mode
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.config import STAND_IN, BenchDecode
from benchmarks.reference import load_reference, reference_decode
from unmask.decoding import Decoder, decode, make_decoder
from unmask.decoding.canvas import Canvases
from unmask.decoding.loop import DecodingLoop
from unmask.decoding.trajectory import Trajectory
from unmask.errors import UserError
from unmask.evaluation.evaluate import task_prompts
from unmask.models.load import load
from unmask.models.masked_lm import MaskedLM
from unmask.models.memory import GIB
from unmask.tasks import make_task

# The stand-in's head: confidences as far apart as a trained model's, so that no order hangs on rounding.
HEAD_SCALE = 8.0


def run(config: BenchDecode, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure every cell in a fresh process; what is measured is kept, should a later cell fail."""
    peak = common.gemm_peak(config.dtype, config.device)
    cells: list[dict[str, Any]] = []
    for model, length, spec, temperature in product(config.model, config.length, config.decoder, config.temperature):
        progress(f"{model} · L = {length} · {spec} · T = {temperature:g}")
        cell: dict[str, Any] = {"model": model, "length": length, "decoder": spec, "temperature": temperature}
        cell |= common.in_subprocess("decode", config, model, length, spec, temperature)
        if "step" in cell:
            cell["of_gemm_peak"] = cell["flops"] / cell["step"]["median"] / peak
        cells.append(cell)
        result = common.write_result(config, cells, gemm_flops=peak)
    return result


def table(config: BenchDecode, result: dict[str, Any]) -> tuple[str, list[dict[str, str]]]:
    """Title, and text by heading for each cell; ``-`` where something was not measured."""

    def text(cell: dict[str, Any], key: str, show: Callable[[Any], str]) -> str:
        return show(cell[key]) if key in cell else "-"

    rows = [
        {
            "decoder": f"{c['model']} · {c['decoder']}",
            "T": f"{c['temperature']:g}",
            "L": str(c["length"]),
            "passes": str(c["passes"]),
            "trunk ms": text(c, "trunk", lambda found: f"{1000 * found['median']:.0f}"),
            "step ms": text(c, "step", lambda found: f"{1000 * found['median']:.0f}"),
            "step / needed": text(c, "step_over_needed", common.spread_text),
            "tokens/s": f"{c['tokens_per_second']:.0f}",
            "+GiB": f"{c['peak_gib'] - c['before_gib']:.2f}",
            "% GEMM": text(c, "of_gemm_peak", lambda share: f"{100 * share:.0f}"),
            "released / ours": text(c, "reference_over_ours", common.spread_text),
            "same": text(c, "same_tokens", lambda same: "yes" if same else "no"),
        }
        for c in result["cells"]
    ]
    return f"decoding {config.rows} rows, {config.dtype}; median (range) of {config.repeats}", rows


def prompts(config: BenchDecode, lm: MaskedLM) -> Tensor:
    """(rows, P) int64 without padding."""
    if lm.name == STAND_IN:
        generator = torch.Generator().manual_seed(1)
        low = len(lm.tokenizer)  # plain text ids: no end token, no mask
        return torch.randint(low, config.vocabulary, (config.rows, config.prompt), generator=generator).to(lm.device)
    task = make_task("countdown", lm.task_defaults)
    rows = [lm.encode([text])[0] for text in task_prompts(lm, task, task.problems("test", 16 * config.rows))]
    length = mode(row.shape[1] for row in rows)
    rows = [row for row in rows if row.shape[1] == length]
    return torch.cat([rows[i % len(rows)] for i in range(config.rows)])


@torch.no_grad()
def measure(config: BenchDecode, model: str, length: int, spec: str, temperature: float) -> dict[str, Any]:
    """One cell, in this process."""
    decoder = make_decoder(spec, max_new_tokens=length, temperature=temperature)
    if model == STAND_IN:
        lm = common.stand_in(config, config.dtype, config.device)
        lm.model.get_output_embeddings().weight.mul_(HEAD_SCALE)
    else:
        lm = load(model, config.dtype, config.device)
    decoder = decoder.within(lm.block_length)
    prompt = prompts(config, lm)
    if prompt.shape[1] + length > lm.max_length:
        raise UserError(f"{model} takes {lm.max_length} tokens, but prompt and canvas have {prompt.shape[1] + length}")
    mask, seeds = torch.ones_like(prompt, dtype=torch.bool), torch.arange(len(prompt), device=prompt.device)

    def ours() -> Trajectory:
        return decode(lm, prompt, mask, decoder, seeds=seeds)

    before = common.reset_peak(config.device)
    trajectory = ours()
    found: dict[str, Any] = {
        "passes": trajectory.steps,
        "prompt": prompt.shape[1],
        "peak_gib": common.peak_bytes(config.device) / GIB,
        "before_gib": before / GIB,
    }
    by_pass = decoder.cache == "none" and lm.block_length is None
    if by_pass:
        found |= measure_passes(config, lm, decoder, trajectory, seeds)
    reference = None
    if config.reference is not None:
        reference = reference_decode(load_reference(config.reference), lm, prompt, decoder)
    if reference is None and by_pass:
        return found
    if reference is not None and decoder.temperature == 0 and decoder.confidence != "random":
        found["same_tokens"] = bool(torch.equal(reference(), trajectory.tokens))
    times, theirs = [], []
    for _ in range(config.repeats):
        times.append(common.seconds(ours, config.device))
        if reference is not None:
            theirs.append(common.seconds(reference, config.device))
    found["decode"] = common.spread(times)
    found.setdefault("tokens_per_second", trajectory.tokens.numel() / found["decode"]["median"])
    if theirs:
        found["reference"] = common.spread(theirs)
        found["reference_over_ours"] = common.spread([r / d for r, d in zip(theirs, times, strict=True)])
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
        rows = rows_before(lm, trajectory, s, seeds)
        open_ = loop.step_quota_and_mask(rows)[2].flatten().nonzero()[:, 0]
        ids = rows.ids.repeat(decoder.copies, 1)
        positions = open_ // length * ids.shape[1] + width + open_ % length
        ways: dict[str, Callable[[], Any]] = {
            "step": lambda rows=rows: loop.advance(rows),  # type: ignore[misc]
            "needed": lambda ids=ids, at=positions: lm.model(input_ids=ids, positions=at),  # type: ignore[misc]
            "trunk": lambda ids=ids, at=positions: lm.model(input_ids=ids, positions=at[:0]),  # type: ignore[misc]
        }
        for way, work in ways.items():
            taken = common.seconds(work, config.device)
            if repeat >= 0:
                sums[way][repeat] += taken / len(chosen)
        flops += common.pass_flops(lm, len(ids), ids.shape[1], len(positions)) / len(chosen) / (config.repeats + 1)
    step = common.spread(sums["step"])
    return {
        **{way: common.spread(values) for way, values in sums.items()},
        "timed": len(chosen),
        "step_over_needed": common.spread([a / b for a, b in zip(sums["step"], sums["needed"], strict=True)]),
        "step_over_trunk": common.spread([a / b for a, b in zip(sums["step"], sums["trunk"], strict=True)]),
        "flops": flops,
        "tokens_per_second": trajectory.tokens.numel() / (step["median"] * steps),
    }


def rows_before(lm: MaskedLM, trajectory: Trajectory, s: int, seeds: Tensor) -> Canvases:
    """The rows of a trajectory as they were before step ``s``; those that were done by then are left out."""
    canvas = trajectory.state(0)
    rows = Canvases.new(trajectory.prompt, trajectory.prompt_mask, canvas, lm.mask_id, seeds, range(len(seeds)))
    rows.canvas.copy_(trajectory.state(s))
    step = torch.where(trajectory.step < s, trajectory.step, -1)
    rows = replace(rows, step=step, at=torch.full_like(seeds, s), passes=[s] * len(seeds))
    return rows.take((step < 0).any(1).nonzero()[:, 0])
