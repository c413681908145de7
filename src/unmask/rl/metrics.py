"""What a run reports, as plain sums, so that ranks can be averaged before anything is divided."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unmask.decoding.trajectory import Trajectory
from unmask.models.masked_lm import MaskedLM
from unmask.rl.advantages import has_reward_variance
from unmask.rl.rewards import Row

ROLLOUT = ("reward", "reward_std", "groups_without_variance", "length", "without_end", "nfe")
UPDATE = ("tokens", "replay_gap", "kl", "clip_fraction", "entropy", "ratio")


def rollout_values(lm: MaskedLM, trajectory: Trajectory, rewards: Tensor, num_generations: int) -> list[float]:
    """The values named in ROLLOUT, in their order.

    Reward and its standard deviation in a group, the share of groups whose rewards are all equal, tokens before the first end
    token, the share of rows without one, forward passes a row.
    """
    groups = rewards.view(-1, num_generations)
    lengths = lm.lengths(trajectory.tokens).double()
    values = (
        rewards.mean(),
        groups.std(1).mean(),
        (~has_reward_variance(rewards, num_generations)).double().mean(),
        lengths.mean(),
        (lengths == trajectory.tokens.shape[1]).double().mean(),
        trajectory.nfe.double().mean(),
    )
    return [float(v) for v in values]


@torch.no_grad()
def update_sums(
    gap: Tensor, log_ratio: Tensor, kl: Tensor, entropy: Tensor, advantages: Tensor, epsilon: float
) -> Tensor:
    """Sums over one forward pass's N scored tokens of what UPDATE names, (6,) float64.

    The count of tokens, |gap| (recomputed - recorded), KL, whether the clip is active, entropy, the ratio. All arguments (N,),
    in nats.
    """
    ratio = log_ratio.exp().double()
    clipped = torch.where(advantages > 0, ratio > 1 + epsilon, ratio < 1 - epsilon)
    values = (torch.ones_like(ratio), gap.abs(), kl, clipped, entropy, ratio)
    return torch.stack([v.double().sum() for v in values])


def validation_sums(rows: Sequence[Row], texts: Sequence[str], rewards: Sequence[float], names: list[str]) -> Tensor:
    """(tasks + 1, 4) float64: for each task of ``names`` rows, solved, points, possible; last rows, reward, 0, 0."""
    sums = torch.zeros(len(names) + 1, 4, dtype=torch.float64)
    for row, text, reward in zip(rows, texts, rewards, strict=True):
        sums[-1] += torch.tensor([1.0, reward, 0.0, 0.0])
        if "task" in row:
            grade = row["task"].grade(row["problem"], text)
            sums[names.index(row["task"].label)] += torch.tensor([1.0, grade.solved, grade.points, grade.possible])
    return sums
