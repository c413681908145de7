"""DiffusionGRPOTrainer: rollouts with any decoder, one clipped surrogate over an objective's views, one backward a pass."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState

from unmask.decoding import Decoder
from unmask.decoding.trajectory import Trajectory
from unmask.errors import UserError
from unmask.models.masked_lm import MaskedLM
from unmask.rl import objectives
from unmask.rl.config import DiffusionGRPOConfig
from unmask.rl.data import rl_data
from unmask.rl.objectives import View, ViewRows
from unmask.rl.rewards import Row, score
from unmask.rl.rollout import Rollout, rollout_batches, rollout_seeds, sample_trajectory, score_all, score_rows
from unmask.tasks import Task
from unmask.tasks.base import Reward, grade_completion
from unmask.training.trainer import Model, RunTrainer, prepare_model, training_arguments

Microbatch = tuple[Tensor, bool]
"""Indexes of view rows for one forward pass, and whether they count."""
UPDATE_METRICS = ("logprob_mismatch", "kl", "clip_fraction", "entropy", "ratio")
"""Means over the scored tokens of an update."""


class DiffusionGRPOTrainer(RunTrainer):
    """GRPO for masked diffusion language models; objective and decoder are chosen independently of each other.

    Args:
        model: a MaskedLM, a name or path that ``load`` takes, or a PreTrainedModel with ``processing_class``.
        reward_funcs: a Task or several, whose problems are the prompts and whose own rewards are paid; or reward functions
            ``f(prompts, completions, **columns) -> list[float | None]`` (TRL's signature), or their names.
        train_dataset: a Task or several, or rows with ``prompt`` (text, or messages for the chat template), whose other columns
            go to the reward functions. Without it and without reward_funcs, ``args`` names both.
        eval_dataset: rows like these; by default the tasks' validation problems. Rows with ``problem`` and ``task`` are graded.
        peft_config: train this adapter (by default that of ``args.lora_r``), without dropout; the reference policy is the model
            without it.
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
        arguments = training_arguments(
            args,
            logging_steps=1,  # with more, the updates between would go unreported
            logging_nan_inf_filter=False,
            ddp_find_unused_parameters=False,
            eval_on_start=True,
        )
        if dropout := getattr(peft_config, "lora_dropout", 0):
            raise UserError(
                f"lora_dropout is {dropout}: set it to 0, or the policy that is optimized is not the one that sampled"
            )
        lm = prepare_model(model, args, processing_class, peft_config)
        self.config = replace(args, model=lm.name)
        with arguments.main_process_first():  # one process fetches a data set, the others find it
            data = rl_data(lm, args, reward_funcs, train_dataset, eval_dataset)
        self.reward_funcs, self.reward_weights = data.reward_funcs, torch.tensor(data.weights)
        self.decoder = args.rollout_decoder()
        self.objective: objectives.Objective = objectives.find_objective(args.objective)
        widest = data.widest(lm, args.max_completion_length)
        self.prompt_width = widest if args.compile else 0
        super().__init__(lm, arguments, data.training, data.validation, list, callbacks)
        if self.is_fsdp_enabled and self.decoder.threshold is not None:
            raise UserError(
                "a threshold decoder takes other numbers of steps on every rank, which FSDP cannot follow: use DDP"
            )
        self.reference_model: Any = None
        if args.beta > 0 and args.lora_r is None and peft_config is None:
            self.reference_model = copy.deepcopy(lm.model).eval().requires_grad_(False).to(arguments.device)
            if args.compile:
                self.reference_model.base_model.compile()  # a copy is not compiled
        self.rollout: Rollout | None = None
        self.pending_metrics: dict[str, float] = {}  # joins the next log line
        self.completions: list[dict[str, Any]] = []  # of the newest rollout's first group

    def get_train_dataloader(self) -> DataLoader[list[Row]]:
        """One batch of prompts an update. Every rank cuts its own share, so the loader is not prepared by accelerate."""
        args, rows = self.args, cast(Any, self.train_dataset)
        groups, repeats = args.per_device_train_batch_size // self.config.num_generations, self.config.num_iterations
        place = args.process_index, args.world_size
        batches = rollout_batches(len(rows), groups, repeats, args.max_steps, args.seed, *place)
        return DataLoader(rows, batch_sampler=batches, collate_fn=list)

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

    def _decode(self, rows: list[Row], decoder: Decoder, seeds: Tensor) -> Trajectory:
        prompts, size = [row["prompt"] for row in rows], self.config.rows_per_forward
        with self.inference() as policy:
            return sample_trajectory(policy, prompts, decoder, seeds, size, self.prompt_width)

    def sample(self, rows: list[Row]) -> Rollout:
        """Expand prompts to groups, decode, reward, and score under the old and the reference policy where needed."""
        config = self.config
        rows = [row for row in rows for _ in range(config.num_generations)]
        number = self.state.global_step // config.num_iterations
        seeds, view_seeds = rollout_seeds(config.seed, number, self.args.process_index * len(rows), len(rows))
        trajectory = self._decode(rows, self.decoder, seeds)
        texts = self.lm.text(trajectory.tokens)
        table = score(self.reward_funcs, rows, texts)
        rewards = (table * self.reward_weights).nansum(1)
        advantages = objectives.group_advantages(rewards, config.num_generations, config.scale_rewards)
        active = objectives.has_reward_variance(rewards, config.num_generations)
        self._record_rollout(trajectory, table, rewards, active)
        first_group = list(zip(rows, texts, rewards.tolist(), advantages.tolist(), strict=True))[
            : config.num_generations
        ]
        self.completions = [
            {"prompt": row["prompt"], "completion": text, "reward": r, "advantage": a}
            for row, text, r, a in first_group
        ]
        rollout = Rollout(trajectory, *(x.to(trajectory.tokens.device) for x in (advantages, active, view_seeds)))
        if config.uses_recorded:
            rollout.old = trajectory.logprob[None]
        elif config.num_iterations > 1:
            with self.inference() as policy:
                rollout.old = self.score_views(policy, rollout)
        if config.beta > 0 and self.reference_model is None:
            with self.inference() as policy, cast(Any, policy.model).disable_adapter():
                rollout.reference = self.score_views(policy, rollout)
        elif config.beta > 0:
            with torch.no_grad(), self.accelerator.autocast():  # the policy's own forward has it from accelerate
                rollout.reference = self.score_views(replace(self.lm, model=self.reference_model), rollout)
        return rollout

    def views(self, rollout: Rollout, iteration: int) -> list[View]:
        """The objective's views, without what the loss leaves out."""
        trajectory = rollout.trajectory
        views = list(self.objective.views(trajectory, rollout.seeds, iteration))
        if self.config.mask_after_eos:
            place = torch.arange(trajectory.tokens.shape[1], device=trajectory.tokens.device)
            inside = place <= self.lm.lengths(trajectory.tokens)[:, None]
            views = [replace(v, scored=v.scored & inside) for v in views]
        return views

    def score_views(self, policy: MaskedLM, rollout: Rollout) -> Tensor:
        """Log-probabilities of the recorded tokens in all views, (iterations, B, L); 0 in rows that are not active."""
        found = []
        for iteration in range(self.config.num_iterations if self.objective.fresh else 1):
            rows = ViewRows.of(self.views(rollout, iteration))
            found.append(score_all(policy, rollout.trajectory, rows, self.microbatches(rows, rollout.active)))
        return torch.stack(found)

    def microbatches(self, rows: ViewRows, active: Tensor) -> list[Microbatch]:
        """The forward passes over view rows that score tokens of ``active`` (B,) trajectories, as many on every rank."""
        scoring = (active[rows.row] & rows.scored.any(1)).nonzero()[:, 0]
        found = [(part, True) for part in scoring.split(self.config.rows_per_forward) if len(part)]
        num_passes = len(found)
        if self.args.world_size > 1:
            device = self.accelerator.device
            num_passes = int(self.accelerator.gather(torch.tensor([num_passes], device=device)).max())
        padding_pass = (torch.zeros(1, dtype=torch.int64, device=active.device), False)  # computed, not counted
        return found + [padding_pass] * (max(num_passes, 1) - len(found))

    def _token_losses(self, rollout: Rollout, iteration: int, new: Tensor, row: Tensor, column: Tensor) -> list[Tensor]:
        """Of the tokens at (row, column), all (N,): surrogate plus KL penalty, the ratio's logarithm, KL."""
        stored = iteration if self.objective.fresh else 0
        old = new.detach() if rollout.old is None else rollout.old[stored][row, column]
        loss = objectives.clipped_surrogate(new, old, rollout.advantages[row], self.config.epsilon)
        kl = torch.zeros_like(new)
        if rollout.reference is not None:
            kl = objectives.k3(new, rollout.reference[stored][row, column])
            loss = loss + self.config.beta * kl
        return [loss, new - old, kl]

    def _joint_gradient(
        self, rollout: Rollout, iteration: int, views: list[View], microbatches: list[Microbatch]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of log-probabilities that are sums over views: this rank's loss, its gradient with respect to the sums, the ratio's
        logarithm and KL, the last three (B, L).

        Two passes are exact with the memory of one view: the sums without gradient, then (in ``update``) a backward pass of
        gradient · log-probability for each forward pass.
        """
        scored = torch.stack([v.scored for v in views]).any(0)
        row, column = (scored & rollout.active[:, None]).nonzero(as_tuple=True)
        new = torch.zeros_like(rollout.trajectory.logprob)  # any value serves where the ratio is 1 and there is no KL
        if rollout.old is not None and iteration == 0:
            new = rollout.old[0]
        elif rollout.old is not None or rollout.reference is not None:
            with self.inference() as policy:
                new = score_all(policy, rollout.trajectory, ViewRows.of(views), microbatches)
        leaf = new[row, column].requires_grad_()
        weight = objectives.token_weights([scored], self.config.normalization)[0][row, column] / len(rollout.active)
        losses, *values = self._token_losses(rollout, iteration, leaf, row, column)
        loss = (weight * losses).sum()
        found = (torch.autograd.grad(loss, leaf)[0] if len(leaf) else leaf, *values)
        gradient, log_ratio, kl = (torch.zeros_like(new).index_put((row, column), v.detach().to(new)) for v in found)
        return loss.detach(), gradient, log_ratio, kl

    def update(self, model: Any, rollout: Rollout, iteration: int) -> Tensor:
        """Accumulate the gradient of one inner iteration, one backward a forward pass; returns this rank's loss."""
        config, trajectory = self.config, rollout.trajectory
        views = self.views(rollout, iteration)
        if config.steps_per_update is not None:
            views = objectives.sample_views(views, config.steps_per_update, rollout.seeds, iteration)
        weights = torch.cat(objectives.token_weights([v.scored for v in views], config.normalization))
        table = ViewRows.of(views)
        microbatches = self.microbatches(table, rollout.active)
        total = torch.zeros((), device=trajectory.tokens.device)
        if table.share is not None:
            total, *joint = self._joint_gradient(rollout, iteration, views, microbatches)
        sums = torch.zeros(1 + len(UPDATE_METRICS), dtype=torch.float64, device=total.device)
        model.train()  # activation checkpointing asks for it; there is no dropout
        policy = replace(self.lm, model=model)
        for number, (part, counted) in enumerate(microbatches):
            last = number == len(microbatches) - 1
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
            with torch.no_grad():
                ratio, mismatch = log_ratio.exp().double(), (new - trajectory.logprob[row, column]).abs()
                raised = rollout.advantages[row] > 0
                clipped = torch.where(raised, ratio > 1 + config.epsilon, ratio < 1 - config.epsilon)
                values = (torch.ones_like(ratio), mismatch, kl, clipped, entropy, ratio)
                sums += counted * torch.stack([v.double().sum() for v in values])
        self._record_update(total, sums, iteration)
        return total

    # ---- logging ---------------------------------------------------------------------------------------------------

    def _mean(self, values: Sequence[float] | Tensor) -> list[float]:
        """The mean of each value over the ranks."""
        tensor = torch.as_tensor(values, dtype=torch.float64, device=self.accelerator.device)
        if self.args.world_size > 1:
            tensor = self.accelerator.reduce(tensor, "mean")
        return tensor.tolist()

    def _record_rollout(self, trajectory: Trajectory, table: Tensor, rewards: Tensor, active: Tensor) -> None:
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
        finite, tokens, *totals = self._mean([float(loss.isfinite()), *sums.tolist()])
        if finite < 1:
            raise UserError("the loss is not finite: lower learning_rate or check the checkpoint's weights")
        if not tokens:  # no group had variance
            return
        found = {name: total / tokens for name, total in zip(UPDATE_METRICS, totals, strict=True)}
        mismatch = found.pop("logprob_mismatch")
        if iteration == 0:
            self.pending_metrics["logprob_mismatch"] = mismatch
            rounded = self.args.bf16 or self.args.fp16 or self.lm.model.dtype != torch.float32
            exact = self.objective.recorded and not rounded
            if exact and mismatch > self.config.max_logprob_mismatch:
                raise UserError(
                    f"the update does not see the policy that sampled: recorded and recomputed log-probabilities differ by "
                    f"{mismatch:.2g} nats a token, more than max_logprob_mismatch={self.config.max_logprob_mismatch:g}: switch "
                    "dropout off, or raise it"
                )
        if self.config.beta == 0:
            del found["kl"]
        self.pending_metrics.update(found)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what rollout and update found to Trainer's line."""
        if "loss" in logs:
            logs.update(self.pending_metrics)
            self.pending_metrics = {}
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Greedy decoding of the validation rows under the run's decoder: mean reward, and accuracy for rows of tasks."""
        rows: list[Row] = list(self.eval_dataset if eval_dataset is None else eval_dataset)  # type: ignore[arg-type]
        share, counted = zip(*self.rank_share(len(rows)), strict=True)
        mine = [rows[i] for i in share]
        seeds, _ = rollout_seeds(self.config.seed, 0, 0, len(rows))
        trajectory = self._decode(mine, self.decoder.replace(temperature=0.0), seeds[[*share]])
        texts = self.lm.text(trajectory.tokens)
        rewards = (score(self.reward_funcs, mine, texts) * self.reward_weights).nansum(1).tolist()
        names = list(dict.fromkeys(row["task"].label for row in rows if "task" in row))
        sums = torch.zeros(len(names) + 1, 4, dtype=torch.float64)  # rows, solved, points, possible; last rows, reward
        for row, text, reward in compress(zip(mine, texts, rewards, strict=True), counted):
            sums[-1] += torch.tensor([1.0, reward, 0.0, 0.0])
            if "task" in row:
                grade = grade_completion(row["task"], row["problem"], text)
                sums[names.index(row["task"].label)] += torch.tensor([1.0, grade.solved, grade.points, grade.possible])
        count, solved, points, possible = torch.tensor(self._mean(sums.flatten())).view(-1, 4).T.tolist()
        metrics = {f"{metric_key_prefix}_reward": solved[-1] / count[-1]}
        for i, name in enumerate(names):
            metrics[f"{metric_key_prefix}_{name}_solved"] = solved[i] / count[i]
            metrics[f"{metric_key_prefix}_{name}_score"] = points[i] / possible[i]
        return self.report(metrics)

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
