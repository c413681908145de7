"""Reinforcement learning with group-relative policy optimisation, along recorded trajectories or around them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmask.rl.arguments import DiffusionGRPOConfig
    from unmask.rl.trainer import DiffusionGRPOTrainer

__all__ = ["DiffusionGRPOConfig", "DiffusionGRPOTrainer"]


def __getattr__(name: str) -> Any:  # imported when first used, so that `unmask rl --help` does not wait for torch
    if name not in __all__:
        raise AttributeError(f"module 'unmask.rl' has no attribute {name!r}")
    from unmask.rl import arguments, trainer

    return getattr(arguments if hasattr(arguments, name) else trainer, name)
