"""Group-relative advantages (GRPO, arXiv 2402.03300, section 4.1; without the division: Dr. GRPO, arXiv 2503.20783)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "none"]
EPSILON = 1e-4  # beside the standard deviation, as in TRL


def has_reward_variance(rewards: Tensor, num_generations: int) -> Tensor:
    """Which rows stand in a group whose rewards are not all equal. (B,) -> (B,) bool."""
    groups = rewards.view(-1, num_generations)
    return (groups != groups[:, :1]).any(1).repeat_interleave(num_generations)


def group_advantages(rewards: Tensor, num_generations: int, scale: Scale) -> Tensor:
    """Each reward minus its group's mean, for ``scale="group"`` divided by the group's standard deviation.

    A group whose rewards are all equal gets exactly 0.

    Args:
        rewards: (B,) float, groups of ``num_generations`` in a row; their number must divide B.

    Returns:
        (B,) of the same dtype.
    """
    groups = rewards.view(-1, num_generations)
    centred = groups - groups.mean(1, keepdim=True)
    unequal = has_reward_variance(rewards, num_generations).view_as(groups)
    centred = torch.where(unequal, centred, 0.0)  # no rounding left of equal rewards
    if scale == "group":
        centred = centred / (groups.std(1, keepdim=True) + EPSILON)
    return centred.view(-1)
