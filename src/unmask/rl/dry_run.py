"""``unmask rl CONFIG --dry-run``: what a run would do, from its configuration, data and the model's shape alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch

from unmask.decoding.trajectory import Trajectory
from unmask.io.files import as_yaml
from unmask.io.launcher import world_size
from unmask.models.adapters import check_precision
from unmask.models.load import load_meta
from unmask.models.memory import GIB, Workload, training_memory
from unmask.rl.config import DiffusionGRPOConfig
from unmask.rl.data import rl_data
from unmask.rl.objectives import find_objective


@dataclass(frozen=True)
class Work:
    """What one completion takes in a run, in forward passes of one row.

    Attributes:
        steps: of its sampling. every: views of the objective; views: those that an update scores, with a backward pass.
        old, reference, joint: how often all views are scored once more in a rollout: for the old policy, for the reference, and
            for a loss of all views together.
        copies: rows that a forward pass has for one (guidance: 2). samples: completions sampled for one that is kept, at most.
    """

    steps: int
    every: int
    views: int
    old: int
    reference: int
    joint: int
    copies: int
    samples: int

    @classmethod
    def of(cls, config: DiffusionGRPOConfig, block: int | None = None) -> Work:
        """The work of a run with these settings; views are counted on one row as the decoder's plan commits it.

        ``block``: tokens of a block, for a block-causal model."""
        decoder, objective = config.rollout_decoder().within(block), find_objective(config.objective)
        step = torch.tensor([s for s, n in enumerate(decoder.plan.commits) for _ in range(n)], dtype=torch.int16)[None]
        tokens, prompt = torch.zeros_like(step, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
        row = Trajectory(prompt, prompt > 0, tokens, step, torch.zeros(step.shape), 1, decoder.config()).by_block(block)
        views = objective.all_views(row, torch.zeros(1, dtype=torch.int64), 0, torch.tensor([step.shape[1]]))
        every, mu, penalty = len(views), config.num_iterations, config.beta > 0
        fresh = mu if objective.fresh else 1
        old = 0 if config.uses_recorded or mu == 1 or objective.reads == "policy" else fresh
        joint = mu if penalty or objective.reads != "ratios" else 0
        if config.uses_recorded or old:  # whose scores serve at first
            joint = mu - 1
        return cls(
            decoder.plan.steps,
            every,
            views=min(every, objective.sampled or every),
            old=old,
            reference=fresh * penalty,
            joint=0 if objective.loss is None else joint,
            copies=decoder.copies,
            samples=0 if objective.pairs else 1 + config.max_resamples,
        )

    def passes(self, updates: int, rollouts: int) -> int:
        """Forward passes (NFE) of one completion of every rollout, in all, at most."""
        scored = self.every * (self.old + self.reference + self.joint)
        return self.copies * (rollouts * (self.steps * self.samples + scored) + updates * self.views)


def dry_run(config: DiffusionGRPOConfig) -> str:
    """The resolved configuration, batch arithmetic, forward passes an update and memory of one process, as text.

    The number of processes is that of the launcher (``WORLD_SIZE``). Weights are not read.

    Raises:
        UserError: for what would stop the run before its first update and can be seen without weights.
    """
    config.check_batch()
    lm = load_meta(str(config.model), config.dtype)
    check_precision(lm, config.lora_r)
    data, work = rl_data(lm, config), Work.of(config, lm.block_length)
    decoder = config.rollout_decoder().within(lm.block_length)
    canvas, prompt = config.max_completion_length, data.widest(lm, config.max_completion_length)
    world, mu, batch = world_size(), config.num_iterations, config.per_device_train_batch_size
    groups, rollouts = batch // config.num_generations * world, math.ceil(config.max_steps / mu)
    drawn, size = rollouts * groups, config.rows_per_forward * work.copies
    once, every, update = (math.ceil(n * batch / config.rows_per_forward) for n in (1, work.every, work.views))
    old, reference, joint = (every * n for n in (work.old, work.reference, work.joint))
    need = training_memory(
        lm,
        Workload(
            lm.model.dtype,
            min(config.rows_per_forward, work.views * batch) * work.copies,
            prompt,
            canvas,
            config.lora_r or 0,
            config.lora_target_modules,
            config.bf16,
            config.activation_checkpointing,
            reference=config.beta > 0,
            completions=batch,
            steps=work.views,
            processes=world,
            cuda=torch.cuda.is_available() or config.dtype != "float32",
        ),
    )
    parts = ", ".join(f"{k} {v / GIB:.2f}" for k, v in asdict(need).items() if v)
    sampling = once * work.steps * work.samples
    lines = {
        "model": f"{lm.name}: {lm.model.config.model_type}, {sum(p.numel() for p in lm.model.parameters()):,} parameters",
        "rewards": ", ".join(data.reward_funcs),
        "prompts": f"{len(data.training)}, {drawn} drawn in the run ({drawn / len(data.training):.2f} epochs); "
        f"{len(data.validation)} for validation; the longest has {prompt} tokens",
        "batch": f"{world} processes × {batch} completions = {batch * world} an update: {groups} prompts × "
        f"{config.num_generations}",
        "updates": f"{config.max_steps}, {mu} on each of {rollouts} rollouts",
        "rollout": f"{work.steps} steps for {canvas} tokens ({decoder.name}, T = {decoder.temperature:g}): NFE "
        f"{work.steps * work.copies} a completion, {once * work.steps} forward passes of up to {size} rows"
        + f", up to {work.samples} times where groups lack variance"
        * (work.samples > 1),
        "scoring": f"{old} forward passes for the old policy, {reference} for the reference, {joint} for the loss, once a "
        "rollout",
        "update": f"{work.views} views × {batch} rows: {update} forward and backward passes of up to {size} rows",
        "in all": f"{(sampling + old + reference + joint) / mu + update:.1f} forward passes an update and process, "
        f"{update} of them with a backward pass" + ", at most" * (work.samples > 1),
        "memory": f"{need.total / GIB:.2f} GiB a process without sharding ({parts})",
    }
    if not work.samples:
        del lines["rollout"], lines["rewards"]
    return f"{as_yaml(asdict(config))}\n" + "\n".join(f"{k:<11}{v}" for k, v in lines.items())
