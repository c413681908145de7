"""Objectives: which views of a trajectory are scored. One clipped surrogate serves them all.

A *view* is a partly masked sequence and the canvas positions whose recorded tokens are scored in it. An objective is a short
function that yields views; everything else (loss, weights, batching, old log-probabilities) is shared. Equations: docs/rl.md.

The probability of *choosing the positions* is in none of these objectives, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unmask.decoding.sampling import uniform_noise
from unmask.trajectory import Trajectory

PROMPT_MASKING = 0.15  # diffu-GRPO (d1, arXiv 2504.12216)
COUPLED_SHARE = (0.2, 0.8)  # bounds of the share that coupled-GRPO's first view masks (DiffuCoder, arXiv 2506.20639)
Normalisation = Literal["step", "token"]


@dataclass(frozen=True)
class View:
    """ids: (B, P+L) int64. scored: (B, L) bool, the canvas positions whose tokens' log-probabilities count here."""

    ids: Tensor
    scored: Tensor


@dataclass(frozen=True)
class ViewRows:
    """Rows of any views below each other, so that a forward pass takes as many as fit, whatever view they come from.

    Attributes:
        ids: (M, P+L) int64. scored: (M, L) bool. row: (M,) int64, the trajectory's row of each.
    """

    ids: Tensor
    scored: Tensor
    row: Tensor

    @classmethod
    def of(cls, views: list[View]) -> ViewRows:
        """All rows of the views, view after view."""
        batch = len(views[0].ids)
        row = torch.arange(batch, device=views[0].ids.device).repeat(len(views))
        return cls(torch.cat([v.ids for v in views]), torch.cat([v.scored for v in views]), row)

    def take(self, index: Tensor) -> ViewRows:
        """Some of them, (n,) int64."""
        return ViewRows(self.ids[index], self.scored[index], self.row[index])

    def parts(self, size: int, active: Tensor) -> list[Tensor]:
        """Indexes of the rows that score anything and whose trajectory row is ``active`` (B,), ``size`` at a time."""
        wanted = (active[self.row] & self.scored.any(1)).nonzero()[:, 0]
        return list(wanted.split(size)) if len(wanted) else []


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


def _cj(trajectory: Trajectory, seeds: Tensor, iteration: int) -> Iterator[View]:
    """CJ-GRPO (arXiv 2509.23924, Eq. 7): every recorded state with the tokens that were committed in it."""
    for s in range(trajectory.steps):
        yield View(torch.cat([trajectory.prompt, trajectory.state(s)], 1), trajectory.committed(s))


def _one_step(trajectory: Trajectory, seeds: Tensor, iteration: int) -> Iterator[View]:
    """All tokens from the fully masked canvas, in one jump."""
    yield View(torch.cat([trajectory.prompt, trajectory.state(0)], 1), trajectory.step >= 0)


def _diffu(trajectory: Trajectory, seeds: Tensor, iteration: int) -> Iterator[View]:
    """diffu-GRPO (d1): one jump, with a fresh 15 % of the prompt masked in every inner iteration."""
    width = trajectory.prompt.shape[1]  # counted from the end, so that padding does not matter
    place = (torch.arange(width, device=seeds.device) - width).expand_as(trajectory.prompt)
    hidden = (uniform_noise(seeds[:, None], iteration, place, 0) < PROMPT_MASKING) & trajectory.prompt_mask
    prompt = trajectory.prompt.masked_fill(hidden, trajectory.mask_id)
    yield View(torch.cat([prompt, trajectory.state(0)], 1), trajectory.step >= 0)


def _coupled(trajectory: Trajectory, seeds: Tensor, iteration: int) -> Iterator[View]:
    """coupled-GRPO (DiffuCoder): two complementary random masks over the canvas; each token is scored once."""
    place = torch.arange(trajectory.tokens.shape[1], device=seeds.device).expand_as(trajectory.tokens)
    low, high = COUPLED_SHARE
    share = low + (high - low) * uniform_noise(seeds[:, None], iteration, torch.zeros_like(place[:, :1]), 1)
    first = uniform_noise(seeds[:, None], iteration, place, 0) < share
    for hidden in (first, ~first):
        canvas = trajectory.tokens.masked_fill(hidden, trajectory.mask_id)
        yield View(torch.cat([trajectory.prompt, canvas], 1), hidden)


OBJECTIVES: dict[str, Objective] = {
    "cj": Objective(_cj, recorded=True),
    "one-step": Objective(_one_step),
    "diffu": Objective(_diffu, fresh=True),
    "coupled": Objective(_coupled, fresh=True),
}


def token_weights(scored: list[Tensor], normalisation: Normalisation) -> list[Tensor]:
    """What each scored token contributes to its row's loss; over all views a row's weights sum to 1.

    ``step`` (the paper): mean over a view's tokens, then over the views that score any. ``token``: mean over all tokens.

    Args:
        scored: one (B, L) bool a view. Returns one (B, L) float32 a view.
    """
    counts = torch.stack([s.sum(1) for s in scored])  # (views, B)
    if normalisation == "token":
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


def sample_views(
    views: list[View], logprob: Tensor, count: int, how: Literal["uniform", "entropy"], generator: torch.Generator
) -> list[View]:
    """``count`` of the views without replacement: uniformly, or in proportion to the surprise of their tokens.

    ``entropy`` weighs a view by the mean of -``logprob`` ((B, L), recorded) over what it scores; the loss stays a plain mean
    over the chosen views, so it leans towards uncertain steps on purpose. Views that score nothing are never chosen.
    """
    views = [v for v in views if v.scored.any()]
    weights = torch.ones(len(views))
    if how == "entropy":
        weights = torch.stack([-logprob[v.scored].mean().cpu() for v in views]).clamp(min=1e-6)
    chosen = torch.multinomial(weights, min(count, len(views)), generator=generator)
    return [views[i] for i in sorted(chosen.tolist())]
