"""Settings of a supervised run: read without torch, so that help and a typo answer at once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from unmask.config import LORA_TARGETS, check_reporters, expand_paths
from unmask.errors import UserError, check_at_least, check_positive

LONGEST = 4096
"""Tokens of a row of chat data, unless ``max_length`` says another number."""
OVERLONG = ("refuse", "truncate", "drop")
_OPTIMIZERS = ("muon", "adamw")
_ATTENTION = ("sdpa", "eager")
_SCHEDULES = ("warmup_stable_decay", "constant_with_warmup", "linear", "cosine")


@dataclass
class SFTConfig:
    """One supervised run."""

    output: str
    """The run folder: checkpoints, logs, and ``final`` (a plain checkpoint) at the end."""
    tasks: list[str] = field(default_factory=list)
    """Task specs whose worked responses are learned, in equal shares, e.g. ``sudoku:style=compact``; or give ``data``."""
    data: str | None = None
    """Chat data instead of tasks: a hub data set, or a .json, .jsonl or .parquet file or folder, with the columns messages,
    prompt + completion, or those of s1K."""
    model: str | None = None
    """Start from this model; or give ``new_model``."""
    new_model: dict[str, Any] | None = None
    """Start from random weights: LLaDAConfig fields (``d_model``, ``n_layers``, …)."""
    dtype: str = "float32"
    """Dtype of the model's weights, as ``load`` takes it; bfloat16 for adapters on large models (their own stay float32)."""
    problems: list[int] = field(default_factory=lambda: [20_000])
    """Training problems: one number for every task, or one for each. A smaller set is repeated to give equal shares."""
    validation_problems: int = 128
    """Validation problems a task."""
    canvas: list[int] = field(default_factory=lambda: [128])
    """Canvas lengths for tasks, taken in turn step by step. A response that does not fit is left out of that step's loss."""
    max_length: int | None = None
    """Tokens of a row of ``data``, prompt and response; every row is filled with EOS up to it. By default the longest row's, up
    to 4096 and what the model takes."""
    overlong: str = "refuse"
    """Rows of ``data`` longer than that: ``refuse`` them, ``truncate`` the response, or ``drop`` the row."""
    validation_share: float = 0.01
    """Share of ``data``'s prompts that are held out for validation, at least one; 0 for none."""
    lora_r: int | None = None
    """Rank of a low-rank adapter (LoRA, arXiv 2106.09685) to train; ``none`` trains all weights."""
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: str = LORA_TARGETS
    """Regular expression over module names; by default every matrix of every block."""
    steps: int | None = None
    """Updates; or give ``epochs``."""
    epochs: float | None = None
    """Passes over the data; or give ``steps``."""
    batch_size: int = 64
    """Examples of one forward pass on each process."""
    gradient_accumulation_steps: int = 1
    """Forward passes of one update."""
    learning_rate: float | None = None
    """By default 1e-5, for an adapter 1e-4; from random weights 2e-3."""
    warmup_steps: int | None = None
    """Updates in which the learning rate rises. By default a tenth of all, at most 100; from random weights 100."""
    lr_scheduler: str = "warmup_stable_decay"
    """``warmup_stable_decay`` (constant, then linear to zero), ``constant_with_warmup``, ``linear`` or ``cosine``."""
    decay_share: float = 0.4
    """The last share of the updates, over which ``warmup_stable_decay`` falls."""
    optimizer: str | None = None
    """``muon`` (matrices; AdamW for the rest) or ``adamw``. By default ``adamw``; from random weights ``muon``."""
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    prompt_masking: float | None = None
    """Share of rows in which the prompt is masked and learned too. By default 0, as LLaDA is fine-tuned; from random weights
    0.25."""
    eos_in_loss: bool = True
    """Learn the EOS filling after the response (LLaDA does); without it only the end-of-turn token is learned."""
    bf16: bool = True
    """Autocast to bfloat16 (float32 weights stay float32)."""
    gradient_checkpointing: bool = False
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
        expand_paths(self)
        if (self.model is None) == (self.new_model is None):
            raise UserError("give either model (a checkpoint to start from) or new_model (the shape of a new one)")
        if bool(self.tasks) == (self.data is not None):
            raise UserError("give either tasks (with worked responses) or data (a chat data set)")
        if self.new_model is not None and (self.lora_r is not None or self.dtype != "float32"):
            raise UserError(
                f"lora_r={self.lora_r}, dtype={self.dtype} are for a model; a new_model trains whole, in float32"
            )
        for name, choices in (
            ("optimizer", _OPTIMIZERS),
            ("attention", _ATTENTION),
            ("lr_scheduler", _SCHEDULES),
            ("overlong", OVERLONG),
        ):
            if (getattr(self, name) or choices[0]) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}: give {', '.join(choices[:-1])} or {choices[-1]}")
        if len(self.problems) not in (1, len(self.tasks)) or min(self.problems) < 1:
            raise UserError(
                f"problems is {self.problems}: give one number, or one for each of the {len(self.tasks)} tasks"
            )
        given = {name for name, value in vars(self).items() if value is not None}
        check_at_least(self, 1, "validation_problems", "batch_size", "gradient_accumulation_steps")
        check_at_least(self, 1, "lora_alpha", "log_every", "eval_every", "save_every")
        check_at_least(self, 1, *(name for name in ("steps", "lora_r", "max_length") if name in given))
        if not self.canvas or min(self.canvas) < 1:
            raise UserError(f"canvas is {self.canvas}: give lengths of 1 or more")
        if (self.steps is None) == (self.epochs is None):
            raise UserError(f"steps is {self.steps}, epochs {self.epochs}: give one of them")
        check_positive(self, *(name for name in ("learning_rate", "max_grad_norm", "epochs") if name in given))
        if (self.warmup_steps or 0) < 0 or not 0 <= self.weight_decay < 1 or not 0 <= self.lora_dropout < 1:
            raise UserError(
                f"warmup_steps={self.warmup_steps}, weight_decay={self.weight_decay}, lora_dropout={self.lora_dropout}: "
                "give 0 or more, and below 1 for the last two"
            )
        for name in ("prompt_masking", "decay_share", "validation_share"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: give a share between 0 and 1")
        check_reporters(self.report_to)

    @property
    def canvases(self) -> list[int]:
        """Columns from a batch's first canvas column on: of chat data all, since each row's canvas starts elsewhere."""
        return self.canvas if self.data is None else [self.max_length or LONGEST]

    def resolved(self) -> SFTConfig:
        """These settings, with the defaults of their kind of run, from random weights or from a model, where none is given."""
        if self.model is None:
            values: dict[str, Any] = {"optimizer": "muon", "learning_rate": 2e-3, "warmup_steps": 100}
            values["prompt_masking"] = 0.25
        else:
            values = {
                "optimizer": "adamw",
                "learning_rate": 1e-5 if self.lora_r is None else 1e-4,
                "prompt_masking": 0.0,
            }
        return replace(self, **{name: value for name, value in values.items() if getattr(self, name) is None})
