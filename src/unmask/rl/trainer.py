"""DiffusionGRPOTrainer: rollouts with any decoder, the loss of any objective's views, one backward a pass."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState

from unmask.decoding.trajectory import Trajectory
from unmask.errors import UserError
from unmask.models.masked_lm import MaskedLM
from unmask.rl import objectives
from unmask.rl.config import DiffusionGRPOConfig
from unmask.rl.data import rl_data
from unmask.rl.objectives import View, ViewRows
from unmask.rl.rewards import Rewards, Row
from unmask.rl.rollout import Rollout, replacement_prompts, rollout_seeds, score_all, score_rows
from unmask.rl.trajectory_trainer import Microbatch, TrajectoryTrainer, trajectory_arguments
from unmask.tasks import Task
from unmask.tasks.base import Reward
from unmask.training.trainer import Model, prepare_model

UPDATE_METRICS = ("logprob_mismatch", "kl", "clip_fraction", "entropy", "ratio")
"""Means over the scored tokens of an update."""


class DiffusionGRPOTrainer(TrajectoryTrainer):
    """GRPO for masked diffusion language models; objective and decoder are chosen independently of each other.

    Args:
        model: a MaskedLM, a name or path that ``load`` takes, or a PreTrainedModel with ``processing_class``.
        reward_funcs: a Task or several, whose problems are the prompts and whose own rewards are paid; or reward functions
            ``f(prompts, completions, **columns) -> list[float | None]`` (TRL's signature), or their names.
        train_dataset: a Task or several, or rows with ``prompt`` (text, or messages for the chat template), whose other columns
            go to the reward functions. Without it and without reward_funcs, ``args`` names both.
        eval_dataset: rows like these; by default the tasks' validation problems. Rows with ``problem`` and ``task`` are graded.
        peft_config: train this adapter (by default that of ``args.lora_r``); the reference policy is the model without it.
            Dropout is refused.
    """

    config: DiffusionGRPOConfig

    def __init__(
        self,
        model: Model,
        reward_funcs: Task | Reward | str | Sequence[Task | Reward | str] | None,
        args: DiffusionGRPOConfig,
        train_dataset: Task | Sequence[Task] | Sequence[Mapping[str, Any]] | None = None,
        eval_dataset: Sequence[Mapping[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        args.check_batch()
        arguments = trajectory_arguments(args)
        lm = prepare_model(model, args, processing_class, peft_config)
        self.config = replace(args, model=lm.name)
        with arguments.main_process_first():  # one process fetches a data set, the others find it
            data = rl_data(lm, args, reward_funcs, train_dataset, eval_dataset)
        self.objective: objectives.Objective = objectives.find_objective(args.objective)
        self.prompts = arguments.per_device_train_batch_size // args.num_generations
        self.repeats = args.num_iterations
        super().__init__(lm, arguments, data, callbacks)
        if self.is_fsdp_enabled and args.max_resamples:
            raise UserError("max_resamples makes ranks sample unequally often, which FSDP cannot follow: use DDP")
        self.reference_model: Any = None
        if args.beta > 0 and args.lora_r is None and peft_config is None:
            self.reference_model = copy.deepcopy(lm.model).eval().requires_grad_(False).to(arguments.device)
            if args.compile:
                self.reference_model.base_model.compile()  # a copy is not compiled
            if self.is_fsdp_enabled:
                fsdp2_prepare_model(self.accelerator, self.reference_model)  # in place
        self.rollout: Rollout | None = None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Sample (at the first inner iteration), then accumulate the gradient of one update. Returns the loss."""
        iteration, start = self.state.global_step % self.config.num_iterations, time.perf_counter()
        if iteration == 0:
            self.rollout = self.sample(inputs)
        assert self.rollout is not None
        sampled = time.perf_counter()
        loss = self.update(model, self.rollout, iteration)
        self.pending_metrics |= {"seconds_rollout": sampled - start, "seconds_update": time.perf_counter() - sampled}
        return loss

    def sample(self, rows: list[Row]) -> Rollout:
        """Expand prompts to groups, decode, reward, and score under the old and the reference policy where needed."""
        config = self.config
        if config.pairs is not None:
            return self._with_reference(self._pairs(rows))
        rows, trajectory, rewards, view_seeds = self._sample_groups(rows, 0)
        self._record_rollout(trajectory, rewards)
        if config.max_resamples:
            rows, trajectory, rewards = self._replace_groups(rows, trajectory, rewards)
        advantages, active = self._advantages(rewards, trajectory), self._varied(rewards)
        if config.log_completions:
            texts, means = self.lm.text(trajectory.tokens), advantages.view(len(rows), -1).mean(1)
            columns = (rows, texts, rewards.total(self.reward_weights).tolist(), means.tolist())
            self.completions = [
                {"prompt": row["prompt"], "completion": text, "reward": r, "advantage": a}
                for row, text, r, a in list(zip(*columns, strict=True))[: config.num_generations]
            ]
        rollout = Rollout(trajectory, *(x.to(trajectory.tokens.device) for x in (advantages, active, view_seeds)))
        if config.uses_recorded and self.objective.loss is None:
            rollout.old = trajectory.logprob[None]
        elif config.uses_recorded:
            rollout.old = torch.stack([v.scored * trajectory.logprob for v in self.views(rollout, 0)])[None]
        elif config.num_iterations > 1 and self.objective.reads != "policy":
            with self.inference() as policy:
                rollout.old = self.score_views(policy, rollout)
        return self._with_reference(rollout)

    def _pairs(self, rows: list[Row]) -> Rollout:
        """Both completions of each row, the preferred one first, as if sampled in one step."""
        length, device = self.decoder.plan.length, self.lm.device
        texts = [row[side] for row in rows for side in ("chosen", "rejected")]
        prompts = [row["prompt"] for row in rows for _ in range(2)]
        ids, mask = self.lm.encode(prompts, length, self.widest)
        tokens = torch.tensor([text + [self.lm.eos_id] * (length - len(text)) for text in texts], device=device)
        step = torch.zeros_like(tokens, dtype=torch.int16)
        trajectory = Trajectory(ids, mask, tokens, step, step.float(), self.lm.mask_id, self.decoder.config())
        _, seeds = rollout_seeds(
            self.config.seed, self.state.global_step, self.args.process_index * self.args.train_batch_size, len(tokens)
        )
        advantages = torch.tensor([0.5, -0.5], device=device).repeat(len(rows))
        return Rollout(trajectory, advantages, advantages != 0, seeds.to(device))

    def _with_reference(self, rollout: Rollout) -> Rollout:
        """Scored under the starting policy too, where the loss asks for it."""
        config = self.config
        if config.beta > 0 and self.reference_model is None:
            with self.inference() as policy, cast(Any, policy.model).disable_adapter():
                rollout.reference = self.score_views(policy, rollout)
        elif config.beta > 0:
            with torch.no_grad(), self.autocast():  # the policy's own forward has it from accelerate
                rollout.reference = self.score_views(replace(self.lm, model=self.reference_model), rollout)
        return rollout

    def _varied(self, rewards: Rewards) -> Tensor:
        """Which rows are in a group whose rewards are not all equal, or whose steps are not all paid alike, (B,) bool."""
        size = self.config.num_generations
        whole, paid = rewards.split(self.reward_weights)
        varied = objectives.has_reward_variance(whole, size)
        if paid is not None:
            advantages = objectives.step_advantages(paid, size, "none")
            varied |= (advantages != 0).view(-1, size * paid.shape[1]).any(1).repeat_interleave(size)
        return varied

    def _advantages(self, rewards: Rewards, trajectory: Trajectory) -> Tensor:
        """(B,), or where steps are paid for, (B, L): of each token that of its step, beside that of the completion."""
        size, scale = self.config.num_generations, self.config.scale_rewards
        whole, paid = rewards.split(self.reward_weights)
        advantages = objectives.group_advantages(whole, size, scale)
        if paid is None:
            return advantages
        if self.objective.loss is not None:
            raise UserError(
                f"objective {self.config.objective} has one advantage a completion, and a reward function pays for steps: use "
                "another function, or cj"
            )
        step = trajectory.step.long().clamp(min=0).cpu()
        return advantages[:, None] + objectives.step_advantages(paid, size, scale).gather(1, step)

    def _sample_groups(self, prompts: list[Row], attempt: int) -> tuple[list[Row], Trajectory, Rewards, Tensor]:
        """A group for each of the prompts: its rows, trajectory, rewards, and seeds of the views."""
        rows = [row for row in prompts for _ in range(self.config.num_generations)]
        number = self.state.global_step // self.config.num_iterations
        place = attempt * self.args.world_size + self.args.process_index
        seeds, view_seeds = rollout_seeds(self.config.seed, number, place * self.args.train_batch_size, len(rows))
        trajectory = self._decode(rows, self.decoder, seeds)
        return rows, trajectory, self._score(rows, trajectory, self.lm.text(trajectory.tokens)), view_seeds

    def _replace_groups(
        self, rows: list[Row], trajectory: Trajectory, rewards: Rewards
    ) -> tuple[list[Row], Trajectory, Rewards]:
        """The batch with groups of other prompts, whose rewards differ, in place of groups whose rewards are all equal.

        Whole forward passes are sampled, so that a compiled model sees one shape.
        """
        size, data = self.config.num_generations, cast(Any, self.train_dataset)
        number, sampled, replaced = self.state.global_step // self.config.num_iterations, len(rows), 0

        def varied(rewards: Rewards) -> Tensor:
            """Which groups have rewards that differ, (groups,) bool."""
            return self._varied(rewards).view(-1, size)[:, 0]

        for attempt in range(1, self.config.max_resamples + 1):
            equal = (~varied(rewards)).nonzero()[:, 0]
            if not len(equal):
                break
            passes = -(-len(equal) * size // self.config.rows_per_forward)
            count = min(max(passes * self.config.rows_per_forward // size, 1), self.prompts)
            place = attempt * self.args.world_size + self.args.process_index
            prompts = [data[i] for i in replacement_prompts(len(data), count, self.config.seed, number, place)]
            more, more_trajectory, more_rewards, _ = self._sample_groups(prompts, attempt)
            differ = varied(more_rewards).nonzero()[:, 0]
            equal, differ = equal[: len(differ)], differ[: len(equal)]
            index = torch.arange(len(rows)).view(-1, size)
            index[equal] = len(rows) + differ[:, None] * size + torch.arange(size)
            every, sampled, replaced = [*rows, *more], sampled + len(more), replaced + len(equal)
            rows = [every[i] for i in index.flatten().tolist()]
            trajectory = Trajectory.cat([trajectory, more_trajectory]).take(index.flatten())
            rewards = Rewards.cat([rewards, more_rewards]).take(index.flatten())
        shares = self._mean([sampled / len(rows), replaced * size / len(rows)])
        self.pending_metrics |= dict(zip(("samples_per_completion", "groups_replaced"), shares, strict=True))
        return rows, trajectory, rewards

    def views(self, rollout: Rollout, iteration: int) -> list[View]:
        """The objective's views, without what the loss leaves out."""
        trajectory = rollout.trajectory.by_block(self.lm.block_length)
        counted = self._counted(trajectory)
        views = self.objective.all_views(trajectory, rollout.seeds, iteration, counted.sum(1))
        views = [replace(v, scored=v.scored & counted) for v in views]
        if self.objective.loss is None and (
            any(v.share is not None for v in views) or (torch.stack([v.scored for v in views]).sum(0) > 1).any()
        ):
            raise UserError(
                f"objective {self.config.objective} scores a token in several views: make it an Objective with a loss of them, "
                "such as sum_of_views"
            )
        return views

    def _counted(self, trajectory: Trajectory) -> Tensor:
        """Which tokens the loss does not leave out, (B, L) bool."""
        if not (self.config.mask_after_eos or self.objective.to_the_end):
            return torch.ones_like(trajectory.tokens, dtype=torch.bool)
        place = torch.arange(trajectory.tokens.shape[1], device=trajectory.tokens.device)
        return place <= self.lm.lengths(trajectory.tokens)[:, None]

    def score_views(self, policy: MaskedLM, rollout: Rollout) -> Tensor:
        """Log-probabilities of the recorded tokens as ``Rollout`` keeps them; 0 in rows that are not active."""
        found = []
        for iteration in range(self.config.num_iterations if self.objective.fresh else 1):
            rows = ViewRows.of(self.views(rollout, iteration))
            each = score_all(policy, rollout.trajectory, rows, self.microbatches(rows, rollout.active), self.widest)
            found.append(each.sum(0) if self.objective.loss is None else each)  # without, each token is in one view
        return torch.stack(found)

    def _token_losses(self, rollout: Rollout, iteration: int, new: Tensor, row: Tensor, column: Tensor) -> Any:
        """``surrogate`` of the tokens at (row, column), all (N,)."""
        stored = iteration if self.objective.fresh else 0
        old = new.detach() if rollout.old is None else rollout.old[stored][row, column]
        reference = None if rollout.reference is None else rollout.reference[stored][row, column]
        settings = (self.config.epsilon, self.config.beta)
        return objectives.surrogate(new, old, reference, rollout.advantage(row, column), *settings)

    def _joint_gradient(
        self, rollout: Rollout, iteration: int, views: list[View], microbatches: list[Microbatch]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of a loss of all views together: this rank's, its gradient with respect to the log-probabilities (V, B, L), the
        ratio's logarithm and KL, (B, L) each.

        Two passes are exact with the memory of one view: the log-probabilities without gradient, then (in ``update``) a
        backward pass of gradient · log-probability for each forward pass.
        """
        assert self.objective.loss is not None
        stored, scored = iteration if self.objective.fresh else 0, torch.stack([v.scored for v in views])
        active = rollout.active.nonzero()[:, 0]  # numbers: the host waits once, not at every use of a mask
        new = torch.zeros_like(scored, dtype=torch.float32)  # any value serves where the ratio is 1 and there is no KL
        if rollout.old is not None and iteration == 0:
            new = rollout.old[0]
        elif rollout.old is not None or rollout.reference is not None or self.objective.reads != "ratios":
            with self.inference() as policy:
                new = score_all(policy, rollout.trajectory, ViewRows.of(views), microbatches, self.widest)
        leaf, counted = new[:, active].requires_grad_(), self._counted(rollout.trajectory)
        ones = torch.ones(len(rollout.active), device=active.device)
        share = torch.stack([ones if v.share is None else v.share for v in views])
        scores = objectives.Scores(
            leaf,
            leaf.detach() if rollout.old is None else rollout.old[stored][:, active],
            None if rollout.reference is None else rollout.reference[stored][:, active],
            scored[:, active],
            share[:, active],
            rollout.advantages[active],
            counted.sum(1)[active],
            objectives.token_weights([counted], self.config.loss_type)[0][active],
            self.config.epsilon,
            self.config.beta,
        )
        losses, *values = self.objective.loss(scores)
        loss = losses.sum() / len(rollout.active)
        gradient = torch.zeros_like(new)
        if len(active):
            gradient[:, active] = torch.autograd.grad(loss, leaf)[0]
        log_ratio, kl = (torch.zeros_like(new[0]) for _ in values)
        for whole, value in zip((log_ratio, kl), values, strict=True):
            whole[active] = value.detach().to(whole).expand_as(whole[active])
        return loss.detach(), gradient, log_ratio, kl

    def update(self, model: Any, rollout: Rollout, iteration: int) -> Tensor:
        """Accumulate the gradient of one inner iteration, one backward a forward pass; returns this rank's loss."""
        config, trajectory = self.config, rollout.trajectory
        views = self.views(rollout, iteration)
        if self.objective.sampled is not None:
            views = objectives.sample_views(views, self.objective.sampled, rollout.seeds, iteration)
        weights = torch.cat(objectives.token_weights([v.scored for v in views], config.loss_type))
        table = ViewRows.of(views)
        microbatches = self.microbatches(table, rollout.active)
        total = torch.zeros((), device=trajectory.tokens.device)
        if self.objective.loss is not None:
            total, gradient, *joint = self._joint_gradient(rollout, iteration, views, microbatches)
        sums = torch.zeros(1 + len(UPDATE_METRICS), dtype=torch.float64, device=total.device)
        policy = replace(self.lm, model=model)
        for part, counted in self.forward_passes(model, microbatches):
            rows = table.take(part)
            new, entropy, at, row, column = score_rows(policy, trajectory, rows, widest=self.widest)
            if self.objective.loss is not None:
                log_ratio, kl = (x[row, column] for x in joint)
                loss = counted * (gradient[rows.view[at], row, column] * new).sum()
            else:
                losses, log_ratio, kl = self._token_losses(rollout, iteration, new, row, column)
                loss = (weights[part][at, column] * counted / len(rollout.active) * losses).sum()
                total = total + loss.detach()
            self.accelerator.backward(loss)
            with torch.no_grad():
                ratio, mismatch = log_ratio.exp().double(), (new - trajectory.logprob[row, column]).abs()
                raised = rollout.advantage(row, column) > 0
                clipped = torch.where(raised, ratio > 1 + config.epsilon, ratio < 1 - config.epsilon)
                values = (torch.ones_like(ratio), mismatch, kl, clipped, entropy, ratio)
                sums += counted * torch.stack([v.double().sum() for v in values])
        self._record_update(total, sums, iteration)
        if config.pairs is not None:
            gained = joint[0][:, 0].view(-1, 2)
            self.pending_metrics["preferred"] = self._mean([float((gained[:, 0] > gained[:, 1]).double().mean())])[0]
        return total

    # ---- logging ---------------------------------------------------------------------------------------------------

    def _record_rollout(self, trajectory: Trajectory, paid: Rewards) -> None:
        table, rewards, active = paid.table, paid.total(self.reward_weights), self._varied(paid)
        lengths = self.lm.lengths(trajectory.tokens).double()  # before the first end token
        values = {
            "reward": rewards.mean(),
            "reward_std": rewards.view(-1, self.config.num_generations).std(1).mean(),
            "groups_without_variance": (~active).double().mean(),
            "length": lengths.mean(),
            "without_end": (lengths == trajectory.tokens.shape[1]).double().mean(),
            "nfe": trajectory.nfe.double().mean(),
        }
        self.pending_metrics.update(zip(values, self._mean([float(v) for v in values.values()]), strict=True))
        totals, counts = (self._mean(x.sum(0)) for x in (table.nan_to_num(), (~table.isnan()).float()))
        judged = zip(self.reward_funcs, totals, counts, strict=True)
        self.pending_metrics |= {f"reward_{name}": total / count for name, total, count in judged if count}

    def _record_update(self, loss: Tensor, sums: Tensor, iteration: int) -> None:
        self.check_finite(loss)
        tokens, *totals = self._mean(sums)
        if not tokens:  # no group had variance
            return
        found = {name: total / tokens for name, total in zip(UPDATE_METRICS, totals, strict=True)}
        mismatch = found.pop("logprob_mismatch")
        if iteration == 0 and self.config.pairs is None:
            self.pending_metrics["logprob_mismatch"] = mismatch
            rounded = self.args.bf16 or self.args.fp16 or self.lm.model.dtype != torch.float32
            exact = self.objective.recorded and not rounded
            if exact and mismatch > self.config.max_logprob_mismatch:
                raise UserError(
                    f"the update does not see the policy that sampled: recorded and recomputed log-probabilities differ by "
                    f"{mismatch:.2g} nats a token, more than max_logprob_mismatch={self.config.max_logprob_mismatch:g}: switch "
                    "dropout off, or raise it"
                )
        compares = self.objective.reads != "policy" and self.config.pairs is None
        for name in ("ratio", "clip_fraction", "kl"):
            if not compares or (name == "kl" and self.config.beta == 0):
                del found[name]
        self.pending_metrics.update(found)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Between inner iterations the rollout belongs to the checkpoint."""
        if self.rollout is not None and self.state.global_step % self.config.num_iterations:
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            self.rollout.save(folder, self.args.process_index)
        super()._save_checkpoint(model, trial)

    def restore(self, checkpoint: Path) -> None:
        step = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step
        if step % self.config.num_iterations:
            self.rollout = Rollout.load(checkpoint, self.args.process_index, self.args.device)
