"""Run folders: whose they are, where a run resumes, and the plain checkpoint at its end."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerState

from unmask.config import read_config, save_config
from unmask.errors import UserError, check_own_folder
from unmask.io.files import folder_removed, read_json, write_json, writing_to
from unmask.models.load import load, warn_of_slow_bf16
from unmask.models.masked_lm import MaskedLM
from unmask.training.checkpoints import checkpoints, verify
from unmask.training.config import MAY_CHANGE, RunConfig
from unmask.training.model_card import model_card
from unmask.training.trainer import RunTrainer, plain_log


def run(trainer: RunTrainer) -> Path:
    """Train, or resume in a folder that holds a checkpoint; returns the folder of the final plain checkpoint.

    Raises:
        UserError: if the folder cannot be written, or holds checkpoints that are damaged or of a run with other settings,
            weights or data.
    """
    config, args = trainer.config, trainer.args
    output, first = Path(config.output_dir), trainer.is_world_process_zero()
    inputs = trainer.inputs()
    checkpoint = _newest(output, config, inputs)
    if first:
        check_own_folder(str(output))
        with writing_to(output, "--output-dir"):
            output.mkdir(parents=True, exist_ok=True)
            write_json(output / "inputs.json", inputs)
            save_config(config, output / "config.yaml")
        if trainer.notice:
            print(trainer.notice, file=sys.stderr)
        if args.max_steps <= args.warmup_steps:
            print(
                f"unmask: warning: all {args.max_steps} updates fall into the warm-up of {args.warmup_steps:g}, so "
                "learning_rate is never reached: set warmup_steps lower or train longer",
                file=sys.stderr,
            )
        if config.bf16:
            warn_of_slow_bf16(args.device)
    trainer.add_callback(_FolderCheck())
    args.eval_on_start = args.eval_on_start and checkpoint is None  # a resumed run has that line already
    last = output / f"checkpoint-{args.max_steps}"
    with _writing_run(output):
        if checkpoint != last:  # the Trainer would take a finished run one step further
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if first:
            verify(last)
            state = TrainerState.load_from_json(str(last / "trainer_state.json"))
            best = output / Path(state.best_model_checkpoint or last).name if args.load_best_model_at_end else last
            verify(best)
            lm = load(str(best), config.dtype, "cpu")  # whole also where weights are sharded; an adapter is merged
            if trainer.lm.task_defaults:  # an adapter's base may not have them
                lm.model.config.task_defaults = trainer.lm.task_defaults
            history = [line for line in state.log_history if line["step"] <= int(best.name.rpartition("-")[2])]
            export(lm, output / "final", model_card(lm, config, history))
    trainer.accelerator.wait_for_everyone()
    return output / "final"


def _newest(output: Path, config: RunConfig, inputs: dict[str, str]) -> Path | None:
    """The newest whole checkpoint of a run folder, if any. Raises UserError where it is of a run with other settings, or that
    began with other weights or data."""
    found = checkpoints(output)
    if found and not all((output / name).is_file() for name in ("config.yaml", "inputs.json")):
        raise UserError(f"{output} holds checkpoints of another training: choose another --output-dir or remove it")
    if found:
        before, now = asdict(read_config(type(config), output / "config.yaml")), asdict(config)
        if changed := [k for k in now if before[k] != now[k] and k not in MAY_CHANGE]:
            raise UserError(
                f"{output} holds a run with other {', '.join(changed)}: choose another --output-dir or remove it"
            )
        began = read_json(output / "inputs.json", dict.fromkeys(inputs, str), f"remove {output}")
        if changed := [name for name in inputs if began[name] != inputs[name]]:
            what = f"{' and '.join(changed)} changed since the run in {output} began"
            raise UserError(f"the {what}: choose another --output-dir or remove it")
    return found[-1] if found else None


class _FolderCheck(TrainerCallback):
    """Ends a run whose folder is gone: the Trainer would make it anew, without what the run needs to resume."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not (Path(args.output_dir) / "config.yaml").is_file():
            raise folder_removed(Path(args.output_dir))


@contextmanager
def _writing_run(folder: Path) -> Iterator[None]:
    """Turns what a run raises that cannot write to its folder, as on a full disk, into a UserError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # the latter two of torch and safetensors
        if not (folder / "config.yaml").is_file():
            raise folder_removed(folder) from None
        here = isinstance(error, OSError) and str(error.filename or "").startswith(str(folder))
        if not here and "No space left" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise UserError(
            f"cannot write to {folder}: {getattr(error, 'strerror', None) or 'no space left'}; make room and start the same "
            "command again, or choose another --output-dir"
        ) from None


def export(lm: MaskedLM, folder: Path, card: str = "") -> Path:
    """Weights, tokenizer and (if any) a README.md as a plain checkpoint that ``load`` takes, whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with plain_log():
        lm.model.save_pretrained(partial, max_shard_size="5GB")
    lm.tokenizer.save_pretrained(partial)
    if card:
        (partial / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder
