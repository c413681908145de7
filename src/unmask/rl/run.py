"""``unmask rl``: one run from a configuration file to a plain checkpoint, resumable at any point."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from unmask.errors import UserError
from unmask.io.files import atomic_write, read_lines, writing_to
from unmask.io.schema import COUNT
from unmask.models.adapters import adapter_config, check_precision
from unmask.models.load import load, warn_of_slow_bf16
from unmask.models.masked_lm import MaskedLM
from unmask.rl.arguments import DiffusionGRPOConfig
from unmask.rl.config import MAY_CHANGE, GRPOSettings, RLConfig
from unmask.rl.rewards import Row, reward_functions
from unmask.rl.trainer import DiffusionGRPOTrainer
from unmask.tasks import Task, make_task
from unmask.training.run_folder import FolderCheck, claim, finish, warn_of_warmup, writing_run

_TIMES = ("seconds_rollout", "seconds_update")


def problem_rows(lm: MaskedLM, tasks: list[Task], split: str, count: int | None, seed: int) -> list[Row]:
    """``count`` problems of every task as rows of ``prompt``, ``problem`` and ``task``, tasks taken in turn.

    Without a count, as many of each as the task with the fewest has. Raises UserError where a task has fewer than ``count``.
    """
    columns = []
    for task in tasks:
        problems = task.problems(split, count, seed)
        if len(problems) < (count or 1):
            raise UserError(f"task {task.name} has {len(problems)} {split} problems, not {count}: ask for fewer")
        columns.append(
            [{"prompt": lm.chat(task.instruction(p), task.prefill), "problem": p, "task": task} for p in problems]
        )
    return [row for rows in zip(*columns, strict=False) for row in rows]


class RunLog(TrainerCallback):
    """metrics.jsonl, times.jsonl and completions.jsonl of a run folder; a resumed run first drops what came after its start.

    Times stand in a file of their own: everything else is the same, to the bit, in a resumed run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trainer: DiffusionGRPOTrainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        for name in ("metrics", "times", "completions"):
            path = self.folder / f"{name}.jsonl"
            # The validation before the first update belongs to step 0 of a fresh start only.
            lines = read_lines(path, {"step": COUNT}, "remove it, and the run goes on without what it held")
            kept = [e for e in lines if e["step"] <= state.global_step] if state.global_step else []
            with atomic_write(path) as partial:
                partial.write_text("".join(json.dumps(e) + "\n" for e in kept), encoding="utf-8")

    def _append(self, name: str, entry: dict[str, Any]) -> None:
        with (self.folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        times = {k: round(v, 3) for k, v in logs.items() if k in _TIMES}
        metrics = {k: v for k, v in logs.items() if k not in (*_TIMES, "epoch")}
        self._append("metrics", {"step": state.global_step, **metrics})
        if times:
            self._append("times", {"step": state.global_step, **times})
        if self.trainer is not None and "reward" in logs and args.log_completions:
            for completion in self.trainer.completions:
                self._append("completions", {"step": state.global_step, **completion})


class _BarOverMetrics(Progress):
    """The bar, and the metrics in lines of their own."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            yield Text(task.fields["shown"], style="dim")


class Bar(TrainerCallback):
    """A progress bar with reward, KL, length and passes."""

    def __init__(self) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.progress = _BarOverMetrics(*columns)
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.progress.start()
            self.line = self.progress.add_task("", total=state.max_steps, completed=state.global_step, shown="")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            short = {"reward": "{:.3f}", "kl": "{:.4f}", "length": "{:.1f}", "nfe": "{:.0f}", "replay_gap": "{:.1e}"}
            self.shown.update({k: f.format(logs[k]) for k, f in short.items() if k in logs})
            self.shown.update(
                {
                    k.removeprefix("eval_"): f"{v:.1%}"
                    for k, v in logs.items()
                    if k.startswith("eval_") and "solved" in k
                }
            )
            shown = "  ".join(f"{k} {v}" for k, v in self.shown.items())
            self.progress.update(self.line, completed=state.global_step, shown=shown)
            if not self.progress.console.is_terminal and "eval_reward" in logs:  # a log file gets a line a validation
                print(f"update {state.global_step}/{state.max_steps}  {shown}", flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stop()


def make_trainer(config: RLConfig, callbacks: list[TrainerCallback]) -> DiffusionGRPOTrainer:
    """The trainer of a run. Raises UserError for anything wrong in the request."""
    cpu = not torch.cuda.is_available()
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(GRPOSettings)}
    args = DiffusionGRPOConfig(
        **settings,
        output_dir=config.output,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type=config.lr_scheduler,
        adam_beta2=config.adam_beta2,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        activation_checkpointing=config.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=cpu,
        eval_strategy="steps",
        eval_steps=config.eval_every,
        save_steps=config.save_every,
        save_total_limit=2,
        report_to=config.report_to or "none",
        disable_tqdm=True,
        seed=config.seed,
        data_seed=config.seed,
    )
    lm = load(config.model, config.dtype)
    check_precision(lm, config.lora_r)
    lm.model.config._attn_implementation = config.attention
    tasks = [make_task(spec, lm.task_defaults) for spec in config.tasks]
    with args.main_process_first():  # one process fetches a data set, the others find it
        train_rows = problem_rows(lm, tasks, "train", config.problems, config.seed + 1)
        validation = problem_rows(lm, tasks, "validation", config.validation_problems, 0)
    functions, weights = map(list, zip(*reward_functions(config.reward, tasks), strict=True))
    args.reward_weights = args.reward_weights or weights
    adapter = None
    if config.lora_r is not None:
        adapter = adapter_config(config.lora_r, config.lora_alpha, config.lora_target_modules)
    with writing_to(config.output):  # the Trainer makes its folder
        return DiffusionGRPOTrainer(
            lm, functions, args, train_rows, validation, peft_config=adapter, callbacks=callbacks
        )


def train(config: RLConfig) -> Path:
    """Run (or, if ``output`` holds a checkpoint, go on with) a run; returns the folder of the final plain checkpoint.

    Raises:
        UserError: for anything wrong in the request, and for what goes wrong in rewards or the loss.
    """
    output = Path(config.output)
    log, bar = RunLog(output), Bar()
    trainer = make_trainer(config, [FolderCheck(output), log, bar])
    log.trainer = trainer
    for unwanted in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(unwanted)
    checkpoint = claim(output, config, MAY_CHANGE, trainer.is_world_process_zero())
    if trainer.is_world_process_zero():
        warn_of_warmup(config.warmup_steps, config.steps)
        if config.bf16:
            warn_of_slow_bf16(trainer.args.device)
    trainer.args.eval_on_start = checkpoint is None  # a resumed run has that line already
    try:
        with writing_run(output):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        bar.progress.stop()
    if trainer.is_world_process_zero():
        finish(output, output / f"checkpoint-{config.steps}", config, "rl")
    trainer.accelerator.wait_for_everyone()
    return output / "final"
