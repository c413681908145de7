"""``unmask rl CONFIG --dry-run``: what a run would do, from its configuration, data and the model's shape alone."""

from __future__ import annotations

import dataclasses
import math
import os

import torch
import yaml

from unmask.decoding import Decoder
from unmask.memory import Load, training_need
from unmask.models.load import DTYPES, outline
from unmask.rl.objectives import OBJECTIVES
from unmask.rl.rewards import load_reward, task_rewards
from unmask.rl.run import RLConfig, problem_rows
from unmask.spec import UserError
from unmask.tasks import make_task
from unmask.trajectory import Trajectory

GIB = 2**30


def _filled(decoder: Decoder) -> Trajectory:
    """One row as the plan commits it, to count an objective's views on."""
    plan = torch.tensor([s for s, n in enumerate(decoder.plan.commits) for _ in range(n)], dtype=torch.int16)[None]
    tokens, prompt = torch.zeros_like(plan, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    return Trajectory(prompt, prompt == 0, tokens, plan, torch.zeros(plan.shape), 1, decoder.config())


def dry_run(config: RLConfig) -> str:
    """The resolved configuration, batch arithmetic, forward passes an update and memory of one process, as text.

    The number of processes is that of the launcher (``WORLD_SIZE``). Weights are not read.

    Raises:
        UserError: for what would stop the run before its first update.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    lm = outline(config.model, config.dtype)
    tasks = [make_task(spec, lm.task_defaults) for spec in config.tasks]
    rows = problem_rows(lm, tasks, "train", config.problems, config.seed + 1)
    rewards = [load_reward(r).__name__ for r in config.reward] or [f.__name__ for f, _ in task_rewards(tasks)]
    decoder, objective = config.rollout_decoder(), OBJECTIVES[config.objective]
    prompt = lm.encode([row["prompt"] for row in rows], config.max_completion_length)[0].shape[1]
    if config.batch_size % config.num_generations:
        raise UserError(
            f"num_generations={config.num_generations} does not divide the batch of {config.batch_size} completions a "
            "process: change one of them"
        )
    completions, groups = config.batch_size * world, config.batch_size // config.num_generations * world
    rollouts = math.ceil(config.steps / config.num_iterations)
    steps, copies = decoder.plan.steps, 2 if decoder.cfg_scale else 1
    chunks = math.ceil(config.batch_size / config.rows_per_forward)
    every = len(list(objective.views(_filled(decoder), torch.zeros(1, dtype=torch.int64), 0)))
    views = min(every, config.steps_per_update or every)
    passes = math.ceil(views * config.batch_size / config.rows_per_forward)
    scored = math.ceil(every * config.batch_size / config.rows_per_forward)
    fresh = config.num_iterations if objective.fresh else 1
    old = 0 if objective.recorded or config.num_iterations == 1 else scored * fresh
    reference = scored * fresh if config.beta > 0 else 0
    mu = config.num_iterations
    need = training_need(
        lm,
        Load(
            DTYPES.get(config.dtype, lm.model.dtype),
            min(config.rows_per_forward, views * config.batch_size),
            prompt,
            config.max_completion_length,
            lora=config.lora_r or 0,
            targets=config.lora_target_modules,
            autocast=config.bf16,
            checkpointing=config.gradient_checkpointing,
            reference=config.beta > 0,
            completions=config.batch_size,
            steps=views,
            cuda=torch.cuda.is_available() or config.dtype != "float32",
        ),
    )
    parts = ", ".join(f"{k} {v / GIB:.2f}" for k, v in dataclasses.asdict(need).items() if v)
    per_update = (chunks * steps * copies + old + reference) / mu + passes * copies
    lines = [
        yaml.safe_dump(dataclasses.asdict(config), sort_keys=False).rstrip(),
        "",
        f"model      {lm.name}: {lm.model.config.model_type}, {sum(p.numel() for p in lm.model.parameters()):,} parameters",
        f"rewards    {', '.join(rewards)}",
        f"prompts    {len(rows)}, the longest {prompt} tokens; {rollouts * groups} drawn in the run "
        f"({rollouts * groups / len(rows):.2f} epochs)",
        f"batch      {world} processes × {config.batch_size} completions = {completions} an update: {groups} prompts × "
        f"{config.num_generations}",
        f"updates    {config.steps}, {mu} on each of {rollouts} rollouts",
        f"rollout    {steps} steps for {config.max_completion_length} tokens ({decoder.name}): NFE {steps * copies} a "
        f"completion, {chunks * steps * copies} forward passes of up to {config.rows_per_forward} rows a process",
        f"scoring    {old} forward passes for the old policy, {reference} for the reference, once a rollout",
        f"update     {views} views × {config.batch_size} rows: {passes * copies} forward and backward passes",
        f"in all     {per_update:.1f} forward passes an update and process, {passes * copies} of them with a backward pass",
        f"memory     {need.total / GIB:.2f} GiB a process without sharding ({parts})",
    ]
    return "\n".join(lines)
