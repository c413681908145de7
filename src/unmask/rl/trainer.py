"""DiffusionGRPOTrainer: rollouts with any decoder, one clipped surrogate over an objective's views, one backward a pass."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from unmask.decoding.trajectory import Trajectory
from unmask.errors import UserError
from unmask.models.adapters import add_adapter
from unmask.models.load import as_masked_lm
from unmask.models.masked_lm import MaskedLM
from unmask.rl.advantages import group_advantages, has_reward_variance
from unmask.rl.arguments import DiffusionGRPOConfig
from unmask.rl.metrics import ROLLOUT, UPDATE, rollout_values, update_sums, validation_sums
from unmask.rl.objectives import (
    OBJECTIVES,
    Objective,
    View,
    ViewRows,
    clipped_surrogate,
    k3,
    sample_views,
    token_weights,
)
from unmask.rl.rewards import Row, check_weights, reward_names, score
from unmask.rl.rollout import Rollout, RolloutSampler, prompt_rows, row_seeds, sample_trajectory, score_all, score_rows
from unmask.tasks.base import Reward
from unmask.training.resume import ResumableTrainer, reading


class DiffusionGRPOTrainer(ResumableTrainer):
    """GRPO for masked diffusion language models; objective and decoder are chosen independently of each other.

    Args:
        model: a MaskedLM, a name or path that ``load`` takes, or a PreTrainedModel with ``processing_class``.
        reward_funcs: functions ``f(prompts, completions, **columns) -> list[float | None]`` (TRL's signature).
        args: a DiffusionGRPOConfig.
        train_dataset, eval_dataset: sequences of rows with ``prompt`` (text, or messages for the chat template); other
            columns go to the reward functions. Rows with ``problem`` and ``task`` are also graded in validation.
        processing_class: the tokenizer, where ``model`` is a PreTrainedModel.
        peft_config: train this adapter instead of all weights; the reference policy is the model without it.
        callbacks: further TrainerCallbacks.

    Raises:
        UserError: for a data set without rows or prompts, no reward function, a wrong number of weights, or dropout in the
            adapter (the policy that is optimised must be the one that sampled).
    """

    args: DiffusionGRPOConfig

    def __init__(
        self,
        model: MaskedLM | PreTrainedModel | str,
        reward_funcs: Reward | Sequence[Reward],
        args: DiffusionGRPOConfig,
        train_dataset: Sequence[Row],
        eval_dataset: Sequence[Row] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.reward_funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
        weights = args.reward_weights or [1.0] * len(self.reward_funcs)
        if not self.reward_funcs:
            raise UserError("no reward function: give at least one")
        self.reward_names = reward_names(self.reward_funcs)
        check_weights(weights, self.reward_names)
        self.reward_weights = torch.tensor(weights)
        self.lm = as_masked_lm(model, processing_class)
        self.decoder = args.rollout_decoder()
        self.objective: Objective = OBJECTIVES[args.objective]
        train_dataset = prompt_rows(self.lm, train_dataset, "train")
        if eval_dataset is not None:
            eval_dataset = prompt_rows(self.lm, eval_dataset, "validation")
        prompts = [row["prompt"] for row in (*train_dataset, *(eval_dataset or ()))]
        widest = self.lm.encode(prompts, args.max_completion_length)[0].shape[1]  # refuses what does not fit
        self.prompt_width = widest if args.compile else 0
        if args.compile:
            self.lm.model.base_model.compile()
        if peft_config is not None:
            if getattr(peft_config, "lora_dropout", 0):
                raise UserError(
                    f"lora_dropout is {peft_config.lora_dropout}: set it to 0, or the policy that is optimised is not the one "
                    "that sampled"
                )
            self.lm = add_adapter(self.lm, peft_config, args.seed)
        # Trainer's own validation wants data sets of tensors; rows of text and problems go through ours.
        super().__init__(
            model=self.lm.model,
            args=args,
            data_collator=list,  # type: ignore[arg-type]
            train_dataset=train_dataset,  # type: ignore[arg-type]
            eval_dataset=eval_dataset,  # type: ignore[arg-type]
            processing_class=self.lm.tokenizer,
            callbacks=callbacks,
        )
        if self.is_fsdp_enabled and self.decoder.threshold is not None:
            raise UserError(
                "a threshold decoder takes other numbers of steps on every rank, which FSDP cannot follow: use DDP"
            )
        self.reference_model: Any = None
        if args.beta > 0 and peft_config is None:
            self.reference_model = copy.deepcopy(self.lm.model).eval().requires_grad_(False).to(args.device)
            if args.compile:
                self.reference_model.base_model.compile()  # a copy is not compiled
        self.rollout: Rollout | None = None
        self._pending_metrics: dict[str, float] = {}  # joins the next log line
        self.completions: list[dict[str, Any]] = []  # of the newest rollout's first group

    # ---- data ------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[list[Row]]:
        """One batch of prompts an update. Every rank cuts its own share, so the loader is not prepared by accelerate."""
        args = self.args
        sampler = RolloutSampler(
            len(self.train_dataset),  # type: ignore[arg-type]
            args.per_device_train_batch_size // args.num_generations,
            args.num_iterations,
            args.max_steps,
            args.seed,
            args.process_index,
            args.world_size,
        )
        return DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=list)  # type: ignore[arg-type]

    # ---- one update ------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Sample (at the first inner iteration), then accumulate the gradient of one update. Returns the loss."""
        iteration = self.state.global_step % self.args.num_iterations
        start = time.perf_counter()
        if iteration == 0:
            self.rollout = self.sample(inputs)
        assert self.rollout is not None
        sampled = time.perf_counter()
        loss = self.update(model, self.rollout, iteration)
        self._pending_metrics["seconds_rollout"] = sampled - start
        self._pending_metrics["seconds_update"] = time.perf_counter() - sampled
        return loss

    @contextmanager
    def inference(self) -> Iterator[MaskedLM]:
        """The policy for sampling and scoring: eval mode, no gradient, no wrapper of the training engine."""
        model: Any = self.model_wrapped
        if not self.is_fsdp_enabled:
            model = self.accelerator.unwrap_model(model)
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                yield replace(self.lm, model=model)
        finally:
            model.train(training)

    def sample(self, rows: list[Row]) -> Rollout:
        """Expand prompts to groups, decode, reward, and score under the old and the reference policy where needed."""
        args = self.args
        rows = [row for row in rows for _ in range(args.num_generations)]
        number = self.state.global_step // args.num_iterations
        seeds, view_seeds = row_seeds(args.seed, number, args.process_index * len(rows), len(rows))
        with self.inference() as policy:
            trajectory = sample_trajectory(
                policy, [row["prompt"] for row in rows], self.decoder, seeds, args.rows_per_forward, self.prompt_width
            )
        texts = self.lm.text(trajectory.tokens)
        table = score(self.reward_funcs, rows, texts)
        rewards = (table * self.reward_weights).nansum(1)
        advantages = group_advantages(rewards, args.num_generations, args.scale_rewards)
        self._record_rollout(rows, texts, trajectory, table, rewards, advantages)
        device = trajectory.tokens.device
        active = has_reward_variance(rewards, args.num_generations).to(device)
        rollout = Rollout(trajectory, advantages.to(device), active, view_seeds.to(device))
        if args.uses_recorded:
            rollout.old = trajectory.logprob[None]
        elif args.num_iterations > 1:
            with self.inference() as policy:
                rollout.old = self._score_views(policy, rollout, active)
        if args.beta > 0:
            with self.inference() as policy, self._reference(policy) as reference:
                rollout.reference = self._score_views(reference, rollout, active)
        return rollout

    @contextmanager
    def _reference(self, policy: MaskedLM) -> Iterator[MaskedLM]:
        if self.reference_model is not None:
            with self.accelerator.autocast():  # the policy's own forward has it from accelerate
                yield replace(policy, model=self.reference_model)
        else:
            model: Any = policy.model
            with model.disable_adapter():
                yield policy

    def _views(self, rollout: Rollout, iteration: int) -> list[View]:
        """The objective's views, without what the loss leaves out."""
        trajectory = rollout.trajectory
        views = list(self.objective.views(trajectory, rollout.seeds, iteration))
        if self.args.mask_after_eos:
            length = trajectory.tokens.shape[1]
            inside = (
                torch.arange(length, device=trajectory.tokens.device) <= self.lm.lengths(trajectory.tokens)[:, None]
            )
            views = [replace(v, scored=v.scored & inside) for v in views]
        return views

    def _score_views(self, policy: MaskedLM, rollout: Rollout, active: Tensor) -> Tensor:
        """Log-probabilities of the recorded tokens in all views, (iterations, B, L); 0 in rows that are not ``active`` (B,)."""
        found = []
        for i in range(self.args.num_iterations if self.objective.fresh else 1):
            rows = ViewRows.of(self._views(rollout, i))
            found.append(score_all(policy, rollout.trajectory, rows, self._jobs(rows, active)))
        return torch.stack(found)

    def _jobs(self, rows: ViewRows, active: Tensor) -> list[tuple[Tensor, bool]]:
        """(indexes of view rows, whether they count), each one forward pass.

        Every rank gets the same number, so that collectives meet; where one has less to do, the rest does not count.
        """
        jobs = [(part, True) for part in rows.parts(self.args.rows_per_forward, active)]
        count = torch.tensor([len(jobs)], device=self.accelerator.device)
        most = int(self.accelerator.gather(count).max()) if self.args.world_size > 1 else len(jobs)
        idle = (torch.zeros(1, dtype=torch.int64, device=active.device), False)
        return jobs + [idle] * (max(most, 1) - len(jobs))

    def _token_losses(
        self, rollout: Rollout, iteration: int, new: Tensor, row: Tensor, column: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the tokens at (row, column), all (N,): surrogate plus KL penalty, the ratio's logarithm, KL."""
        stored = iteration if self.objective.fresh else 0
        old = new.detach() if rollout.old is None else rollout.old[stored][row, column]
        loss = clipped_surrogate(new, old, rollout.advantages[row], self.args.epsilon)
        kl = torch.zeros_like(new)
        if rollout.reference is not None:
            kl = k3(new, rollout.reference[stored][row, column])
            loss = loss + self.args.beta * kl
        return loss, new - old, kl

    def _joint_gradient(
        self, rollout: Rollout, iteration: int, views: list[View], jobs: list[tuple[Tensor, bool]]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss of log-probabilities that are sums over views, and what it takes from each of them.

        Two passes are exact with the memory of one view: the sums without gradient, then (in ``update``) a backward pass of
        gradient · log-probability for each job.

        Returns:
            This rank's loss, its gradient with respect to the sums, the ratio's logarithm and KL, the last three (B, L).
        """
        scored = torch.stack([v.scored for v in views]).any(0)
        row, column = (scored & rollout.active[:, None]).nonzero(as_tuple=True)
        new = torch.zeros_like(rollout.trajectory.logprob)  # any value serves where the ratio is 1 and there is no KL
        if rollout.old is not None and iteration == 0:
            new = rollout.old[0]
        elif rollout.old is not None or rollout.reference is not None:
            with self.inference() as policy:
                new = score_all(policy, rollout.trajectory, ViewRows.of(views), jobs)
        leaf = new[row, column].requires_grad_()
        weight = token_weights([scored], self.args.normalisation)[0][row, column] / len(rollout.active)
        losses, *values = self._token_losses(rollout, iteration, leaf, row, column)
        loss = (weight * losses).sum()
        found = (torch.autograd.grad(loss, leaf)[0] if len(leaf) else leaf, *values)
        gradient, log_ratio, kl = (torch.zeros_like(new).index_put((row, column), v.detach().to(new)) for v in found)
        return loss.detach(), gradient, log_ratio, kl

    def update(self, model: Any, rollout: Rollout, iteration: int) -> Tensor:
        """Accumulate the gradient of one inner iteration, one backward a forward pass; returns this rank's loss."""
        args, trajectory = self.args, rollout.trajectory
        views = self._views(rollout, iteration)
        if args.steps_per_update is not None:
            views = sample_views(
                views, trajectory.logprob, args.steps_per_update, args.step_sampling, rollout.seeds, iteration
            )
        weights = torch.cat(token_weights([v.scored for v in views], args.normalisation))
        table = ViewRows.of(views)
        jobs = self._jobs(table, rollout.active)
        total = torch.zeros((), device=trajectory.tokens.device)
        if table.share is not None:
            total, *joint = self._joint_gradient(rollout, iteration, views, jobs)
        sums = torch.zeros(len(UPDATE), dtype=torch.float64, device=total.device)
        model.train()  # activation checkpointing asks for it; there is no dropout
        policy = replace(self.lm, model=model)
        for number, (part, counted) in enumerate(jobs):
            last = number == len(jobs) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)  # DeepSpeed reads it in backward
            with nullcontext() if last else self.accelerator.no_sync(model), self.compute_loss_context_manager():
                rows = table.take(part)
                new, entropy, row, column = score_rows(policy, trajectory, rows)
                if table.share is not None:
                    gradient, log_ratio, kl = (x[row, column] for x in joint)
                    loss = counted * (gradient * rows.share_of(new)).sum()
                else:
                    losses, log_ratio, kl = self._token_losses(rollout, iteration, new, row, column)
                    loss = (weights[part][rows.scored] * counted / len(rollout.active) * losses).sum()
                    total = total + loss.detach()
                self.accelerator.backward(loss)
            gap = new - trajectory.logprob[row, column]
            advantages = rollout.advantages[row]
            sums += counted * update_sums(gap, log_ratio, kl, entropy, advantages, args.epsilon)
        self._record_update(total, sums, iteration)
        return total

    # ---- what is told ----------------------------------------------------------------------------------------------

    def _mean(self, values: Sequence[float] | Tensor) -> list[float]:
        """The mean of each value over the ranks."""
        tensor = torch.as_tensor(values, dtype=torch.float64, device=self.accelerator.device)
        if self.args.world_size > 1:
            tensor = self.accelerator.reduce(tensor, "mean")
        return tensor.tolist()

    def _record_rollout(
        self,
        rows: list[Row],
        texts: list[str],
        trajectory: Trajectory,
        table: Tensor,
        rewards: Tensor,
        advantages: Tensor,
    ) -> None:
        values = rollout_values(self.lm, trajectory, rewards, self.args.num_generations)
        judged = torch.stack([table.nan_to_num().sum(0), (~table.isnan()).sum(0).float()])
        means = self._mean([*values, *judged.flatten().tolist()])
        self._pending_metrics.update(zip(ROLLOUT, means, strict=False))
        totals, counts = torch.tensor(means[len(ROLLOUT) :]).view(2, -1).tolist()
        for name, total, count in zip(self.reward_names, totals, counts, strict=True):
            if count:
                self._pending_metrics[f"reward_{name}"] = total / count
        self.completions = [
            {"prompt": row["prompt"], "completion": text, "reward": float(r), "advantage": float(a)}
            for row, text, r, a in zip(rows, texts, rewards, advantages, strict=True)
        ][: self.args.num_generations]

    def _record_update(self, loss: Tensor, sums: Tensor, iteration: int) -> None:
        finite, *means = self._mean([float(loss.isfinite()), *sums.tolist()])
        if finite < 1:
            raise UserError("the loss is not finite: lower learning_rate or check the checkpoint's weights")
        found = dict(zip(UPDATE, means, strict=True))
        tokens = found.pop("tokens")
        if not tokens:  # no group had variance
            return
        found = {k: v / tokens for k, v in found.items()}
        gap = found.pop("replay_gap")
        if iteration == 0:
            self._pending_metrics["replay_gap"] = gap
            rounded = self.args.bf16 or self.args.fp16 or self.lm.model.dtype != torch.float32
            exact = self.objective.recorded and not rounded
            if exact and gap > self.args.max_replay_gap:
                raise UserError(
                    f"the update does not see the policy that sampled: recorded and recomputed log-probabilities differ "
                    f"by {gap:.2g} nats a token (at most {self.args.max_replay_gap:g}); switch dropout off, or raise "
                    "max_replay_gap"
                )
        if self.args.beta == 0:
            del found["kl"]
        self._pending_metrics.update(found)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what rollout and update found to Trainer's line."""
        if "loss" in logs:
            logs.update(self._pending_metrics)
            self._pending_metrics = {}
        super().log(logs, start_time)

    # ---- validation ------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Greedy decoding of the validation rows under the run's decoder: mean reward, and accuracy for rows of tasks."""
        rows: list[Row] = list(self.eval_dataset if eval_dataset is None else eval_dataset)  # type: ignore[arg-type]
        world = self.args.world_size
        # As many rows on every rank, so that FSDP's collectives meet; what is beyond the end is decoded but not counted.
        share = [i * world + self.args.process_index for i in range(-(-len(rows) // world))]
        counted = sum(i < len(rows) for i in share)
        mine = [rows[i % len(rows)] for i in share]
        seeds, _ = row_seeds(self.args.seed, 0, 0, len(rows))
        with self.inference() as policy:
            trajectory = sample_trajectory(
                policy,
                [row["prompt"] for row in mine],
                self.decoder.replace(temperature=0.0),
                seeds[torch.tensor(share) % len(rows)],
                self.args.rows_per_forward,
                self.prompt_width,
            )
        texts = self.lm.text(trajectory.tokens)
        rewards = (score(self.reward_funcs, mine, texts) * self.reward_weights).nansum(1).tolist()
        names = list(dict.fromkeys(row["task"].label for row in rows if "task" in row))
        sums = validation_sums(mine[:counted], texts[:counted], rewards[:counted], names)
        count, solved, points, possible = torch.tensor(self._mean(sums.flatten())).view(-1, 4).T.tolist()
        metrics = {f"{metric_key_prefix}_reward": solved[-1] / count[-1]}
        for i, name in enumerate(names):
            metrics[f"{metric_key_prefix}_{name}_solved"] = solved[i] / count[i]
            metrics[f"{metric_key_prefix}_{name}_score"] = points[i] / possible[i]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Between inner iterations the rollout belongs to the checkpoint. (trainer_state.json is written last.)"""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.rollout is not None and self.state.global_step % self.args.num_iterations:
            folder.mkdir(parents=True, exist_ok=True)
            self.rollout.save(folder, self.args.process_index)
        self.accelerator.wait_for_everyone()  # a checkpoint counts as whole only with every rank's rollout
        super()._save_checkpoint(model, trial)

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: Any = None) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            folder, rank = Path(resume_from_checkpoint), self.args.process_index
            with reading(folder, "trainer_state.json"):
                step = TrainerState.load_from_json(str(folder / "trainer_state.json")).global_step
            if step % self.args.num_iterations:
                self.rollout = Rollout.load(folder, rank, self.args.device)
                with reading(folder, f"trajectory-{rank}.safetensors"):
                    if len(self.rollout.active) != self.args.per_device_train_batch_size:
                        raise ValueError(f"it has {len(self.rollout.active)} rows")
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
