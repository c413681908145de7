"""Settings of training runs, in the names of ``transformers.TrainingArguments`` and TRL; read without torch."""

from __future__ import annotations

import os
import typing
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import tyro

from unmask.config import LORA_TARGETS, check_reporters, convert
from unmask.errors import UserError, check_at_least, check_positive

LONGEST = 4096
"""Tokens of a row of chat data, unless ``max_length`` says another number."""
MAY_CHANGE = [
    "output_dir",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "report_to",
    "log_completions",
    "rows_per_forward",
]
"""Settings in which a resumed run may differ from before."""


@dataclass(kw_only=True)
class RunConfig:
    """What every training takes. Fields of ``TrainingArguments`` are passed on to it by name."""

    command: ClassVar[str]

    output_dir: str
    """The run folder: config.yaml, checkpoints, logs, and ``final`` (a plain checkpoint) at the end."""
    tasks: list[str] = field(default_factory=list)
    """Task specs, trained in equal shares, e.g. ``sudoku countdown:style=compact``."""
    model: str | None = None
    """A shipped model's name, a hub name, or the folder of a checkpoint or adapter (which is merged)."""
    dtype: str = "float32"
    """Dtype of the weights, as ``load`` takes it; bfloat16 for adapters on large models (their own stay float32)."""
    lora_r: int | None = None
    """Rank of a low-rank adapter (LoRA, arXiv 2106.09685) to train; ``none`` trains all weights."""
    lora_alpha: int = 32
    lora_target_modules: str = LORA_TARGETS
    """Regular expression over module names; by default every matrix of every block."""
    validation_problems: int = 128
    """Validation problems a task."""
    per_device_train_batch_size: int = 64
    adam_beta2: float = 0.999
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    bf16: bool = True
    """Autocast to bfloat16 (float32 weights stay float32)."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    compile: bool = False
    """torch.compile the model without its head."""
    attn_implementation: Literal["sdpa", "eager", "flex_attention"] = "sdpa"
    """``sdpa``, ``eager`` (faster backward on CPUs), or for block-causal models on a GPU ``flex_attention``."""
    seed: int = 0
    eval_steps: int = 500
    """Updates between validations."""
    save_steps: int = 500
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    trainer_args: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
    """Any other fields of ``transformers.TrainingArguments``."""

    def __post_init__(self) -> None:
        self.output_dir = os.fspath(self.output_dir)
        for name, hint in typing.get_type_hints(type(self)).items():
            if typing.get_origin(hint) is not ClassVar:
                setattr(self, name, convert(getattr(self, name), hint, name))
        counts = ("validation_problems", "max_steps", "per_device_train_batch_size", "eval_steps", "save_steps")
        check_at_least(self, 1, *self.chosen("lora_r", "lora_alpha", *counts))
        check_at_least(self, 0, *self.chosen("warmup_steps"))
        check_positive(self, "max_grad_norm", *self.chosen("learning_rate"))
        for name in ("weight_decay", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: choose 0 or more and below 1")
        check_reporters(self.report_to)

    def chosen(self, *names: str) -> list[str]:
        """Those of the fields that are not none."""
        return [name for name in names if getattr(self, name) is not None]


@dataclass(kw_only=True)
class SFTConfig(RunConfig):
    """One supervised run."""

    command: ClassVar[str] = "sft"

    data: str | None = None
    """Chat data instead of tasks: a hub data set, or a .json, .jsonl or .parquet file or folder, with the columns messages,
    prompt + completion, or those of s1K."""
    new_model: Annotated[dict[str, Any] | None, tyro.conf.Suppress] = None
    """Start from random weights instead of a model: LLaDAConfig fields (``d_model``, ``n_layers``, …)."""
    task_defaults: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
    """Parameters by task name that the checkpoint will ask of ``eval``, beside those of ``model``."""
    block_length: int | None = None
    """Make the attention block-causal, in blocks of so many tokens (block diffusion). By default it is as the model has it."""
    problems: list[int] = field(default_factory=lambda: [20_000])
    """Training problems: one number for every task, or one for each. A smaller set is repeated to give equal shares."""
    canvas: list[int] = field(default_factory=lambda: [128])
    """Canvas lengths for tasks, taken in turn step by step. A response that does not fit is left out of that step's loss."""
    max_length: int | None = None
    """Tokens of a row of ``data``, prompt and response; every row is filled with EOS up to it. By default the longest row's, up
    to 4096 and what the model takes."""
    overlong: Literal["refuse", "truncate", "drop"] = "refuse"
    """Rows of ``data`` longer than that: ``refuse`` them, ``truncate`` the response, or ``drop`` the row."""
    validation_share: float = 0.01
    """Share of ``data``'s prompts that are held out for validation, at least one; 0 for none."""
    lora_dropout: float = 0.0
    max_steps: int | None = None
    """Updates."""
    num_train_epochs: float | None = None
    """Passes over the data, instead of ``max_steps``."""
    gradient_accumulation_steps: int = 1
    """Forward passes of one update, each of ``per_device_train_batch_size`` examples on each process."""
    learning_rate: float | None = None
    """By default 1e-5, for an adapter 1e-4; from random weights 2e-3."""
    warmup_steps: int | None = None
    """Updates in which the learning rate rises. By default a tenth of all, at most 100; from random weights 100."""
    lr_scheduler_type: Literal["warmup_stable_decay", "constant_with_warmup", "linear", "cosine"] = (
        "warmup_stable_decay"
    )
    decay_share: float = 0.4
    """The last share of the updates, over which ``warmup_stable_decay`` falls to zero; before it is constant."""
    optimizer: Literal["muon", "adamw"] | None = None
    """``muon`` (matrices; AdamW for the rest) or ``adamw``. By default ``adamw``; from random weights ``muon``."""
    prompt_masking: float | None = None
    """Share of rows in which the prompt is masked and learned too. By default 0, as LLaDA is fine-tuned; from random weights
    0.25."""
    eos_in_loss: bool = True
    """Learn the EOS filling after the response (LLaDA does); without it only the end-of-turn token is learned."""
    logging_steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is not None and self.new_model is not None:
            raise UserError("choose either model (a checkpoint to start from) or new_model (the shape of a new one)")
        if self.tasks and self.data is not None:
            raise UserError("choose either tasks (with worked responses) or data (a chat data set)")
        for name, table in self.task_defaults.items():
            if not isinstance(table, dict):
                raise UserError(f"task_defaults of {name} is {table!r}: write a table of the task's parameters")
        if self.new_model is not None and (self.lora_r is not None or self.dtype != "float32"):
            raise UserError(
                f"lora_r={self.lora_r}, dtype={self.dtype} are for a model; a new_model trains whole, in float32"
            )
        for name in ("problems", "canvas"):
            if min(getattr(self, name), default=0) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: choose numbers of 1 or more")
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise UserError(f"max_steps={self.max_steps} and num_train_epochs={self.num_train_epochs}: set one of them")
        check_at_least(
            self, 1, "gradient_accumulation_steps", "logging_steps", *self.chosen("max_length", "block_length")
        )
        check_positive(self, *self.chosen("num_train_epochs"))
        for name in self.chosen("prompt_masking", "decay_share", "validation_share", "lora_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: choose a share from 0 to 1")

    def resolved(self) -> SFTConfig:
        """These settings, with the defaults for a new model or a given one where none is set."""
        new = self.new_model is not None
        defaults: dict[str, Any] = {
            "optimizer": "muon" if new else "adamw",
            "learning_rate": 2e-3 if new else 1e-5 if self.lora_r is None else 1e-4,
            "prompt_masking": 0.25 if new else 0.0,
            "warmup_steps": 100 if new else None,
        }
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})
