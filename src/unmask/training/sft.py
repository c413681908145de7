"""Supervised training with the masked diffusion loss (LLaDA, arXiv 2502.09992, Eq. 3 and 5), on ``transformers.Trainer``.

A response ends with its end-of-turn token and is filled with EOS up to the canvas length; by default that is learned too. In a
share of the rows the prompt is masked as well (whole-sequence pre-training). All noise of a step is drawn from one
generator seeded by (seed, step, rank), its micro-batches in turn, so a resumed run continues exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback

from unmask.errors import UserError
from unmask.io.launcher import sharding_engine
from unmask.models.head import Head, score_tokens
from unmask.models.masked_lm import MaskedLM
from unmask.models.scratch import new_model
from unmask.tasks import Task, make_task
from unmask.training.config import SFTConfig
from unmask.training.noise import corrupt, sample_times
from unmask.training.optim import MuonAdamW
from unmask.training.run_folder import run
from unmask.training.sft_data import Data, chat_data, task_data
from unmask.training.trainer import Model, RunTrainer, prepare_model, training_arguments

EVAL_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


class SFTTrainer(RunTrainer):
    """transformers.Trainer with the masked diffusion loss, exact resume and validation at fixed masking times.

    Args:
        model: a MaskedLM, a name or path that ``load`` takes, or a PreTrainedModel with ``processing_class``.
        args: the run's settings.
        train_dataset: a Task or several, whose worked responses are learned, or rows of chat data (their columns as those of
            ``args.data``); by default what ``args`` names.
        eval_dataset: rows of chat data; by default a share of ``train_dataset``, or the task's validation problems.
        processing_class: the tokenizer, where ``model`` is a PreTrainedModel.
        callbacks: further TrainerCallbacks.
    """

    config: SFTConfig

    def __init__(
        self,
        model: Model,
        args: SFTConfig,
        train_dataset: Task | Sequence[Task] | Sequence[Mapping[str, Any]] | None = None,
        eval_dataset: Sequence[Mapping[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        config = args.resolved()
        arguments = training_arguments(config, dataloader_drop_last=True)
        notices = []
        if config.optimizer == "muon" and (engine := sharding_engine()) is not None:
            cuts = f"muon works on whole matrices, which {engine} cuts"
            if args.optimizer == "muon":
                raise UserError(f"optimizer is muon, and {cuts}: set it to adamw, or use DDP")
            config = replace(config, optimizer="adamw")
            notices.append(f"unmask: trains with AdamW: {cuts}")
        lm = prepare_model(model, config, processing_class, dynamic=False)
        if config.block_length is not None:
            lm.model.config.block_length = config.block_length
            lm = replace(lm, block_length=config.block_length)
        for name, table in config.task_defaults.items():
            own = {**lm.task_defaults.get(name, {}), **table}
            lm.model.config.task_defaults = {**lm.task_defaults, name: own}
            make_task(name, lm.task_defaults)  # refuses what it does not know
        with arguments.main_process_first():  # one process fetches a data set, the others find it
            data = _data(lm, config, train_dataset)
            if eval_dataset is not None:
                data.validation = chat_data(lm, eval_dataset, data.collate.width, config.overlong, 0.0).training
        _set_length(arguments, config, len(data.training))
        base = None if config.new_model is not None else lm.name
        self.config = replace(config, model=base, warmup_steps=int(arguments.warmup_steps))
        if data.collate.prompt_width == 0:
            self.config = replace(self.config, max_length=data.collate.width)
        self.canvases, self.prompt_width = data.canvases, data.collate.prompt_width
        self.notice = "\n".join([*notices, *filter(None, [data.notice])])
        self._noise, self._noise_step = torch.Generator(), -1
        super().__init__(lm, arguments, data.training, data.validation, data.collate, callbacks)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.config.optimizer == "adamw":
            return super().create_optimizer(model)
        if self.optimizer is None:
            net = self.lm.model if model is None else model
            ends = (net.get_input_embeddings(), net.get_output_embeddings())  # with what an adapter has put there
            outside = {id(p) for end in ends for p in end.parameters()}
            self.optimizer = MuonAdamW(net.parameters(), self.args.learning_rate, self.config.weight_decay, outside)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        step = self.state.global_step
        if step != self._noise_step:  # one generator a step and rank; the micro-batches of a step draw from it in turn
            self._noise.manual_seed((self.config.seed * 1_000_003 + step) * 1009 + self.args.process_index)
            self._noise_step = step
        canvas = self.canvases[step % len(self.canvases)]
        rows, blocks = len(inputs["ids"]), self._blocks(canvas)
        t = sample_times(rows * blocks, self._noise).view(rows, blocks)
        return self.loss_at(model, inputs, t, canvas, self.config.prompt_masking or 0.0, self._noise)

    def _blocks(self, canvas: int) -> int:
        """Masking times of a row: one, or where attention is block-causal one a block."""
        return 1 if self.lm.block_length is None else -(-(self.prompt_width + canvas) // self.lm.block_length)

    def loss_at(
        self, model: Any, inputs: dict[str, Tensor], t: Tensor, canvas: int, prompt_masking: float, generator: Any
    ) -> Tensor:
        """The diffusion loss of a batch at masking times ``t`` (B, 1), its canvas cut to ``canvas`` tokens.

        The published loss, whose softmax runs over the whole vocabulary, the mask token included (decoding leaves it out).
        It is computed piece by piece: no [masked tokens, vocabulary] tensor is made. A block-causal model has a time for each
        block, (B, blocks), and learns all blocks in one pass, each behind the clean ones before it (BD3LM, arXiv 2503.09573).
        """
        width = self.prompt_width + canvas
        ids, lengths = inputs["ids"][:, :width], inputs["lengths"]
        visible = inputs["visible"][:, :width] if "visible" in inputs else None
        place = torch.arange(width, device=ids.device)[None] - inputs["starts"][:, None]  # 0 is the first canvas token
        drawn = [torch.rand(shape, generator=generator) for shape in ((len(ids), 1), ids.shape)]
        random = torch.cat([*drawn, t], 1).to(ids.device)  # one copy, for the host waits for each
        with_prompt, noise, times = random.tensor_split([1, 1 + width], 1)
        maskable = ((place >= 0) | (with_prompt < prompt_masking)) & (lengths <= canvas)[:, None]
        if visible is not None:
            maskable &= visible
        block, how = self.lm.block_length, {}
        if block is not None:
            number = place + inputs["starts"][:, None] if visible is None else visible.long().cumsum(1) - 1
            times, how = times.gather(1, number.clamp(min=0) // block), {"clean": ids}
        times = times.expand(ids.shape)
        noisy, masked = corrupt(ids, times, noise, maskable, self.lm.mask_id)
        # Without eos_in_loss the filling is still masked like the rest: seen, it would give the response's length away.
        learned = maskable if self.config.eos_in_loss else maskable & (place < lengths[:, None])
        at = (masked & learned).flatten().nonzero()[:, 0]
        targets = ids.flatten()[at]

        def score(hidden: Tensor, embedding: Any, head: Callable[[Tensor], Tensor]) -> Tensor:
            return score_tokens(Head.of(embedding, head, mask_id=-1), hidden, targets)[0]  # -1: no token is left out

        logprob = model(input_ids=noisy, attention_mask=visible, positions=at, fn=score, **how).logits  # (N,)
        return -(logprob / times.flatten()[at]).sum() / learned.sum().clamp(min=1)

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Validation loss (nats a token, 1/t-weighted) at each of EVAL_TIMES on the longest canvas, and their mean.

        Processes take batches in turn; a batch's noise is seeded by its number, so their count does not change the loss.
        """
        model = self.model_wrapped if self.is_fsdp_enabled else self.lm.model
        model.eval()
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        size = self.args.per_device_eval_batch_size
        batches = [rows[a : a + size] for a in range(0, len(rows), size)]
        sums = torch.zeros(len(EVAL_TIMES), device=self.args.device)
        for number, counted in self.rank_share(len(batches)):
            batch = self._prepare_inputs(self.data_collator(batches[number]))
            for i, time in enumerate(EVAL_TIMES):
                t = torch.full((len(batch["ids"]), self._blocks(max(self.canvases))), time)
                generator = torch.Generator().manual_seed(number * 10 + i)
                with self.compute_loss_context_manager():
                    loss = self.loss_at(model, batch, t, max(self.canvases), 0.0, generator)
                sums[i] += loss.float() * len(t) * counted
        model.train()
        means = (self.accelerator.reduce(sums) / len(rows)).tolist()
        metrics = {f"{metric_key_prefix}_loss_t{t}": m for t, m in zip(EVAL_TIMES, means, strict=True)}
        return self.report({**metrics, f"{metric_key_prefix}_loss": sum(means) / len(means)})


def _data(lm: MaskedLM, config: SFTConfig, source: Any) -> Data:
    """Rows of a Task, several, or a data set."""
    if source is None:
        source = config.data or [make_task(spec, lm.task_defaults) for spec in config.tasks]
    tasks = [source] if isinstance(source, Task) else source
    if not len(tasks):
        raise UserError("there is nothing to train on: choose tasks (with worked responses) or data (a chat data set)")
    if isinstance(tasks[0], Task):
        return task_data(lm, tasks, config)
    return chat_data(lm, source, config.max_length, config.overlong, config.validation_share)


def _set_length(args: Any, config: SFTConfig, rows: int) -> None:
    """The number of updates, and the part of the learning rate's rise and fall. Raises UserError for less data than a batch."""
    together = args.per_device_train_batch_size * args.world_size
    if rows < together:
        raise UserError(
            f"{rows} training examples do not fill a batch of {together}: raise problems, use more data, or lower "
            "per_device_train_batch_size"
        )
    updates = -(-(rows // together) // args.gradient_accumulation_steps)  # of one epoch
    if config.num_train_epochs is not None:
        args.max_steps = math.ceil(config.num_train_epochs * updates - 1e-9)
    args.warmup_steps = min(100, args.max_steps // 10) if config.warmup_steps is None else config.warmup_steps
    if config.lr_scheduler_type == "warmup_stable_decay":
        decay = max(1, round(config.decay_share * args.max_steps))
        args.lr_scheduler_kwargs = {"num_decay_steps": decay, "decay_type": "linear"}


def train(config: SFTConfig) -> Path:
    """Run, or resume from the run folder's newest checkpoint; returns the folder of the final plain checkpoint."""
    if config.new_model is not None:
        return run(SFTTrainer(MaskedLM.wrap(*new_model(config.new_model, config.seed), name="new model"), config))
    if config.model is None:
        raise UserError("choose either model (a checkpoint to start from) or new_model (the shape of a new one)")
    return run(SFTTrainer(config.model, config))
