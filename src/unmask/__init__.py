"""unmask — decode, post-train and evaluate masked diffusion language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmask.decoding.confidence import CONFIDENCES, Confidence
    from unmask.decoding.decode import decode, decode_each
    from unmask.decoding.decoder import PRESETS, SCHEDULES, Decoder, make_decoder
    from unmask.decoding.generate import Generation
    from unmask.decoding.plan import Plan
    from unmask.decoding.score import replay
    from unmask.decoding.trajectory import Trajectory
    from unmask.errors import UserError
    from unmask.models.load import load
    from unmask.models.masked_lm import MaskedLM
    from unmask.rl.config import DiffusionGRPOConfig, DistillConfig
    from unmask.rl.distill import DistillTrainer
    from unmask.rl.objectives import OBJECTIVES
    from unmask.rl.rewards import REWARDS
    from unmask.rl.trainer import DiffusionGRPOTrainer
    from unmask.tasks import TASKS, Grade, Problem, Task, make_task
    from unmask.training.config import SFTConfig
    from unmask.training.sft import SFTTrainer

__version__ = "0.1.0"

# Names are imported when first used, so that `unmask --help` does not wait for torch.
_HOMES = {
    "decoding": "CONFIDENCES PRESETS SCHEDULES Confidence Decoder Plan decode decode_each make_decoder replay",
    "decoding.generate": "Generation",
    "decoding.trajectory": "Trajectory",
    "errors": "UserError",
    "models.load": "load",
    "models.masked_lm": "MaskedLM",
    "rl.config": "DiffusionGRPOConfig DistillConfig",
    "rl.distill": "DistillTrainer",
    "rl.objectives": "OBJECTIVES",
    "rl.rewards": "REWARDS",
    "rl.trainer": "DiffusionGRPOTrainer",
    "tasks": "TASKS Grade Problem Task make_task",
    "training.config": "SFTConfig",
    "training.sft": "SFTTrainer",
}
_MODULE = {name: f"unmask.{module}" for module, names in _HOMES.items() for name in names.split()}
__all__ = ["__version__", *_MODULE]


def __getattr__(name: str) -> Any:
    if name in _MODULE:
        return getattr(import_module(_MODULE[name]), name)
    raise AttributeError(f"module 'unmask' has no attribute {name!r}")
