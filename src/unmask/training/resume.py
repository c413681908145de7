"""Going on from a checkpoint: which there are, and what is damaged or foreign in one said in a sentence."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerState
from transformers.trainer_pt_utils import safe_globals

from unmask.errors import UserError
from unmask.models.load import check_adapter


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints that training made in a run folder, by their number of updates; a copy under another name is none."""
    found = [p for p in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def check_state(checkpoint: Path) -> None:
    """Raises UserError where a checkpoint's trainer_state.json is not one of its number of updates."""
    with reading(checkpoint, "trainer_state.json"):
        state, usual = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")), TrainerState()
        for field in fields(TrainerState):
            value, like = getattr(state, field.name), getattr(usual, field.name)
            if not (like is None or type(value) is type(like) or {type(value), type(like)} == {int, float}):
                raise ValueError(f"{field.name} is {value!r:.40}")
        if checkpoint.name != f"checkpoint-{state.global_step}":
            raise ValueError(f"global_step is {state.global_step}")


@contextmanager
def reading(checkpoint: Path, *names: str) -> Iterator[None]:
    """Turns whatever a file of a checkpoint causes that is damaged, foreign or missing into the UserError that names it.

    Args:
        names: the files that the block reads; where each can be read, the last is at fault. Nothing in them is executed.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001  (damage shows as anything)
        wrong = next((name for name in names if not _whole(checkpoint / name)), names[-1])
        says = " ".join(f"{type(error).__name__}: {error}".removeprefix("UserError: ").split())
        raise UserError(
            f"{checkpoint / wrong} is damaged, or not of this run ({says:.160}): remove {checkpoint}, and "
            "the same command goes on from the checkpoint before it, or from the start where there is none"
        ) from None


def _whole(file: Path) -> bool:
    """Whether a file of a checkpoint can be read at all."""
    try:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".safetensors":
            load_file(file)
        else:
            with safe_globals():
                torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001  (as above)
        return False
    return True


class ResumableTrainer(Trainer):
    """transformers.Trainer that goes on from whole checkpoints only, and never deletes a copy under another name."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        adapted: Any = self.accelerator.unwrap_model(self.model if model is None else model)
        is_adapter = hasattr(adapted, "peft_config")
        kind = "adapter_model" if is_adapter else "model"
        names = sorted(p.name for p in folder.glob(f"{kind}*.safetensors*")) or [f"{kind}.safetensors"]
        with reading(folder, *(p.name for p in folder.glob("config.json")), *names):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if is_adapter:
                check_adapter(adapted, folder)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Keys that do not fit are no matter for a warning; a missing one may share its weights with one that is there."""
        parameters = dict(cast(Any, self.model).named_parameters(remove_duplicate=False))
        there = {id(p) for name, p in parameters.items() if name not in load_result.missing_keys}
        missing = [name for name in load_result.missing_keys if id(parameters.get(name)) not in there]
        if strange := [*missing, *load_result.unexpected_keys]:
            raise ValueError(f"{len(strange)} keys differ, among them {strange[0]}")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:  # their files are of other kinds
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer, folder = cast(Any, self.optimizer), Path(checkpoint)
        with reading(folder, "scheduler.pt"):
            state = torch.load(folder / "scheduler.pt", map_location="cpu", weights_only=True)
            if set(state) != set(cast(Any, self.lr_scheduler).state_dict()) or not state["last_epoch"] > 0:
                raise ValueError("it is not the state of this schedule")
        groups = [set(group) for group in optimizer.param_groups]
        with reading(folder, "optimizer.pt"):
            if not (folder / "optimizer.pt").is_file():  # the Trainer would begin anew without it
                raise FileNotFoundError("there is none")
            super()._load_optimizer_and_scheduler(checkpoint)
            if any(before - set(group) for before, group in zip(groups, optimizer.param_groups, strict=True)):
                raise ValueError("settings are missing")
            for part in getattr(getattr(optimizer, "optimizer", optimizer), "parts", (optimizer,)):
                for p, values in part.state.items():
                    if any(isinstance(v, torch.Tensor) and v.ndim and v.shape != p.shape for v in values.values()):
                        raise ValueError("its tensors have other shapes than the weights")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        one = "rng_state.pth" if self.args.world_size == 1 else f"rng_state_{self.args.process_index}.pth"
        with reading(folder, one):
            if not [*folder.glob("rng_state*.pth")]:  # of another number of processes is no fault
                raise FileNotFoundError("there is none")
            super()._load_rng_state(checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # the Trainer's names are not exact
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="peft")  # it does not know where a shipped base model lies
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if limit and self.args.should_save:
            for old in checkpoints(Path(str(self.args.output_dir)))[:-limit]:
                if str(old) != self.state.best_model_checkpoint:
                    shutil.rmtree(old, ignore_errors=True)
