"""Supervised training with the masked diffusion loss (LLaDA, arXiv 2502.09992, Eq. 3 and 5), on ``transformers.Trainer``.

Each example is a prompt and a response; the response ends with its end-of-turn token and is filled with EOS up to the canvas
length, and by default the filling is learned like any other token. In a share of the rows the prompt is masked too
(whole-sequence pre-training). All randomness of a step is drawn from a generator seeded by (seed, step, rank), so a resumed
run continues exactly as the uninterrupted one would have.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from unmask.models.load import load
from unmask.models.masked_lm import MaskedLM
from unmask.models.scratch import new_model
from unmask.noise import corrupt, diffusion_loss, sample_times
from unmask.optim import MuonAdamW
from unmask.runs import claim, export
from unmask.spec import UserError, check_at_least, check_positive
from unmask.tasks import make_task

EVAL_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass
class SFTConfig:
    """One supervised run."""

    output: str
    """The run folder: checkpoints, logs, and ``final`` (a plain checkpoint) at the end."""
    tasks: list[str]
    """Task specs whose worked responses are learned, in equal shares, e.g. ``sudoku:style=compact``."""
    model: str | None = None
    """Start from this model; or give ``new_model``."""
    new_model: dict[str, Any] | None = None
    """Start from random weights: LLaDAConfig fields (``d_model``, ``n_layers``, …)."""
    problems: list[int] = field(default_factory=lambda: [20_000])
    """Training problems: one number for every task, or one for each. A smaller set is repeated to give equal shares."""
    validation_problems: int = 128
    """Validation problems a task."""
    canvas: list[int] = field(default_factory=lambda: [128])
    """Canvas lengths, taken in turn step by step. A response that does not fit is left out of that step's loss."""
    steps: int = 1000
    batch_size: int = 64
    """Examples a step on each process."""
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    decay_share: float = 0.4
    """The learning rate is constant, then falls linearly to zero over this last share of the steps."""
    optimizer: str = "muon"
    """``muon`` (matrices; AdamW for the rest) or ``adamw``."""
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    prompt_masking: float = 0.25
    """Share of rows in which the prompt is masked and learned too."""
    eos_in_loss: bool = True
    """Learn the EOS filling after the response (LLaDA does); without it only the end-of-turn token is learned."""
    bf16: bool = True
    """Autocast to bfloat16 (master weights stay float32)."""
    compile: bool = False
    """torch.compile the trunk."""
    attention: str = "sdpa"
    """``sdpa`` or ``eager`` (faster backward on CPUs)."""
    seed: int = 0
    log_every: int = 20
    eval_every: int = 500
    save_every: int = 500
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])

    def __post_init__(self) -> None:
        if (self.model is None) == (self.new_model is None):
            raise UserError("give either model (a checkpoint to start from) or new_model (the shape of a new one)")
        if self.optimizer not in ("muon", "adamw"):
            raise UserError(f"optimizer is {self.optimizer!r}: give muon or adamw")
        if self.attention not in ("sdpa", "eager"):
            raise UserError(f"attention is {self.attention!r}: give sdpa or eager")
        if not self.tasks or not self.canvas:
            raise UserError("tasks and canvas each need at least one entry")
        if len(self.problems) not in (1, len(self.tasks)) or min(self.problems) < 1:
            raise UserError(
                f"problems is {self.problems}: give one number, or one for each of the {len(self.tasks)} tasks"
            )
        check_at_least(self, 1, "validation_problems", "steps", "batch_size", "log_every", "eval_every", "save_every")
        if min(self.canvas) < 1:
            raise UserError(f"canvas is {self.canvas}: give lengths of 1 or more")
        check_positive(self, "learning_rate", "max_grad_norm")
        if self.warmup_steps < 0 or not 0 <= self.weight_decay < 1:
            raise UserError(
                f"warmup_steps={self.warmup_steps}, weight_decay={self.weight_decay}: give 0 or more, and below 1"
            )
        for name in ("prompt_masking", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: give a share between 0 and 1")


class Examples(Dataset[dict[str, list[int]]]):
    """Tokenised prompts and responses of tasks, tasks interleaved so that any stretch holds equal shares."""

    def __init__(self, lm: MaskedLM, specs: list[str], split: str, counts: list[int], seed: int) -> None:
        end = lm.eos_id if lm.eot_id is None else lm.eot_id
        per_task = []
        for spec, count in zip(specs, counts, strict=True):
            task = make_task(spec, lm.task_defaults)
            problems = task.problems(split, count, seed)
            if not problems or problems[0].response is None:
                raise UserError(f"task {spec} has no worked responses to learn: use its compact style")
            prompts = [lm.chat(task.instruction(p), task.prefill) for p in problems]
            encode = lm.tokenizer
            per_task.append(
                [
                    {"prompt": a, "response": [*b, end]}
                    for a, b in zip(
                        encode(prompts, add_special_tokens=False)["input_ids"],
                        encode([p.response or "" for p in problems], add_special_tokens=False)["input_ids"],
                        strict=True,
                    )
                ]
            )
        self.rows = [rows[i % len(rows)] for i in range(max(counts)) for rows in per_task]
        self.prompt_width = max(len(r["prompt"]) for r in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


@dataclass
class Collate:
    """Left-padded prompts and EOS-filled responses of one width, so that a compiled model sees one shape."""

    lm: MaskedLM
    prompt_width: int
    canvas: int

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Returns ids (B, P+L), visible (B, P+L) bool, lengths (B,) of the responses with their end token."""
        ids = torch.full((len(rows), self.prompt_width + self.canvas), self.lm.eos_id)
        visible = torch.ones_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            start = self.prompt_width - len(row["prompt"])
            visible[i, :start] = False
            ids[i, start : self.prompt_width] = torch.tensor(row["prompt"])
            response = row["response"][: self.canvas]
            ids[i, self.prompt_width : self.prompt_width + len(response)] = torch.tensor(response)
        return {"ids": ids, "visible": visible, "lengths": torch.tensor([len(r["response"]) for r in rows])}


class DiffusionTrainer(Trainer):
    """transformers.Trainer with the masked diffusion loss, exact resume and validation at fixed masking times."""

    def __init__(self, lm: MaskedLM, config: SFTConfig, prompt_width: int, **kwargs: Any) -> None:
        super().__init__(model=lm.model, **kwargs)
        self.lm, self.config, self.prompt_width = lm, config, prompt_width

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.config.optimizer == "adamw":
            return super().create_optimizer(model)
        if self.optimizer is None:
            net = self.lm.model if model is None else model
            outside = {id(net.get_input_embeddings().weight), id(net.get_output_embeddings().weight)}
            self.optimizer = MuonAdamW(net.parameters(), self.args.learning_rate, self.config.weight_decay, outside)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        generator = torch.Generator().manual_seed(
            (self.config.seed * 1_000_003 + self.state.global_step) * 1009 + self.args.process_index
        )
        canvas = self.config.canvas[self.state.global_step % len(self.config.canvas)]
        t = sample_times(len(inputs["ids"]), generator)
        return self.loss_at(model, inputs, t, canvas, self.config.prompt_masking, generator)

    def loss_at(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        t: Tensor,
        canvas: int,
        prompt_masking: float,
        generator: torch.Generator,
    ) -> Tensor:
        """The diffusion loss of a batch at masking times ``t`` (B,), its canvas cut to ``canvas`` tokens."""
        width = self.prompt_width + canvas
        ids, visible, lengths = inputs["ids"][:, :width], inputs["visible"][:, :width], inputs["lengths"]
        place = torch.arange(width, device=ids.device)[None] - self.prompt_width  # 0 is the first canvas token
        with_prompt = torch.rand(len(ids), generator=generator) < prompt_masking
        maskable = ((place >= 0) | with_prompt.to(ids.device)[:, None]) & visible & (lengths <= canvas)[:, None]
        noisy, masked = corrupt(ids, t, maskable, self.lm.mask_id, generator)
        # Without eos_in_loss the filling is still masked like the rest: seen, it would give the response's length away.
        learned = maskable if self.config.eos_in_loss else maskable & (place < lengths[:, None])
        masked = masked & learned
        logits = model(input_ids=noisy, attention_mask=visible, positions=masked).logits
        rows = masked.nonzero()[:, 0]
        return diffusion_loss(logits, ids[masked], t.to(ids.device)[rows], int(learned.sum().clamp(min=1)))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[dict[str, Tensor]]:
        """Every validation example once, the last batch short (training drops it)."""
        examples: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(examples, self.args.per_device_eval_batch_size, collate_fn=self.data_collator)

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Validation loss (nats a token, 1/t-weighted) at each of EVAL_TIMES on the longest canvas, and their mean."""
        model = self._wrap_model(self.lm.model, training=False)
        model.eval()
        sums = torch.zeros(len(EVAL_TIMES))
        examples = 0
        for number, batch in enumerate(self.get_eval_dataloader(eval_dataset)):
            batch = self._prepare_inputs(batch)
            for i, time in enumerate(EVAL_TIMES):
                t = torch.full((len(batch["ids"]),), time)
                generator = torch.Generator().manual_seed(number * 10 + i)
                with self.compute_loss_context_manager():
                    loss = self.loss_at(model, batch, t, max(self.config.canvas), 0.0, generator)
                sums[i] += loss.float().cpu() * len(batch["ids"])
            examples += len(batch["ids"])
        model.train()
        means = (sums / examples).tolist()
        metrics = {f"{metric_key_prefix}_loss_t{t}": m for t, m in zip(EVAL_TIMES, means, strict=True)}
        metrics[f"{metric_key_prefix}_loss"] = sum(means) / len(means)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


_MAY_CHANGE = ("output", "log_every", "eval_every", "save_every", "report_to")


def train(config: SFTConfig) -> Path:
    """Run (or, if ``output`` holds a checkpoint, go on with) a supervised run; returns the final checkpoint's folder.

    Raises:
        UserError: for an unknown model or task, or responses longer than every canvas.
    """
    output = Path(config.output)
    checkpoint = claim(output, config, _MAY_CHANGE)
    if config.new_model is not None:
        lm = MaskedLM.wrap(*new_model(config.new_model, config.seed), name="new model")
    else:
        lm = load(str(config.model))
    lm.model.config._attn_implementation = config.attention
    per_task = len(config.tasks)
    counts = config.problems if len(config.problems) == per_task else config.problems * per_task
    training = Examples(lm, config.tasks, "train", counts, config.seed)
    validation = Examples(lm, config.tasks, "validation", [config.validation_problems] * per_task, 0)
    longest = max(len(r["response"]) for r in training.rows)
    if longest > max(config.canvas):
        raise UserError(f"the longest response has {longest} tokens: raise canvas {config.canvas} to hold it")
    if len(training) < config.batch_size:
        raise UserError(f"{len(training)} training examples do not fill a batch of {config.batch_size}: raise problems")
    prompt_width = max(training.prompt_width, validation.prompt_width)
    if prompt_width + max(config.canvas) > lm.max_length:
        raise UserError(
            f"prompts of {prompt_width} tokens and a canvas of {max(config.canvas)} exceed the model's {lm.max_length}"
        )
    if config.compile:
        lm.model.model.compile(dynamic=False)
    cpu = not torch.cuda.is_available()
    trainer = DiffusionTrainer(
        lm,
        config,
        prompt_width,
        train_dataset=training,
        eval_dataset=validation,
        data_collator=Collate(lm, prompt_width, max(config.canvas)),
        args=TrainingArguments(
            output_dir=str(output),
            max_steps=config.steps,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={  # constant, then linear to zero
                "num_decay_steps": max(1, round(config.decay_share * config.steps)),
                "decay_type": "linear",
            },
            warmup_steps=config.warmup_steps,
            bf16=config.bf16,
            use_cpu=cpu,
            dataloader_pin_memory=not cpu,
            dataloader_drop_last=True,
            remove_unused_columns=False,
            logging_steps=config.log_every,
            eval_strategy="steps",
            eval_steps=config.eval_every,
            save_steps=config.save_every,
            save_total_limit=2,
            report_to=config.report_to or "none",
            seed=config.seed,
            data_seed=config.seed,
        ),
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    final = output / "final"
    if trainer.is_world_process_zero():
        export(lm, final)
    return final
