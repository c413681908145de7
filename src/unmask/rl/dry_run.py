"""``unmask rl CONFIG --dry-run``: what a run would do, from its configuration, data and the model's shape alone."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from unmask.decoding import Decoder
from unmask.decoding.trajectory import Trajectory
from unmask.io.files import as_yaml
from unmask.io.launcher import world_size
from unmask.models.adapters import check_precision
from unmask.models.load import load_meta
from unmask.models.memory import GIB, Load, training_need
from unmask.rl.config import RLConfig
from unmask.rl.objectives import OBJECTIVES
from unmask.rl.rewards import check_weights, reward_functions, reward_names
from unmask.rl.run import problem_rows
from unmask.tasks import make_task


def _filled(decoder: Decoder) -> Trajectory:
    """One row as the plan commits it, to count an objective's views on."""
    plan = torch.tensor([s for s, n in enumerate(decoder.plan.commits) for _ in range(n)], dtype=torch.int16)[None]
    tokens, prompt = torch.zeros_like(plan, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    return Trajectory(prompt, prompt == 0, tokens, plan, torch.zeros(plan.shape), 1, decoder.config())


@dataclass(frozen=True)
class Work:
    """What one completion takes in a run, in forward passes of one row.

    Attributes:
        steps: of its sampling. every: views of the objective; views: those that an update scores, with a backward pass.
        old, reference, joint: how often all views are scored once more in a rollout: for the old policy, for the reference, and
            for a loss of log-probabilities that are sums over views.
        copies: rows that stand for one (guidance: 2).
    """

    steps: int
    every: int
    views: int
    old: int
    reference: int
    joint: int
    copies: int

    def passes(self, updates: int, rollouts: int) -> int:
        """Forward passes (NFE) of one completion of every rollout, in all."""
        scored = self.every * (self.old + self.reference + self.joint)
        return self.copies * (rollouts * (self.steps + scored) + updates * self.views)


def work_of(config: RLConfig) -> Work:
    """The work of a run with these settings."""
    decoder, objective = config.rollout_decoder(), OBJECTIVES[config.objective]
    views = list(objective.views(_filled(decoder), torch.zeros(1, dtype=torch.int64), 0))
    every, mu = len(views), config.num_iterations
    fresh = mu if objective.fresh else 1
    return Work(
        steps=decoder.plan.steps,
        every=every,
        views=min(every, config.steps_per_update or every),
        old=0 if config.uses_recorded or mu == 1 else fresh,
        reference=fresh if config.beta > 0 else 0,
        joint=0 if views[0].share is None else mu - 1 if mu > 1 else int(config.beta > 0),
        copies=decoder.copies,
    )


def dry_run(config: RLConfig) -> str:
    """The resolved configuration, batch arithmetic, forward passes an update and memory of one process, as text.

    The number of processes is that of the launcher (``WORLD_SIZE``). Weights are not read.

    Raises:
        UserError: for what would stop the run before its first update and can be seen without weights.
    """
    world, mu = world_size(), config.num_iterations
    config.check_batch(config.batch_size)
    lm = load_meta(config.model, config.dtype)
    check_precision(lm, config.lora_r)
    tasks = [make_task(spec, lm.task_defaults) for spec in config.tasks]
    rows = problem_rows(lm, tasks, "train", config.problems, config.seed + 1)
    validation = problem_rows(lm, tasks, "validation", config.validation_problems, 0)
    rewards = reward_names([f for f, _ in reward_functions(config.reward, tasks)])
    check_weights(config.reward_weights, rewards)
    texts = [row["prompt"] for row in (*rows, *validation)]
    prompt = lm.encode(texts, config.max_completion_length)[0].shape[1]
    decoder, work = config.rollout_decoder(), work_of(config)
    groups = config.batch_size // config.num_generations * world
    rollouts = math.ceil(config.steps / mu)

    def passes(sequences: int) -> int:
        return math.ceil(sequences * config.batch_size / config.rows_per_forward)

    old, reference, joint = (passes(work.every) * n for n in (work.old, work.reference, work.joint))
    steps, views, copies = work.steps, work.views, work.copies
    need = training_need(
        lm,
        Load(
            lm.model.dtype,
            min(config.rows_per_forward, views * config.batch_size) * copies,
            prompt,
            config.max_completion_length,
            lora=config.lora_r or 0,
            targets=config.lora_target_modules,
            autocast=config.bf16,
            checkpointing=config.gradient_checkpointing,
            reference=config.beta > 0,
            completions=config.batch_size,
            steps=views,
            processes=world,
            cuda=torch.cuda.is_available() or config.dtype != "float32",
        ),
    )
    parts = ", ".join(f"{k} {v / GIB:.2f}" for k, v in dataclasses.asdict(need).items() if v)
    sampling = passes(1) * steps
    all_passes = (sampling + old + reference + joint) / mu + passes(views)
    size = config.rows_per_forward * copies
    lines = [
        as_yaml(dataclasses.asdict(config)).rstrip(),
        "",
        f"model      {lm.name}: {lm.model.config.model_type}, {sum(p.numel() for p in lm.model.parameters()):,} parameters",
        f"rewards    {', '.join(rewards)}",
        f"prompts    {len(rows)}, {rollouts * groups} drawn in the run ({rollouts * groups / len(rows):.2f} epochs); "
        f"{len(validation)} for validation; the longest has {prompt} tokens",
        f"batch      {world} processes × {config.batch_size} completions = {config.batch_size * world} an update: {groups} "
        f"prompts × {config.num_generations}",
        f"updates    {config.steps}, {mu} on each of {rollouts} rollouts",
        f"rollout    {steps} steps for {config.max_completion_length} tokens ({decoder.name}, T = {decoder.temperature:g}): "
        f"NFE {steps * copies} a completion, {sampling} forward passes of up to {size} rows",
        f"scoring    {old} forward passes for the old policy, {reference} for the reference, {joint} for the loss, once a "
        "rollout",
        f"update     {views} views × {config.batch_size} rows: {passes(views)} forward and backward passes of up to {size} "
        "rows",
        f"in all     {all_passes:.1f} forward passes an update and process, {passes(views)} of them with a backward pass",
        f"memory     {need.total / GIB:.2f} GiB a process without sharding ({parts})",
    ]
    return "\n".join(lines)
