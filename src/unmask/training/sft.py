"""Supervised training with the masked diffusion loss (LLaDA, arXiv 2502.09992, Eq. 3 and 5), on ``transformers.Trainer``.

Each example is a prompt and a response; the response ends with its end-of-turn token and is filled with EOS up to the canvas
length, and by default the filling is learned like any other token. In a share of the rows the prompt is masked too
(whole-sequence pre-training). All noise of a step is drawn from one generator seeded by (seed, step, rank), its micro-batches
in turn, so a resumed run continues exactly as the uninterrupted one would have.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from unmask.errors import UserError
from unmask.io.files import writing_to
from unmask.models.adapters import adapter_config, add_adapter, check_precision
from unmask.models.head import Head, score_tokens
from unmask.models.load import load, warn_of_slow_bf16
from unmask.models.masked_lm import MaskedLM
from unmask.models.scratch import new_model
from unmask.training.noise import corrupt, diffusion_loss, sample_times
from unmask.training.optim import MuonAdamW
from unmask.training.resume import ResumableTrainer
from unmask.training.run_folder import FolderCheck, claim, finish, warn_of_warmup, writing_run
from unmask.training.sft_config import LONGEST, SFTConfig
from unmask.training.sft_data import Collate, Examples, FillCollate, read_chat

EVAL_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


class DiffusionTrainer(ResumableTrainer):
    """transformers.Trainer with the masked diffusion loss, exact resume and validation at fixed masking times.

    ``prompt_width`` is the number of columns before the canvases: 0 where every row's canvas starts elsewhere.
    """

    def __init__(self, lm: MaskedLM, config: SFTConfig, prompt_width: int, **kwargs: Any) -> None:
        super().__init__(model=lm.model, **kwargs)
        self.lm, self.config, self.prompt_width = lm, config.resolved(), prompt_width
        self._noise, self._noise_step = torch.Generator(), -1

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.config.optimizer == "adamw":
            return super().create_optimizer(model)
        if self.optimizer is None:
            net = self.lm.model if model is None else model
            ends = (net.get_input_embeddings(), net.get_output_embeddings())  # with what an adapter has put there
            outside = {id(p) for end in ends for p in end.parameters()}
            self.optimizer = MuonAdamW(net.parameters(), self.args.learning_rate, self.config.weight_decay, outside)
        return self.optimizer

    def noise(self) -> torch.Generator:
        """The generator of this step and rank; the micro-batches of a step draw from it in turn."""
        step = self.state.global_step
        if step != self._noise_step:
            self._noise.manual_seed((self.config.seed * 1_000_003 + step) * 1009 + self.args.process_index)
            self._noise_step = step
        return self._noise

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        generator = self.noise()
        canvas = self.config.canvases[self.state.global_step % len(self.config.canvases)]
        t = sample_times(len(inputs["ids"]), generator)
        return self.loss_at(model, inputs, t, canvas, self.config.prompt_masking or 0.0, generator)

    def loss_at(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        t: Tensor,
        canvas: int,
        prompt_masking: float,
        generator: torch.Generator,
    ) -> Tensor:
        """The diffusion loss of a batch at masking times ``t`` (B,), its canvas cut to ``canvas`` tokens.

        The published loss, whose softmax runs over the whole vocabulary, the mask token included (decoding leaves it out).
        It is computed piece by piece: no [masked tokens, vocabulary] tensor is made.
        """
        width = self.prompt_width + canvas
        ids, lengths = inputs["ids"][:, :width], inputs["lengths"]
        visible = inputs["visible"][:, :width] if "visible" in inputs else None
        place = torch.arange(width, device=ids.device)[None] - inputs["starts"][:, None]  # 0 is the first canvas token
        with_prompt = torch.rand(len(ids), generator=generator) < prompt_masking
        maskable = ((place >= 0) | with_prompt.to(ids.device)[:, None]) & (lengths <= canvas)[:, None]
        if visible is not None:
            maskable &= visible
        noisy, masked = corrupt(ids, t, maskable, self.lm.mask_id, generator)
        # Without eos_in_loss the filling is still masked like the rest: seen, it would give the response's length away.
        learned = maskable if self.config.eos_in_loss else maskable & (place < lengths[:, None])
        masked = masked & learned
        targets = ids[masked]

        def score(hidden: Tensor, embedding: Any, head: Callable[[Tensor], Tensor]) -> Tensor:
            return score_tokens(Head.of(embedding, head, mask_id=-1), hidden, targets)[0]  # -1: no token is left out

        logprob = model(input_ids=noisy, attention_mask=visible, positions=masked, fn=score).logits
        times = t.to(ids.device)[masked.nonzero()[:, 0]]
        return diffusion_loss(logprob, times, learned.sum().clamp(min=1))

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Validation loss (nats a token, 1/t-weighted) at each of EVAL_TIMES on the longest canvas, and their mean.

        Processes take batches in turn; a batch's noise is seeded by its number, so their count does not change the loss.
        """
        model = self.model_wrapped if self.is_fsdp_enabled else self.lm.model
        model.eval()
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        size, world = self.args.per_device_eval_batch_size, self.args.world_size
        batches = [range(a, min(a + size, len(rows))) for a in range(0, len(rows), size)]
        sums = torch.zeros(len(EVAL_TIMES), device=self.args.device)
        # As many batches on every rank, so that FSDP's collectives meet; what is beyond the end is not counted.
        for k in range(self.args.process_index, -(-len(batches) // world) * world, world):
            number = k % len(batches)
            batch = self._prepare_inputs(self.data_collator([rows[i] for i in batches[number]]))
            for i, time in enumerate(EVAL_TIMES):
                t = torch.full((len(batch["ids"]),), time)
                generator = torch.Generator().manual_seed(number * 10 + i)
                with self.compute_loss_context_manager():
                    loss = self.loss_at(model, batch, t, max(self.config.canvases), 0.0, generator)
                sums[i] += loss.float() * len(batch["ids"]) * (k < len(batches))
        model.train()
        means = (self.accelerator.reduce(sums) / len(rows)).tolist()
        metrics = {f"{metric_key_prefix}_loss_t{t}": m for t, m in zip(EVAL_TIMES, means, strict=True)}
        metrics[f"{metric_key_prefix}_loss"] = sum(means) / len(means)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


_MAY_CHANGE = ("output", "log_every", "eval_every", "save_every", "report_to")


@dataclass
class Data:
    """Rows to train and to validate on, their collator, the columns before the canvas, a line to say, and of chat data the
    number of tokens that every row is filled to."""

    training: Sequence[Any]
    validation: Sequence[Any]
    collate: Collate | FillCollate
    prompt_width: int = 0
    line: str = ""
    max_length: int | None = None


def _task_data(lm: MaskedLM, config: SFTConfig) -> Data:
    number, canvas = len(config.tasks), max(config.canvas)
    counts = config.problems if len(config.problems) == number else config.problems * number
    training = Examples(lm, config.tasks, "train", counts, config.seed)
    validation = Examples(lm, config.tasks, "validation", [config.validation_problems] * number, 0)
    longest = max(len(r["response"]) for r in training.rows)
    if longest > canvas:
        raise UserError(f"the longest response has {longest} tokens: raise canvas {config.canvas} to hold it")
    width = max(training.prompt_width, validation.prompt_width)
    if width + canvas > lm.max_length:
        raise UserError(f"prompts of {width} tokens and a canvas of {canvas} exceed the model's {lm.max_length}")
    return Data(training.rows, validation.rows, Collate(lm, width, canvas), width)


def _chat_data(lm: MaskedLM, config: SFTConfig) -> Data:
    if config.max_length is not None and config.max_length > lm.max_length:
        raise UserError(f"max_length is {config.max_length}, but {lm.name} takes {lm.max_length} tokens: lower it")
    name, most = str(config.data), config.max_length or min(LONGEST, lm.max_length)
    found = read_chat(lm, name, most, config.overlong, config.validation_share)
    width = config.max_length or max(
        len(r["prompt"]) + len(r["response"]) for r in (*found.training, *found.validation)
    )
    line = (
        f"{name}: {len(found.training)} training and {len(found.validation)} validation rows, {found.cut} of them cut to "
        f"{width} tokens, {found.left_out} too long and left out"
    )
    return Data(found.training, found.validation, FillCollate(lm.eos_id, width), line=line, max_length=width)


def _arguments(config: SFTConfig) -> TrainingArguments:
    """The Trainer's settings, without what depends on the number of updates (see ``_set_length``)."""
    config, cpu = config.resolved(), not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=config.output,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate or 0.0,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type=config.lr_scheduler,
        bf16=config.bf16,
        activation_checkpointing=config.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=cpu,
        dataloader_pin_memory=not cpu,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        logging_steps=config.log_every,
        eval_strategy="steps" if config.data is None or config.validation_share else "no",
        eval_steps=config.eval_every,
        save_steps=config.save_every,
        save_total_limit=2,
        report_to=config.report_to or "none",
        seed=config.seed,
        data_seed=config.seed,
    )


def _set_length(args: TrainingArguments, config: SFTConfig, rows: int) -> None:
    """The number of updates, and the part of the learning rate's rise and fall. Raises UserError for less data than a batch."""
    together = config.batch_size * args.world_size
    if rows < together:
        raise UserError(
            f"{rows} training examples do not fill a batch of {together}: raise problems, give more data, or lower batch_size"
        )
    updates = -(-(rows // together) // config.gradient_accumulation_steps)  # of one epoch
    args.max_steps = config.steps if config.steps is not None else math.ceil(float(config.epochs or 0) * updates - 1e-9)
    args.warmup_steps = min(100, args.max_steps // 10) if config.warmup_steps is None else config.warmup_steps
    if config.lr_scheduler == "warmup_stable_decay":
        decay = max(1, round(config.decay_share * args.max_steps))
        args.lr_scheduler_kwargs = {"num_decay_steps": decay, "decay_type": "linear"}


def train(config: SFTConfig) -> Path:
    """Run (or, if ``output`` holds a checkpoint, go on with) a supervised run; returns the final checkpoint's folder.

    Raises:
        UserError: for an unknown model, task or data set, or responses that do not fit.
    """
    config, output = config.resolved(), Path(config.output)
    args = _arguments(config)
    first = args.process_index == 0
    if config.new_model is not None:
        lm = MaskedLM.wrap(*new_model(config.new_model, config.seed), name="new model")
    else:
        lm = load(str(config.model), config.dtype)
        check_precision(lm, config.lora_r)
    lm.model.config._attn_implementation = config.attention
    with args.main_process_first():  # one process fetches a data set, the others find it
        data = _task_data(lm, config) if config.data is None else _chat_data(lm, config)
    _set_length(args, config, len(data.training))
    config = replace(config, warmup_steps=int(args.warmup_steps), max_length=data.max_length or config.max_length)
    if config.compile:
        lm.model.base_model.compile(dynamic=False)
    if config.lora_r is not None:
        adapter = adapter_config(config.lora_r, config.lora_alpha, config.lora_target_modules, config.lora_dropout)
        lm = add_adapter(lm, adapter, config.seed)
    with writing_to(output):  # the Trainer makes its folder
        trainer = DiffusionTrainer(
            lm,
            config,
            data.prompt_width,
            args=args,
            train_dataset=data.training,
            eval_dataset=data.validation,
            data_collator=data.collate,
            processing_class=lm.tokenizer,
            callbacks=[FolderCheck(output)],
        )
    checkpoint = claim(output, config, _MAY_CHANGE, first)
    if first and data.line:
        print(data.line, file=sys.stderr)
    if first:
        warn_of_warmup(config.warmup_steps, args.max_steps)
        if config.bf16:
            warn_of_slow_bf16(args.device)
    last = output / f"checkpoint-{args.max_steps}"
    if checkpoint != last:  # the Trainer would take a finished run one step further
        with writing_run(output):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.is_world_process_zero():
        finish(output, last, config, "sft")
    trainer.accelerator.wait_for_everyone()
    return output / "final"
