"""TrajectoryTrainer: what reinforcement learning and distillation share, a training along a decoder's trajectories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import compress
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from unmask.decoding import Decoder
from unmask.decoding.trajectory import Trajectory
from unmask.errors import UserError
from unmask.models.masked_lm import MaskedLM
from unmask.rl.config import TrajectoryConfig
from unmask.rl.data import Data
from unmask.rl.objectives import ViewRows
from unmask.rl.rewards import MASK, Rewards, Row, score
from unmask.rl.rollout import rollout_batches, rollout_seeds, sample_trajectory
from unmask.tasks.base import grade_completion
from unmask.training.trainer import RunTrainer, training_arguments

Microbatch = tuple[Tensor, bool]
"""Indexes of view rows for one forward pass, and whether they count."""


def trajectory_arguments(config: TrajectoryConfig) -> TrainingArguments:
    """The Trainer's settings of a training along trajectories."""
    return training_arguments(
        config,
        logging_steps=1,  # with more, the updates between would go unreported
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False,
        eval_on_start=True,
        metric_for_best_model="reward" if config.load_best_model_at_end else None,
    )


class TrajectoryTrainer(RunTrainer):
    """Batches of prompts, decoding under the policy, forward passes over views, greedy validation.

    Attributes:
        prompts: of an update, on each process. repeats: updates in turn that get the same ones. widest: see ``padded_width``.
        pending_metrics: join the next log line. completions: of the newest rollout's first group, with their rewards.
    """

    config: TrajectoryConfig
    prompts: int
    repeats = 1

    def __init__(
        self, lm: MaskedLM, args: TrainingArguments, data: Data, callbacks: list[TrainerCallback] | None
    ) -> None:
        for name, module in lm.model.named_modules():
            if isinstance(module, torch.nn.Dropout) and module.p > 0:
                raise UserError(
                    f"{name} drops out with probability {module.p}: set it to 0 (lora_dropout, or the model's own), or the "
                    "policy that is trained is not the one that decoded"
                )
        self.reward_funcs, self.reward_weights = data.reward_funcs, data.weights
        self.decoder = self.config.rollout_decoder().within(lm.block_length)
        widest = data.widest(lm, self.config.max_completion_length)
        self.widest = widest if self.config.compile else 0
        self.pending_metrics: dict[str, float] = {}
        self.completions: list[dict[str, Any]] = []
        if self.config.load_best_model_at_end and not data.validation:
            raise UserError("load_best_model_at_end keeps the best of the validations, and there are none: set tasks")
        super().__init__(lm, args, data.training, data.validation, list, callbacks)
        if self.is_fsdp_enabled and (self.decoder.adaptive or lm.block_length is not None):
            rows = "a threshold decoder takes" if lm.block_length is None else "rows of a block-causal model take"
            raise UserError(f"{rows} other numbers of steps on every rank, which FSDP cannot follow: use DDP")

    def get_train_dataloader(self) -> DataLoader[list[Row]]:
        """One batch of prompts an update. Every rank cuts its own share, so the loader is not prepared by accelerate."""
        args, rows = self.args, cast(Any, self.train_dataset)
        place = args.process_index, args.world_size
        batches = rollout_batches(len(rows), self.prompts, self.repeats, args.max_steps, args.seed, *place)
        return DataLoader(rows, batch_sampler=batches, collate_fn=list)

    @contextmanager
    def inference(self) -> Iterator[MaskedLM]:
        """The policy for sampling and scoring: eval mode, no gradient, no wrapper of the training engine."""
        model: Any = self.model_wrapped
        if not self.is_fsdp_enabled:
            model = self.accelerator.unwrap_model(model)
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                yield replace(self.lm, model=model)
        finally:
            model.train(training)

    def _decode(self, rows: list[Row], decoder: Decoder, seeds: Tensor) -> Trajectory:
        prompts, size = [row["prompt"] for row in rows], self.config.rows_per_forward
        # A cache's windows have many shapes, so it is worth more than a compiled model.
        eager = self.config.compile and decoder.cache == "exact"
        with self.inference() as policy, torch.compiler.set_stance("force_eager" if eager else "default"):
            return sample_trajectory(policy, prompts, decoder, seeds, size, self.widest)

    def _score(self, rows: list[Row], trajectory: Trajectory, texts: list[str]) -> Rewards:
        """What the reward functions pay for a trajectory and its texts."""

        def drafts() -> list[list[str]]:
            """Each row's texts after every step, up to the first end token."""
            states = zip(*(self.lm.text(trajectory.state(s + 1), MASK) for s in range(trajectory.steps)), strict=True)
            steps = (trajectory.step.amax(1) + 1).tolist()
            return [list(row[:n]) for row, n in zip(states, steps, strict=True)]

        return score(self.reward_funcs, rows, texts, drafts)

    def microbatches(self, rows: ViewRows, active: Tensor | None = None) -> list[Microbatch]:
        """The forward passes over view rows that score tokens of ``active`` (B,) trajectories (None: all), as many on every
        rank."""
        scores = rows.scored.any(1)
        scoring = (scores if active is None else scores & active[rows.row]).nonzero()[:, 0]
        found = [(part, True) for part in scoring.split(self.config.rows_per_forward) if len(part)]
        num_passes = len(found)
        if self.args.world_size > 1:
            device = self.accelerator.device
            num_passes = int(self.accelerator.gather(torch.tensor([num_passes], device=device)).max())
        padding_pass = (torch.zeros(1, dtype=torch.int64, device=scores.device), False)  # computed, not counted
        return found + [padding_pass] * (max(num_passes, 1) - len(found))

    def forward_passes(self, model: Any, microbatches: Sequence[Microbatch]) -> Iterator[Microbatch]:
        """The forward passes of one update, each to be followed by one backward pass; the last one synchronizes gradients."""
        model.train()  # activation checkpointing asks for it; dropout is refused
        for number, microbatch in enumerate(microbatches):
            last = number == len(microbatches) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)  # DeepSpeed reads it in backward
            synchronizes = last or self.is_fsdp_enabled  # without, the whole gradient would be on every rank
            with (
                nullcontext() if synchronizes else self.accelerator.no_sync(model),
                self.compute_loss_context_manager(),
            ):
                yield microbatch

    # ---- logging ---------------------------------------------------------------------------------------------------

    def _mean(self, values: Sequence[float] | Tensor) -> list[float]:
        """The mean of each value over the ranks."""
        tensor = torch.as_tensor(values, dtype=torch.float64, device=self.accelerator.device)
        if self.args.world_size > 1:
            tensor = self.accelerator.reduce(tensor, "mean")
        return tensor.tolist()

    def check_finite(self, loss: Tensor) -> None:
        """Raises UserError, on every rank, where the loss of one is not finite."""
        if self._mean([float(loss.isfinite())])[0] < 1:
            raise UserError("the loss is not finite: lower learning_rate or check the checkpoint's weights")

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
        rewards = self._score(mine, trajectory, texts).total(self.reward_weights).tolist()
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
