"""Objectives: which views of a trajectory are scored, and with what advantages. One clipped surrogate serves them all.

A *view* is a partly masked sequence and the canvas positions whose recorded tokens are scored in it. An objective is a short
function that yields views; everything else (loss, weights, batching, old log-probabilities) is shared. The probability of
*choosing the positions* is in none of them, as in the paper. Equations: docs/rl.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from unmask.config import Registry
from unmask.decoding.sampling import uniform_noise
from unmask.decoding.trajectory import Trajectory
from unmask.errors import UserError

PROMPT_MASKING = 0.15  # diffu-GRPO (d1, arXiv 2504.12216)
STD_EPSILON = 1e-4  # beside the standard deviation of a group's rewards, as in TRL
COUPLED_SHARE = (0.2, 0.8)  # bounds of the share that coupled-GRPO's first view masks (DiffuCoder, arXiv 2506.20639)
Normalization = Literal["step", "token", "batch"]


@dataclass(frozen=True)
class View:
    """One masked sequence a row, and what is scored in it.

    Attributes:
        ids: (B, P+L) int64. scored: (B, L) bool, the canvas positions whose tokens' log-probabilities count here.
        share: (B,) float32, the factor with which they enter a token's log-probability, which is then a sum over views; None
            where every token is scored in one view alone.
    """

    ids: Tensor
    scored: Tensor
    share: Tensor | None = None


@dataclass(frozen=True)
class ViewRows:
    """Rows of all views concatenated along the batch: a forward pass takes as many as fit, whatever view they come from.

    Attributes:
        ids: (M, P+L) int64. scored: (M, L) bool. row: (M,) int64, the trajectory's row of each. share: (M,) float32 or None.
    """

    ids: Tensor
    scored: Tensor
    row: Tensor
    share: Tensor | None = None

    @classmethod
    def of(cls, views: list[View]) -> ViewRows:
        ids, scored = torch.cat([v.ids for v in views]), torch.cat([v.scored for v in views])
        row = torch.arange(len(views[0].ids), device=ids.device).repeat(len(views))
        shares = [v.share for v in views if v.share is not None]
        return cls(ids, scored, row, torch.cat(shares) if shares else None)

    def take(self, index: Tensor) -> ViewRows:
        """Some of them, (n,) int64."""
        share = None if self.share is None else self.share[index]
        return ViewRows(self.ids[index], self.scored[index], self.row[index], share)

    def share_of(self, values: Tensor) -> Tensor:
        """Values of the scored tokens, (N,) in the order of ``scored``, each times its view's share."""
        return values if self.share is None else values * self.share[self.scored.nonzero()[:, 0]]


@dataclass(frozen=True)
class Objective:
    """A way to look at a trajectory.

    Attributes:
        views: ``(trajectory, seeds (B,) int64, inner iteration) -> views``; what is random depends on a row's seed alone.
        recorded: whether the views are the very states that were sampled from, so that the recorded log-probabilities
            are the old policy's.
        fresh: whether every inner iteration has views of its own.
    """

    views: Callable[[Trajectory, Tensor, int], Iterator[View]]
    recorded: bool = False
    fresh: bool = False


OBJECTIVES: Registry[Any] = Registry("objective")


def find_objective(name: str) -> Objective:
    """A registered objective, or one's own as ``package.module:name``: an Objective or a function that yields views."""
    found = OBJECTIVES.resolve(name)
    if isinstance(found, Objective):
        return found
    if callable(found) and not isinstance(found, type):
        return Objective(found)
    raise UserError(f"objective {name!r} is {type(found).__name__}: name an Objective, or a function that yields views")


@OBJECTIVES.register("cj")
@partial(Objective, recorded=True)
def cj(trajectory: Trajectory, seeds: Tensor, iteration: int) -> Iterator[View]:
    """CJ-GRPO (arXiv 2509.23924, Eq. 7): every recorded state with the tokens that were committed in it."""
    for s in range(trajectory.steps):
        yield View(torch.cat([trajectory.prompt, trajectory.state(s)], 1), trajectory.committed(s))


@OBJECTIVES.register("one-step")
@Objective
def one_step(trajectory: Trajectory, seeds: Tensor, iteration: int) -> Iterator[View]:
    """All tokens from the fully masked canvas, in one jump."""
    yield View(torch.cat([trajectory.prompt, trajectory.state(0)], 1), trajectory.step >= 0)


@OBJECTIVES.register("diffu")
@partial(Objective, fresh=True)
def diffu(trajectory: Trajectory, seeds: Tensor, iteration: int) -> Iterator[View]:
    """diffu-GRPO (d1): one jump, with a fresh 15 % of the prompt masked in every inner iteration."""
    width = trajectory.prompt.shape[1]  # counted from the end, so that padding does not matter
    place = (torch.arange(width, device=seeds.device) - width).expand_as(trajectory.prompt)
    hidden = (uniform_noise(seeds[:, None], iteration, place, 0) < PROMPT_MASKING) & trajectory.prompt_mask
    prompt = trajectory.prompt.masked_fill(hidden, trajectory.mask_id)
    yield View(torch.cat([prompt, trajectory.state(0)], 1), trajectory.step >= 0)


@OBJECTIVES.register("coupled")
@partial(Objective, fresh=True)
def coupled(trajectory: Trajectory, seeds: Tensor, iteration: int) -> Iterator[View]:
    """coupled-GRPO (DiffuCoder): the fully masked canvas and two complementary random masks.

    A token's log-probability is the mean of that under the full mask and of 1/t times that under the mask of the pair that
    hides it; t is the share which that mask was drawn to hide.
    """
    place = torch.arange(trajectory.tokens.shape[1], device=seeds.device).expand_as(trajectory.tokens)
    low, high = COUPLED_SHARE
    masked = low + (high - low) * uniform_noise(seeds[:, None], iteration, torch.zeros_like(place[:, :1]), 1)  # (B, 1)
    first = uniform_noise(seeds[:, None], iteration, place, 0) < masked
    everything = torch.ones_like(first)
    for hidden, t in ((everything, torch.ones_like(masked)), (first, masked), (~first, 1 - masked)):
        canvas = trajectory.tokens.masked_fill(hidden, trajectory.mask_id)
        yield View(torch.cat([trajectory.prompt, canvas], 1), hidden, (0.5 / t[:, 0]).float())


def has_reward_variance(rewards: Tensor, num_generations: int) -> Tensor:
    """Which rows are in a group whose rewards are not all equal. (B,) -> (B,) bool."""
    groups = rewards.view(-1, num_generations)
    return (groups != groups[:, :1]).any(1).repeat_interleave(num_generations)


def group_advantages(rewards: Tensor, num_generations: int, scale: Literal["group", "none"]) -> Tensor:
    """Each reward minus its group's mean, for ``scale="group"`` divided by the group's standard deviation; (B,) -> (B,).

    GRPO (arXiv 2402.03300, section 4.1); without the division Dr. GRPO (arXiv 2503.20783). ``num_generations`` rows in turn are
    a group; one whose rewards are all equal gets exactly 0.
    """
    groups = rewards.view(-1, num_generations)
    centered = groups - groups.mean(1, keepdim=True)
    unequal = has_reward_variance(rewards, num_generations).view_as(groups)
    centered = torch.where(unequal, centered, 0.0)  # no rounding left of equal rewards
    if scale == "group":
        centered = centered / (groups.std(1, keepdim=True) + STD_EPSILON)
    return centered.view(-1)


def token_weights(scored: list[Tensor], normalization: Normalization) -> list[Tensor]:
    """What each scored token contributes to the sum over rows; over all views and rows the weights sum to the number of rows.

    ``step`` (the paper): mean over a view's tokens, then over the views that score any. ``token``: mean over all of a row's
    tokens. ``batch``: mean over all tokens of all rows, so that longer completions count more.

    Args:
        scored: one (B, L) bool a view. Returns one (B, L) float32 a view.
    """
    counts = torch.stack([s.sum(1) for s in scored])  # (views, B)
    if normalization == "batch":
        each = (counts.shape[1] / counts.sum().clamp(min=1)).expand_as(counts)
    elif normalization == "token":
        each = (1 / counts.sum(0).clamp(min=1)).expand_as(counts)
    else:
        each = 1 / (counts.clamp(min=1) * (counts > 0).sum(0).clamp(min=1))
    return [s * w[:, None].float() for s, w in zip(scored, each, strict=True)]


def clipped_surrogate(new: Tensor, old: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    """-min(r A, clip(r, 1 - epsilon, 1 + epsilon) A) with r = exp(new - old), per token (PPO, arXiv 1707.06347, Eq. 7)."""
    ratio = (new - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)


def k3(new: Tensor, reference: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference), per token: exp(d) - d - 1 with d = reference - new."""
    d = reference - new
    return d.exp() - d - 1


def sample_views(views: list[View], count: int, seeds: Tensor, iteration: int) -> list[View]:
    """The views with only ``count`` of them scored in each row, drawn without replacement among those that score anything.

    Every row has its own choice, so that a row cut after its end token weighs as much as any other. seeds: (B,) int64.
    """
    empty = torch.stack([~v.scored.any(1) for v in views], 1)  # (B, views)
    place = torch.arange(len(views), device=seeds.device).expand_as(empty)
    noise = uniform_noise(seeds[:, None], iteration, place, 0)
    rank = noise.masked_fill(empty, torch.inf).argsort(1).argsort(1)
    return [replace(v, scored=v.scored & (rank[:, i, None] < count)) for i, v in enumerate(views)]
