"""Run folders: whose they are, where a run goes on, and the plain checkpoint at its end."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unmask.config import read_config, save_config
from unmask.files import writing_to
from unmask.models.masked_lm import MaskedLM
from unmask.spec import UserError, check_own_folder


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
    complete = [p for p in output.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    newest = max(complete, key=lambda p: int(p.name.removeprefix("checkpoint-")), default=None)
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


def export(lm: MaskedLM, folder: Path) -> Path:
    """Weights and tokenizer as a plain checkpoint that ``load`` takes, whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    lm.model.save_pretrained(partial, max_shard_size="5GB")
    lm.tokenizer.init_kwargs.pop("auto_map", None)  # names Python files that are not saved
    lm.tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder
