"""``python -m benchmarks rl``: time and peak memory of one update, each cell in a process of its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.config import BenchRL
from unmask.decoding import make_decoder
from unmask.decoding.plan import Plan
from unmask.decoding.trajectory import Trajectory
from unmask.errors import unknown
from unmask.models.adapters import adapter_config
from unmask.models.masked_lm import MaskedLM
from unmask.models.memory import GIB
from unmask.rl.config import DiffusionGRPOConfig
from unmask.rl.objectives import ViewRows
from unmask.rl.rollout import Rollout
from unmask.rl.trainer import DiffusionGRPOTrainer


def run(config: BenchRL, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure every cell ``repeats`` times, in turn, each time in a fresh process."""
    if config.block_length is None:
        cells = [*((way, s) for way in ("cj", "bare", "plain") for s in config.steps), ("one-step", 1), ("diffu", 1)]
    else:
        cells = [(way, s) for s in config.steps for way in ("cj", "sequential")]
    ways = {way for way, _ in cells}
    if strange := set(config.way) - ways:
        raise unknown("way", min(strange), ways)
    cells = [cell for cell in cells if cell[0] in (config.way or ways)]
    # What the plain way keeps for its backward, at least: float32 logits and their log-softmax of every step.
    needed = 2 * 4 * config.rows * (config.prompt + config.length) * config.vocabulary
    most = config.memory_limit * free_bytes(config.device)
    not_run = [(way, steps) for way, steps in cells if way == "plain" and steps * needed > most]
    found: dict[tuple[str, int], list[dict[str, float]]] = {cell: [] for cell in cells if cell not in not_run}
    for repeat in range(config.repeats):
        for way, steps in found:
            progress(f"{way}, S = {steps}, repeat {repeat + 1} of {config.repeats}")
            found[way, steps].append(common.in_subprocess("rl", config, way, steps))
    peak = common.gemm_peak(config.dtype, config.device)
    measured = []
    for (way, steps), runs in found.items():
        time, flops = common.spread([r["seconds"] for r in runs]), runs[0]["flops"]
        cell = {"way": way, "steps": steps, "seconds": time, "flops": flops}
        cell |= {f"{key}_gib": common.spread([r[key] / GIB for r in runs]) for key in ("peak", "before")}
        measured.append({**cell, "of_gemm_peak": flops / time["median"] / peak})
    skipped = [{"way": way, "steps": steps, "needs_gib": steps * needed / GIB} for way, steps in not_run]
    return common.write_result(config, measured, gemm_flops=peak, not_run=skipped)


def table(config: BenchRL, result: dict[str, Any]) -> tuple[str, list[dict[str, str]]]:
    """Title, and text by heading for each cell, those that were not run at the end."""
    rows = [
        {
            "way": c["way"],
            "S": str(c["steps"]),
            "seconds": common.spread_text(c["seconds"]) if "seconds" in c else "not run",
            "peak GiB": common.spread_text(c["peak_gib"]) if "seconds" in c else f"> {c['needs_gib']:.0f}",
            "before": f"{c['before_gib']['median']:.2f}" if "seconds" in c else "",
            "% GEMM": f"{100 * c['of_gemm_peak']:.0f}" if "seconds" in c else "",
        }
        for c in [*result["cells"], *result["not_run"]]
    ]
    size = f"{config.rows} rows of {config.prompt} + {config.length} tokens, V = {config.vocabulary}"
    return f"one update, {size}; median (range) of {config.repeats}", rows


def free_bytes(device: str) -> float:
    """Memory that a benchmark may take."""
    if device != "cpu":
        return float(torch.cuda.mem_get_info()[0])
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def random_rollout(config: BenchRL, lm: MaskedLM, steps: int) -> Rollout:
    """A trajectory of random tokens committed by a uniform plan in random order (in each block, where the model has blocks);
    advantages alternate in sign."""
    generator = torch.Generator().manual_seed(1)
    rows, length = config.rows, config.length
    low = len(lm.tokenizer)  # plain text ids: no end token, no mask
    prompt = torch.randint(low, config.vocabulary, (rows, config.prompt), generator=generator)
    tokens = torch.randint(low, config.vocabulary, (rows, length), generator=generator)
    block = config.block_length or length
    commits = torch.tensor(Plan.uniform(length, steps, config.block_length).commits)
    plan = torch.arange(steps, dtype=torch.int16).repeat_interleave(commits)
    order = (torch.rand(rows, length, generator=generator) + torch.arange(length) // block).argsort(1)
    step = torch.empty(rows, length, dtype=torch.int16).scatter_(1, order, plan.expand(rows, -1))
    decoder = make_decoder("full", max_new_tokens=length, steps=steps)
    logprob = torch.full((rows, length), -11.0)
    mask = torch.ones_like(prompt, dtype=torch.bool)
    trajectory = Trajectory(prompt, mask, tokens, step, logprob, lm.mask_id, decoder.config())
    advantages = torch.tensor([1.0, -1.0]).repeat(rows)[:rows]
    # Without old log-probabilities the current ones serve, so that no token is clipped away.
    active, seeds = torch.ones(rows, dtype=torch.bool, device=config.device), torch.arange(rows, device=config.device)
    return Rollout(trajectory.to(config.device), advantages.to(config.device), active, seeds)


def prepare_update(config: BenchRL, objective: str, autocast: bool = False) -> tuple[DiffusionGRPOTrainer, Any]:
    """A trainer around the stand-in and its model, ready for ``update``; ``autocast`` to bfloat16 whatever the weights."""
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
        compile=config.compile,
        max_steps=1,
        report_to=[],
        trainer_args={"use_cpu": config.device == "cpu", "save_strategy": "no"},
    )
    lm = common.stand_in(config, config.dtype, config.device)
    adapter = adapter_config(config.lora, config.lora) if config.lora else None
    trainer = DiffusionGRPOTrainer(lm, _no_reward, args, [{"prompt": "x"}], peft_config=adapter)
    if config.gradient_checkpointing:  # Trainer.train would do this
        trainer.lm.model.activation_checkpointing_enable({"use_reentrant": False})
    return trainer, trainer.accelerator.prepare(trainer.model).train()


def measure(config: BenchRL, way: str, steps: int) -> dict[str, float]:
    """Seconds and peak bytes of one update after a warm-up of one; in this process."""
    trainer, model = prepare_update(config, way if way in ("one-step", "diffu") else "cj")
    passes, tokens = steps, config.prompt + config.length
    if way == "sequential":  # state after state, as if the model's attention were full
        trainer.lm = replace(trainer.lm, block_length=None)
    elif config.block_length is not None:
        passes, tokens = steps * config.block_length // config.length, tokens + config.length
    rollout = random_rollout(config, trainer.lm, steps)
    update: Callable[[], Any] = {
        "plain": lambda: plain_update(model, rollout),
        "bare": lambda: bare_update(trainer, model, rollout),
    }.get(way, lambda: trainer.update(model, rollout, 0))
    for p in model.parameters():  # gradients are there in every update but the first
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    before = common.reset_peak(config.device)
    with trainer.without_adapter_casts():
        update()
        seconds = common.seconds(update, config.device)
    flops = passes * common.pass_flops(trainer.lm, config.rows, tokens, 0)
    flops += common.pass_flops(trainer.lm, 0, 0, config.rows * config.length)  # every token is scored once
    return {
        "seconds": seconds,
        "peak": common.peak_bytes(config.device),
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
