"""unmask — decode, post-train and evaluate masked diffusion language models."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmask.decoding import PRESETS, Decoder, Plan, decode, decode_each, make_decoder, replay
    from unmask.decoding.generate import Generation
    from unmask.decoding.trajectory import Trajectory
    from unmask.errors import UserError
    from unmask.models.load import load
    from unmask.models.masked_lm import MaskedLM
    from unmask.rl.config import DiffusionGRPOConfig
    from unmask.rl.trainer import DiffusionGRPOTrainer
    from unmask.tasks import Grade, Problem, Task, make_task
    from unmask.training.config import SFTConfig
    from unmask.training.sft import SFTTrainer

try:
    __version__ = version("unmask")
except PackageNotFoundError:  # run from a source folder that is not installed
    __version__ = "0+unknown"

__all__ = [
    "PRESETS",
    "Decoder",
    "DiffusionGRPOConfig",
    "DiffusionGRPOTrainer",
    "Generation",
    "Grade",
    "MaskedLM",
    "Plan",
    "Problem",
    "SFTConfig",
    "SFTTrainer",
    "Task",
    "Trajectory",
    "UserError",
    "__version__",
    "decode",
    "decode_each",
    "load",
    "make_decoder",
    "make_task",
    "replay",
]

# Names are imported when first used, so that `unmask --help` does not wait for torch.
_HOMES = {
    "unmask.decoding": (
        "PRESETS",
        "Decoder",
        "Plan",
        "decode",
        "decode_each",
        "make_decoder",
        "replay",
    ),
    "unmask.decoding.generate": ("Generation",),
    "unmask.models.load": ("load",),
    "unmask.models.masked_lm": ("MaskedLM",),
    "unmask.errors": ("UserError",),
    "unmask.rl.config": ("DiffusionGRPOConfig",),
    "unmask.rl.trainer": ("DiffusionGRPOTrainer",),
    "unmask.training.config": ("SFTConfig",),
    "unmask.training.sft": ("SFTTrainer",),
    "unmask.tasks": ("Grade", "Problem", "Task", "make_task"),
    "unmask.decoding.trajectory": ("Trajectory",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'unmask' has no attribute {name!r}")
