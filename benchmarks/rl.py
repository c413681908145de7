"""``python -m benchmarks rl``: time and peak memory of one update, each cell in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    free_bytes,
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
from benchmarks.config import BenchRL
from unmask.decoding import make_decoder
from unmask.decoding.plan import Plan
from unmask.decoding.trajectory import Trajectory
from unmask.evaluation.evaluate import environment
from unmask.io.files import check_writable, write_json
from unmask.models.adapters import adapter_config
from unmask.models.masked_lm import MaskedLM
from unmask.models.memory import GIB
from unmask.rl.config import DiffusionGRPOConfig
from unmask.rl.objectives import ViewRows
from unmask.rl.rollout import Rollout
from unmask.rl.trainer import DiffusionGRPOTrainer


def cells(config: BenchRL) -> list[tuple[str, int]]:
    """(way, steps) of everything to measure."""
    ways = [(way, s) for way in ("cj", "bare", "plain") for s in config.steps]
    return [*ways, ("one-step", 1), ("diffu", 1)]


def plain_bytes(config: BenchRL, steps: int) -> float:
    """What the plain way keeps for its backward, at least: float32 logits and their log-softmax of every step."""
    return 2 * 4.0 * steps * config.rows * (config.prompt + config.length) * config.vocabulary


def bench_rl(config: BenchRL, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure every cell ``repeats`` times, in turn, each time in a fresh process; writes and returns the result."""
    output = Path(config.output)
    check_writable(output)
    free = free_bytes(config.device)
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    skipped = []
    for repeat in range(config.repeats):
        for way, steps in cells(config):
            if way == "plain" and plain_bytes(config, steps) > config.memory_limit * free:
                if repeat == 0:
                    skipped.append({"way": way, "steps": steps, "needs_gib": plain_bytes(config, steps) / GIB})
                continue
            progress(f"{way}, S = {steps}, repeat {repeat + 1} of {config.repeats}")
            found.setdefault((way, steps), []).append(measure_cell(config, way, steps))
    table: list[dict[str, Any]] = []
    for (way, steps), runs in found.items():
        table.append(
            {
                "way": way,
                "steps": steps,
                "seconds": spread([r["seconds"] for r in runs]),
                "flops": runs[0]["flops"],
                "peak_gib": spread([r["peak"] / GIB for r in runs]),
                "before_gib": spread([r["before"] / GIB for r in runs]),
            }
        )
    peak = gemm_peak(config.dtype, config.device)
    for cell in table:
        cell["of_gemm_peak"] = cell["flops"] / cell["seconds"]["median"] / peak
    result = {
        "config": asdict(config),
        "environment": environment(),
        "gemm_flops": peak,
        "cells": table,
        "not_run": skipped,
    }
    write_json(output, result)
    return result


def measure_cell(config: BenchRL, way: str, steps: int) -> dict[str, float]:
    """``measure`` in a process of its own."""
    request = {**asdict(config), "way": way, "at": steps}
    return run_in_subprocess("benchmarks.update", f"{way} at S = {steps}", request)


def random_rollout(config: BenchRL, lm: MaskedLM, steps: int) -> Rollout:
    """A trajectory of random tokens committed by a uniform plan in random order; advantages alternate in sign."""
    generator = torch.Generator().manual_seed(1)
    rows, length = config.rows, config.length
    low = len(lm.tokenizer)  # plain text ids: no end token, no mask
    prompt = torch.randint(low, config.vocabulary, (rows, config.prompt), generator=generator)
    tokens = torch.randint(low, config.vocabulary, (rows, length), generator=generator)
    plan = torch.tensor(
        [s for s, n in enumerate(Plan.uniform(length, steps).commits) for _ in range(n)], dtype=torch.int16
    )
    step = torch.stack([plan[torch.randperm(length, generator=generator)] for _ in range(rows)])
    decoder = make_decoder("full", max_new_tokens=length, steps=steps)
    logprob = torch.full((rows, length), -11.0)
    trajectory = Trajectory(
        prompt, torch.ones_like(prompt, dtype=torch.bool), tokens, step, logprob, lm.mask_id, decoder.config()
    )
    advantages = torch.tensor([1.0, -1.0]).repeat(rows)[:rows]
    # Without old log-probabilities the current ones serve, so that no token is clipped away.
    active, seeds = torch.ones(rows, dtype=torch.bool, device=config.device), torch.arange(rows, device=config.device)
    return Rollout(trajectory.to(config.device), advantages.to(config.device), active, seeds)


def bench_trainer(config: BenchRL, objective: str, autocast: bool = False) -> DiffusionGRPOTrainer:
    """A trainer around the stand-in, ready for ``update``; ``autocast`` to bfloat16 whatever the weights."""
    adapter = adapter_config(config.lora, config.lora) if config.lora else None
    args = DiffusionGRPOConfig(
        output_dir=tempfile.gettempdir(),
        objective=objective,
        max_completion_length=config.length,
        num_generations=2,
        per_device_train_batch_size=2,
        rows_per_forward=config.rows_per_forward,
        max_logprob_mismatch=1e9,
        bf16=config.bf16 or autocast,
        activation_checkpointing=config.gradient_checkpointing,
        max_steps=1,
        report_to=[],
        trainer_args={"use_cpu": config.device == "cpu", "save_strategy": "no"},
    )
    return DiffusionGRPOTrainer(
        stand_in(config, config.dtype, config.device), _no_reward, args, [{"prompt": "x"}], peft_config=adapter
    )


def measure(config: BenchRL, way: str, steps: int) -> dict[str, float]:
    """Seconds and peak bytes of one update after a warm-up of one; in this process."""
    trainer = bench_trainer(config, way if way in ("one-step", "diffu") else "cj")
    if config.gradient_checkpointing:  # Trainer.train would do this
        trainer.lm.model.activation_checkpointing_enable({"use_reentrant": False})
    model: Any = trainer.accelerator.prepare(trainer.model)
    model.train()
    rollout = random_rollout(config, trainer.lm, steps)
    update: Callable[[], Any] = {
        "plain": lambda: plain_update(model, rollout),
        "bare": lambda: bare_update(trainer, model, rollout),
    }.get(way, lambda: trainer.update(model, rollout, 0))
    for p in model.parameters():  # gradients are there in every update but the first
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    before = reset_peak(config.device)
    update()
    flops = steps * pass_flops(trainer.lm, config.rows, config.prompt + config.length, 0)
    flops += pass_flops(trainer.lm, 0, 0, config.rows * config.length)  # every token is scored once
    return {
        "seconds": seconds(update, config.device),
        "peak": peak_bytes(config.device),
        "before": before,
        "flops": flops * (2 if config.lora else 3),  # what an update cannot do without: no gradient of frozen weights
    }


def _no_reward(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
    return [0.0] * len(completions)


def plain_update(model: Any, rollout: Rollout) -> None:
    """The way of the released code: logits of all positions in every step, one backward over all steps at the end."""
    trajectory = rollout.trajectory
    losses = []
    for s in range(trajectory.steps):
        ids = torch.cat([trajectory.prompt, trajectory.state(s)], 1)
        with torch.no_grad():
            old = _all_logprobs(model, ids, trajectory)
        new = _all_logprobs(model, ids, trajectory)
        ratio = (new - old).exp() * trajectory.committed(s)
        losses.append(-(ratio.sum(1) / trajectory.committed(s).sum(1) * rollout.advantages).mean())
    torch.stack(losses).mean().backward()


def _all_logprobs(model: Any, ids: Tensor, trajectory: Trajectory) -> Tensor:
    logits = model(input_ids=ids).logits.float()
    logits[..., trajectory.mask_id] = -torch.inf
    canvas = logits.log_softmax(-1)[:, trajectory.prompt.shape[1] :]
    return canvas.gather(-1, trajectory.tokens[..., None])[..., 0]


def bare_update(trainer: DiffusionGRPOTrainer, model: Any, rollout: Rollout) -> None:
    """Forward and backward of the same rows, and nothing else."""
    table = ViewRows.of(trainer.views(rollout, 0))
    for part, _ in trainer.microbatches(table, rollout.active):
        rows = table.take(part)
        prompt = torch.zeros_like(rollout.trajectory.prompt_mask[rows.row])
        model(input_ids=rows.ids, positions=torch.cat([prompt, rows.scored], 1)).logits.sum().backward()


if __name__ == "__main__":
    own = ("way", "at")
    subprocess_main(lambda r: measure(BenchRL(**{k: v for k, v in r.items() if k not in own}), *(r[k] for k in own)))
