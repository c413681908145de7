"""What a run reports, as plain sums, so that ranks can be averaged before anything is divided."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unmask.decoding.trajectory import Trajectory
from unmask.models.masked_lm import MaskedLM
from unmask.rl.objectives import has_reward_variance
from unmask.rl.rewards import Row

UPDATE = ("tokens", "logprob_mismatch", "kl", "clip_fraction", "entropy", "ratio")


def rollout_metrics(lm: MaskedLM, trajectory: Trajectory, rewards: Tensor, num_generations: int) -> dict[str, float]:
    """Reward and its standard deviation in a group, the share of groups whose rewards are all equal, tokens before the first
    end token, the share of rows without one, forward passes a row."""
    lengths = lm.lengths(trajectory.tokens).double()
    values = {
        "reward": rewards.mean(),
        "reward_std": rewards.view(-1, num_generations).std(1).mean(),
        "groups_without_variance": (~has_reward_variance(rewards, num_generations)).double().mean(),
        "length": lengths.mean(),
        "without_end": (lengths == trajectory.tokens.shape[1]).double().mean(),
        "nfe": trajectory.nfe.double().mean(),
    }
    return {name: float(value) for name, value in values.items()}


@torch.no_grad()
def update_sums(
    mismatch: Tensor, log_ratio: Tensor, kl: Tensor, entropy: Tensor, advantages: Tensor, epsilon: float
) -> Tensor:
    """Sums over one forward pass's N scored tokens of what UPDATE names, (6,) float64. All arguments (N,), in nats."""
    ratio = log_ratio.exp().double()
    clipped = torch.where(advantages > 0, ratio > 1 + epsilon, ratio < 1 - epsilon)
    values = (torch.ones_like(ratio), mismatch.abs(), kl, clipped, entropy, ratio)
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


def validation_metrics(sums: Sequence[float], names: list[str]) -> dict[str, float]:
    """The mean reward and each task's accuracy and score, from the numbers of ``validation_sums`` in a row."""
    count, solved, points, possible = torch.tensor(sums).view(-1, 4).T.tolist()
    found = {"reward": solved[-1] / count[-1]}
    for i, name in enumerate(names):
        found |= {f"{name}_solved": solved[i] / count[i], f"{name}_score": points[i] / possible[i]}
    return found
