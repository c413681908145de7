"""What all trainings share: a ``transformers.Trainer`` made from a run's settings."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import IntervalStrategy, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from unmask.errors import UserError, unknown
from unmask.io.files import writing_to
from unmask.models.adapters import adapter_config, add_adapter, check_precision
from unmask.models.backbone import FLEX
from unmask.models.load import as_masked_lm, load, without_progress_bars
from unmask.models.masked_lm import MaskedLM
from unmask.training.checkpoints import checkpoints, seal, verify
from unmask.training.config import RunConfig

Model = MaskedLM | PreTrainedModel | str
"""What a trainer trains; text is a name or path that ``load`` takes."""


def training_arguments(config: RunConfig, **more: Any) -> TrainingArguments:
    """The Trainer's settings: those of a run that bear its names, then ``more``, then ``trainer_args``."""
    known = [f.name for f in fields(TrainingArguments) if f.init]
    for name in config.trainer_args:
        if name not in known:
            raise unknown("field of TrainingArguments", name, known)
    cpu = not torch.cuda.is_available()
    values: dict[str, Any] = {name: getattr(config, name) for name in known if getattr(config, name, None) is not None}
    values |= {
        "eval_strategy": "steps",
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "use_cpu": cpu,
        "dataloader_pin_memory": not cpu,
        "remove_unused_columns": False,
        "save_total_limit": 2,
        "report_to": config.report_to or "none",
        "data_seed": config.seed,
        "disable_tqdm": not sys.stderr.isatty(),  # a log file gets plain lines
    }
    return TrainingArguments(**{**values, **more, **config.trainer_args})


def prepare_model(
    model: Model,
    config: RunConfig,
    processing_class: PreTrainedTokenizerBase | None,
    peft_config: Any = None,
    dynamic: bool | None = None,
) -> MaskedLM:
    """What a trainer takes as ``model``, with the run's dtype, attention and adapter, compiled if asked. Raises UserError."""
    if isinstance(model, str):
        lm = load(model, config.dtype)
        check_precision(lm, config.lora_r)
    else:
        lm = as_masked_lm(model, processing_class)
    lm.model.config._attn_implementation = (
        FLEX if config.attn_implementation == "flex_attention" else config.attn_implementation
    )
    if config.compile:
        lm.model.base_model.compile(dynamic=dynamic)
    if peft_config is None and config.lora_r is not None:
        dropout = getattr(config, "lora_dropout", 0.0)
        peft_config = adapter_config(config.lora_r, config.lora_alpha, config.lora_target_modules, dropout)
    return lm if peft_config is None else add_adapter(lm, peft_config, config.seed)


def plain_log() -> AbstractContextManager[None]:
    """No progress bars of saved shards where standard error is no terminal."""
    return nullcontext() if sys.stderr.isatty() else without_progress_bars()


class RunTrainer(Trainer):
    """transformers.Trainer that resumes from whole checkpoints only, and never deletes a copy under another name."""

    config: RunConfig
    notice = ""
    """What a run says on standard error before it starts."""

    def __init__(
        self, lm: MaskedLM, args: TrainingArguments, train_dataset: Any, eval_dataset: Any, collate: Any, callbacks: Any
    ) -> None:
        self.lm = lm
        if lm.model.config._attn_implementation == FLEX and (lm.block_length is None or args.device.type == "cpu"):
            where = "a GPU" if lm.block_length else "block-causal models"
            raise UserError(f"attn_implementation=flex_attention is for {where}: set sdpa or eager")
        # Checkpoints are removed in ``_save_checkpoint``: the Trainer goes by names that are not exact.
        self.checkpoint_limit, args.save_total_limit = args.save_total_limit, None
        if not eval_dataset:
            args.eval_strategy, args.eval_on_start = IntervalStrategy.NO, False
        data: dict[str, Any] = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "data_collator": collate}
        with writing_to(str(args.output_dir), "output_dir"):  # the Trainer makes its folder
            super().__init__(lm.model, args, processing_class=lm.tokenizer, callbacks=callbacks, **data)
        if self.is_fsdp_enabled:
            if not self.accelerator.is_fsdp2:
                raise UserError("FSDP of version 1 is not supported: set fsdp_version to 2")
            if lm.model.get_output_embeddings() is lm.model.get_input_embeddings():
                raise UserError(f"the embedding of {lm.name} is its head too, which FSDP cannot shard: use DDP")
            # Every pass reduces its gradient, which would else be whole on every rank. Weights are gathered in bfloat16, but
            # gradients are summed in float32, and log-probabilities stay float32 (accelerate rounds both to bfloat16).
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
            gathered = torch.bfloat16 if args.bf16 else None
            policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy
        if self.is_deepspeed_enabled and args.bf16:  # its own bf16 mode rounds all weights, a float32 adapter's too
            engine = self.accelerator.state.deepspeed_plugin.deepspeed_config
            engine["bf16"] = {"enabled": False}
            autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}  # float32 gradients
            engine["torch_autocast"] = autocast

    def autocast(self) -> AbstractContextManager[None]:
        """What the run's precision asks of a forward pass that no engine has wrapped."""
        if self.is_deepspeed_enabled:
            return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)
        return self.accelerator.autocast()

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[None]:
        """Autocast for FSDP and DeepSpeed; with others accelerate puts it into the model's forward pass."""
        return self.autocast() if self.is_fsdp_enabled or self.is_deepspeed_enabled else nullcontext()

    def inputs(self) -> dict[str, str]:
        """Fingerprints of what the run starts from, so that it cannot resume with anything else."""
        digest = hashlib.sha256()
        for row in cast(Any, self.train_dataset):
            pair = [row[side] for side in ("chosen", "rejected") if side in row]
            for value in (*map(row.get, ("prompt", "response", "teacher")), *pair):
                digest.update(value.tobytes() if hasattr(value, "tobytes") else json.dumps(value).encode())
        return {"model's weights": self.lm.weights, "training data": digest.hexdigest()[:16]}

    def rank_share(self, count: int) -> list[tuple[int, bool]]:
        """Which of ``count`` parts of a validation are this process's, and whether each counts: as many on every one, so that
        FSDP's collectives meet."""
        numbers = range(
            self.args.process_index, -(-count // self.args.world_size) * self.args.world_size, self.args.world_size
        )
        return [(number % count, number < count) for number in numbers]

    def report(self, metrics: dict[str, float]) -> dict[str, float]:
        """Log the metrics of a validation, and tell the callbacks. Raises UserError where the best cannot be told by them."""
        best = self.args.metric_for_best_model
        if best is not None and f"eval_{best.removeprefix('eval_')}" not in metrics:
            raise unknown("metric_for_best_model", best, metrics)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. Raises UserError where the checkpoint to resume from is not as it was saved, and, before anything
        is overwritten, where the folder holds checkpoints and none is resumed."""
        found = checkpoints(Path(str(self.args.output_dir)))
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(found[-1]) if found else None
        elif found and not resume_from_checkpoint:
            fix = "pass resume_from_checkpoint=True, or choose another output_dir"
            raise UserError(f"{self.args.output_dir} holds checkpoints already: {fix}")
        if resume_from_checkpoint:
            if self.is_world_process_zero():
                verify(Path(resume_from_checkpoint))
            self.restore(Path(resume_from_checkpoint))
        with self.without_adapter_casts():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def without_adapter_casts(self) -> AbstractContextManager[None]:
        """While the model runs under autocast, peft need not cast an adapter's inputs to float32, and autocast back."""
        if not (self.args.bf16 and hasattr(self.lm.model, "peft_config")):
            return nullcontext()
        from peft.helpers import disable_input_dtype_casting

        return disable_input_dtype_casting(self.lm.model)

    def restore(self, checkpoint: Path) -> None:
        """Take up what a checkpoint holds besides the Trainer's own files."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:  # other shapes
            reason = str(error).partition("\n")[0][:120]
            raise UserError(f"{resume_from_checkpoint} is not of this model ({reason}): remove it") from None

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Keys that do not fit are no matter for a warning; a missing one may share its weights with one that is there."""
        parameters = dict(cast(Any, self.model).named_parameters(remove_duplicate=False))
        there = {id(p) for name, p in parameters.items() if name not in load_result.missing_keys}
        missing = [name for name in load_result.missing_keys if id(parameters.get(name)) not in there]
        if strange := [*missing, *load_result.unexpected_keys]:
            differ = f"{len(strange)} keys differ, among them {strange[0]}"
            raise UserError(f"the checkpoint in {self.args.output_dir} is not of this model ({differ}): remove it")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with plain_log(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="peft")  # it does not know where a shipped base model lies
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        output = Path(str(self.args.output_dir))
        seal(output / f"checkpoint-{self.state.global_step}")
        best = Path(self.state.best_model_checkpoint or "").name if self.args.load_best_model_at_end else ""
        for old in checkpoints(output)[: -self.checkpoint_limit if self.checkpoint_limit else 0]:
            if old.name != best:
                shutil.rmtree(old, ignore_errors=True)
