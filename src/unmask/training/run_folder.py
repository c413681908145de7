"""Run folders: whose they are, where a run goes on, and the plain checkpoint at its end."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerState

from unmask.config import read_config, save_config
from unmask.errors import UserError, check_own_folder
from unmask.io.files import removed, writing_to
from unmask.models.load import load
from unmask.models.masked_lm import MaskedLM
from unmask.training.model_card import model_card
from unmask.training.resume import check_state, checkpoints, reading


def claim(output: Path, config: Any, may_change: Collection[str], write: bool = True) -> Path | None:
    """Make the run folder this run's; returns its newest whole checkpoint, if any.

    Args:
        config: the run's dataclass; saved as ``config.yaml``. may_change: fields that a resumed run may have different.
        write: whether this process writes (only one of several may).

    Raises:
        UserError: if the folder cannot be written, or holds checkpoints of a run with other settings.
    """
    if write:
        check_own_folder(str(output))
    # The Trainer writes trainer_state.json last, so a checkpoint without it was cut off.
    complete = [p for p in checkpoints(output) if (p / "trainer_state.json").is_file()]
    newest = complete[-1] if complete else None
    if newest is not None:
        check_state(newest)
    if newest is not None and (output / "config.yaml").is_file():
        before, now = asdict(read_config(type(config), output / "config.yaml")), asdict(config)
        changed = [k for k in now if before[k] != now[k] and k not in may_change]
        if changed:
            raise UserError(f"{output} holds a run with other {', '.join(changed)}: give another --output or remove it")
    if write:
        with writing_to(output):
            output.mkdir(parents=True, exist_ok=True)
            save_config(config, output / "config.yaml")
    return newest


def warn_of_warmup(warmup_steps: int | None, steps: int) -> None:
    """Say so where a run ends before its learning rate is reached."""
    if steps <= (warmup_steps or 0):
        print(
            f"unmask: warning: all {steps} updates fall into the warm-up of {warmup_steps}, so learning_rate is never reached: "
            "set warmup_steps lower or train longer",
            file=sys.stderr,
        )


class FolderCheck(TrainerCallback):
    """Ends a run whose folder is gone: the Trainer would make it anew, without what the run needs to go on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not (self.folder / "config.yaml").is_file():
            raise removed(self.folder)


@contextmanager
def writing_run(folder: Path) -> Iterator[None]:
    """Turns what a run raises that cannot write to its folder, gone or on a full disk, into a UserError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, BrokenPipeError):
            raise  # of standard output
        if not (folder / "config.yaml").is_file():
            raise removed(folder) from None
        if isinstance(error, OSError) and str(error.filename or "").startswith(str(folder)):
            raise UserError(f"cannot write to {folder}: {error.strerror}; give another --output") from None
        if "No space left" in str(error) or "PytorchStreamWriter" in str(error):
            raise UserError(
                f"cannot write to {folder}: no space left; make room, then give the same command again"
            ) from None
        raise


def finish(output: Path, checkpoint: Path, config: Any, command: str) -> Path:
    """``final`` from a run's last checkpoint: whole also where the weights are sharded; an adapter is merged."""
    with reading(checkpoint, "trainer_state.json"):
        history = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).log_history
    try:
        lm = load(str(checkpoint), config.dtype, "cpu")
    except UserError as error:
        raise UserError(
            f"{error}; or remove {checkpoint}, and the same command goes on from the one before it"
        ) from None
    with writing_run(output):
        return export(lm, output / "final", model_card(lm, config, command, history))


def export(lm: MaskedLM, folder: Path, card: str = "") -> Path:
    """Weights, tokenizer and (where it is given) a README.md as a plain checkpoint that ``load`` takes, whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    lm.model.save_pretrained(partial, max_shard_size="5GB")
    lm.tokenizer.save_pretrained(partial)
    if card:
        (partial / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder
