"""Objectives: which views of a trajectory are scored, and the loss of what they find.

A *view* is a partly masked sequence and the canvas positions whose recorded tokens are scored in it. An objective is a short
function that yields views, and where each token's clipped surrogate is not what it wants, a function of the log-probabilities
of all its views; everything else (weights, batching, old log-probabilities) is shared. The probability of *choosing the
positions* is in none of them, as in the paper. Equations: docs/rl.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.config import Registry, build, split_spec
from unmask.decoding.decoder import Decoder
from unmask.decoding.sampling import uniform_noise
from unmask.decoding.trajectory import Trajectory
from unmask.errors import UserError, check_at_least, check_positive

PROMPT_MASKING = 0.15  # diffu-GRPO (d1, arXiv 2504.12216)
STD_EPSILON = 1e-4  # beside the standard deviation of a group's rewards, as in TRL
COUPLED_SHARE = (0.2, 0.8)  # bounds of the share that coupled-GRPO's first view masks (DiffuCoder, arXiv 2506.20639)
LossType = Literal["step", "grpo", "bnpo", "dr_grpo"]


@dataclass(frozen=True)
class View:
    """One masked sequence a row, and what is scored in it.

    Attributes:
        ids: (B, P+L) int64. scored: (B, L) bool, the canvas positions whose tokens' log-probabilities count here.
        share: (B,) float32, a factor that the objective's own loss gets beside the log-probabilities; None: 1.
    """

    ids: Tensor
    scored: Tensor
    share: Tensor | None = None


@dataclass(frozen=True)
class ViewRows:
    """Rows of all views concatenated along the batch: a forward pass takes as many as fit, whatever view they come from.

    Attributes:
        ids: (M, P+L) int64. scored: (M, L) bool. view, row: (M,) int64, each one's view and row of the trajectory.
    """

    ids: Tensor
    scored: Tensor
    view: Tensor
    row: Tensor

    @classmethod
    def of(cls, views: list[View]) -> ViewRows:
        ids, scored = torch.cat([v.ids for v in views]), torch.cat([v.scored for v in views])
        number = torch.arange(len(ids), device=ids.device)
        return cls(ids, scored, number // len(views[0].ids), number % len(views[0].ids))

    def take(self, index: Tensor) -> ViewRows:
        """Some of them, (n,) int64."""
        return ViewRows(self.ids[index], self.scored[index], self.view[index], self.row[index])


@dataclass(frozen=True)
class Scores:
    """What a loss of all views sees, of the rows of groups whose rewards differ.

    Attributes:
        new, old, reference: (V, B, L) float32 log-probabilities of the recorded tokens in each view under the policy (with
            gradient), the one that sampled, and the starting one (None without a KL penalty); 0 where a view scores nothing.
        scored: (V, B, L) bool. share: (V, B) float32, of the views. advantages: (B,) float32. lengths: (B,) int64, tokens that
            the loss does not leave out.
        weight: (B, L) float32, what each of these contributes to the sum over rows, by ``loss_type``; their sum is a row's.
        epsilon, beta: clipping range and weight of the KL penalty.
    """

    new: Tensor
    old: Tensor
    reference: Tensor | None
    scored: Tensor
    share: Tensor
    advantages: Tensor
    lengths: Tensor
    weight: Tensor
    epsilon: float
    beta: float


Loss = Callable[[Scores], tuple[Tensor, Tensor, Tensor]]
"""Each row's loss (B,); for the metrics, the logarithm of the probability ratio and the KL estimate of each token or of the
row, (B, L) or (B, 1)."""


@dataclass(frozen=True)
class Objective:
    """A way to look at a trajectory.

    Attributes:
        views: ``(trajectory, seeds (B,) int64, inner iteration) -> views``; what is random depends on a row's seed alone.
        to_the_end: whether only tokens up to the first end token count; ``views`` then gets their number (B,) beside these.
        recorded: whether the views are the very states that were sampled from, so that the recorded log-probabilities
            are the old policy's.
        fresh: whether every inner iteration has views of its own.
        loss: of the log-probabilities of all views together; None: the sum of each token's clipped surrogate.
        reads: what that loss looks at, so that no forward pass is made for the rest. ``ratios``: the differences ``new - old``
            and ``new - reference`` alone; ``policy``: ``new`` alone, so there is no clipping and no KL penalty; ``all``: any.
        pairs: whether it learns from pairs of completions, of which the first is preferred, instead of samples.
        sampled: how many of its views each row scores in an update, drawn anew each time; None: all.
        unfit: what is wrong with a decoder for this objective, or nothing.
    """

    views: Callable[..., Iterator[View]]
    recorded: bool = False
    fresh: bool = False
    to_the_end: bool = False
    loss: Loss | None = None
    reads: Literal["all", "ratios", "policy"] = "all"
    pairs: bool = False
    sampled: int | None = None
    unfit: Callable[[Decoder], str | None] = lambda decoder: None

    def all_views(self, trajectory: Trajectory, seeds: Tensor, iteration: int, lengths: Tensor) -> list[View]:
        """lengths (B,) int64: each row's tokens up to and with its first end token."""
        return list(self.views(trajectory, seeds, iteration, *([lengths] if self.to_the_end else [])))


OBJECTIVES: Registry[Any] = Registry("objective")


def find_objective(spec: str) -> Objective:
    """An objective by its spec: a registered one (``cj``, ``espo:draws=4``), or one's own as ``package.module:name``.

    Either is an Objective, a function that yields views, or a dataclass of parameters whose ``objective()`` is one.
    """
    name, parameters = split_spec(spec)
    found = OBJECTIVES.resolve(name)
    if isinstance(found, type) and hasattr(found, "objective"):
        return build(found, parameters, f"objective {name}").objective()
    if parameters:
        raise UserError(f"objective {name} takes no parameters: leave out {', '.join(parameters)}")
    if isinstance(found, Objective):
        return found
    if callable(found) and not isinstance(found, type):
        return Objective(found)
    raise UserError(f"objective {name!r} is {type(found).__name__}: name an Objective, or a function that yields views")


def surrogate(
    new: Tensor, old: Tensor, reference: Tensor | None, advantages: Tensor, epsilon: float, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped surrogate plus KL penalty, the ratio's logarithm, and KL (k3), all of each element."""
    loss, kl = clipped_surrogate(new, old, advantages, epsilon), torch.zeros_like(new)
    if reference is not None:
        kl = k3(new, reference)
        loss = loss + beta * kl
    return loss, new - old, kl


@OBJECTIVES.register("cj")
@partial(Objective, recorded=True)
def cj(trajectory: Trajectory, seeds: Tensor, iteration: int) -> Iterator[View]:
    """CJ-GRPO (arXiv 2509.23924, Eq. 7): every recorded state with the tokens that were committed in it."""
    for s in range(trajectory.steps):
        yield View(torch.cat([trajectory.prompt, trajectory.state(s)], 1), trajectory.committed(s))


def _not_token_by_token(decoder: Decoder) -> str | None:
    return (
        None if max(decoder.plan.open) == 1 else "justgrpo needs tokens from left to right: set semi-ar:block_length=1"
    )


OBJECTIVES["justgrpo"] = replace(cj, unfit=_not_token_by_token)  # JustGRPO (arXiv 2601.15165), with loss_type dr_grpo


@OBJECTIVES.register("agrpo")
@dataclass(frozen=True)
class AGRPO:
    """``cj`` of so many of each trajectory's steps, drawn at random in every update (AGRPO, arXiv 2510.04019)."""

    steps: int = 8

    def objective(self) -> Objective:
        check_at_least(self, 1, "steps")
        return replace(cj, sampled=self.steps)


@OBJECTIVES.register("tracerl")
@dataclass(frozen=True)
class TraceRL:
    """``cj`` with so many neighboring steps merged into one view, from the state before the first (arXiv 2509.06949)."""

    merge: int = 2

    def objective(self) -> Objective:
        check_at_least(self, 1, "merge")
        return Objective(self.views, recorded=self.merge == 1)

    def views(self, trajectory: Trajectory, seeds: Tensor, iteration: int) -> Iterator[View]:
        for s in range(0, trajectory.steps, self.merge):
            committed = (trajectory.step >= s) & (trajectory.step < s + self.merge)
            yield View(torch.cat([trajectory.prompt, trajectory.state(s)], 1), committed)


@OBJECTIVES.register("one-step")
@Objective
def one_step(trajectory: Trajectory, seeds: Tensor, iteration: int) -> Iterator[View]:
    """All tokens from the fully masked canvas, in one jump."""
    yield View(torch.cat([trajectory.prompt, trajectory.state(0)], 1), trajectory.step >= 0)


def _masked_prompt(trajectory: Trajectory, seeds: Tensor, number: int, share: float) -> Tensor:
    width = trajectory.prompt.shape[1]  # counted from the end, so that padding does not matter
    place = (torch.arange(width, device=seeds.device) - width).expand_as(trajectory.prompt)
    hidden = (uniform_noise(seeds[:, None], number, place, 0) < share) & trajectory.prompt_mask
    return trajectory.prompt.masked_fill(hidden, trajectory.mask_id)


@OBJECTIVES.register("diffu")
@partial(Objective, fresh=True)
def diffu(trajectory: Trajectory, seeds: Tensor, iteration: int) -> Iterator[View]:
    """diffu-GRPO (d1): one jump, with a fresh 15 % of the prompt masked in every inner iteration."""
    prompt = _masked_prompt(trajectory, seeds, iteration, PROMPT_MASKING)
    yield View(torch.cat([prompt, trajectory.state(0)], 1), trajectory.step >= 0)


def _over_views(scores: Scores, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
    """New, old and reference log-probabilities times the views' shares, summed."""
    new, old, reference = (
        None if x is None else (scores.share[..., None] * x).sum(dims)
        for x in (scores.new, scores.old, scores.reference)
    )
    assert new is not None and old is not None
    return new, old, reference


def sum_of_views(scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped surrogate of tokens whose log-probability is a sum over views by their shares (no policy's, in general)."""
    new, old, reference = _over_views(scores, (0,))
    loss, log_ratio, kl = surrogate(new, old, reference, scores.advantages[:, None], scores.epsilon, scores.beta)
    return (scores.weight * loss).sum(1), log_ratio, kl


@OBJECTIVES.register("coupled")
@partial(Objective, fresh=True, loss=sum_of_views, reads="ratios")
def coupled(trajectory: Trajectory, seeds: Tensor, iteration: int) -> Iterator[View]:
    """coupled-GRPO (DiffuCoder): the fully masked canvas and two complementary random masks.

    A token's log-probability is the mean of that under the full mask and of 1/t times that under the mask of the pair that
    hides it; t is the share which that mask was drawn to hide.
    """
    place, (low, high) = _places(trajectory), COUPLED_SHARE
    masked = low + (high - low) * uniform_noise(seeds[:, None], iteration, torch.zeros_like(place[:, :1]), 1)  # (B, 1)
    first = uniform_noise(seeds[:, None], iteration, place, 0) < masked
    everything = torch.ones_like(first)
    for hidden, t in ((everything, torch.ones_like(masked)), (first, masked), (~first, 1 - masked)):
        yield _view(trajectory, hidden, 0.5 / t[:, 0])


def sequence_surrogate(scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped surrogate of whole rows: the ratio is exp(difference of the ELBOs / L), KL its k2 estimate, their squared
    difference / 2L. An ELBO is the sum over views of share · log-probability."""
    length, (new, old, reference) = scores.new.shape[2], _over_views(scores, (0, 2))
    loss, kl = clipped_surrogate(new / length, old / length, scores.advantages, scores.epsilon), torch.zeros_like(new)
    if reference is not None:
        kl = (new - reference).square() / (2 * length)
        loss = loss + scores.beta * kl
    return scores.weight.sum(1) * loss, ((new - old) / length)[:, None], kl[:, None]


def _lowest(noise: Tensor, count: Tensor) -> Tensor:
    """The ``count`` (B,) smallest of each row's numbers (B, L), bool."""
    return noise.argsort(1).argsort(1) < count[:, None]


def _places(trajectory: Trajectory) -> Tensor:
    """Canvas positions, (B, L) int64."""
    return torch.arange(trajectory.tokens.shape[1], device=trajectory.tokens.device).expand_as(trajectory.tokens)


def _view(trajectory: Trajectory, hidden: Tensor, share: Tensor) -> View:
    """The canvas with ``hidden`` (B, L) masked and scored."""
    canvas = trajectory.tokens.masked_fill(hidden, trajectory.mask_id)
    return View(torch.cat([trajectory.prompt, canvas], 1), hidden, share.float())


@OBJECTIVES.register("espo")
@dataclass(frozen=True)
class ESPO:
    """One ratio a completion, of ELBOs over ``draws`` random masks, each with its complement (ESPO, arXiv 2512.03759).

    A mask hides k tokens, k uniform on 0..L; what it hides weighs (L + 1) / k, half of it from each mask of a pair.
    """

    draws: int = 2

    def objective(self) -> Objective:
        check_at_least(self, 1, "draws")
        return Objective(self.views, fresh=True, loss=sequence_surrogate, reads="ratios")

    def views(self, trajectory: Trajectory, seeds: Tensor, iteration: int) -> Iterator[View]:
        place, length = _places(trajectory), trajectory.tokens.shape[1]
        for number in range(iteration * self.draws, (iteration + 1) * self.draws):
            count = (uniform_noise(seeds, number, place[:, 0], 1) * (length + 1)).long()
            first = _lowest(uniform_noise(seeds[:, None], number, place, 0), count)
            for hidden, k in ((first, count), (~first, length - count)):
                yield _view(trajectory, hidden, (length + 1) / (2 * self.draws * k.clamp(min=1)))


@OBJECTIVES.register("gdpo")
@dataclass(frozen=True)
class GDPO:
    """``espo`` with the ELBO's integral over the masking rate t by Gauss-Legendre quadrature (GDPO, arXiv 2510.08554).

    At each of the ``points`` a mask hides k tokens, tL to the nearest, which weigh w L / k.
    """

    points: int = 3

    def objective(self) -> Objective:
        check_at_least(self, 1, "points")
        return Objective(self.views, fresh=True, loss=sequence_surrogate, reads="ratios")

    def views(self, trajectory: Trajectory, seeds: Tensor, iteration: int) -> Iterator[View]:
        place, ones, length = _places(trajectory), torch.ones_like(seeds), trajectory.tokens.shape[1]
        for number, (x, w) in enumerate(zip(*np.polynomial.legendre.leggauss(self.points), strict=True)):
            k = max(1, round((float(x) + 1) / 2 * length))
            noise = uniform_noise(seeds[:, None], iteration * self.points + number, place, 0)
            yield _view(trajectory, _lowest(noise, ones * k), ones * float(w) / 2 * length / k)


@OBJECTIVES.register("spg")
@dataclass(frozen=True)
class SPG:
    """Sandwiched policy gradient (SPG, arXiv 2510.09541): a lower bound of the log-likelihood where the advantage is positive,
    where it is not, ``omega`` of an upper bound beside it. No ratio, no clipping, no KL penalty.

    Each of the ``draws`` masks a random part of one block of ``block_length`` tokens, all that is behind it, and of the prompt
    and the blocks before it the share ``prompt_masking``.
    """

    beta: float = 1.5
    omega: float = 0.5
    draws: int = 2
    block_length: int = 32
    prompt_masking: float = PROMPT_MASKING

    def objective(self) -> Objective:
        check_at_least(self, 1, "draws", "block_length")
        check_positive(self, "beta")
        for name in ("omega", "prompt_masking"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} of objective spg is {getattr(self, name)}: choose 0 to 1")
        return Objective(self.views, fresh=True, to_the_end=True, loss=self.loss, reads="policy")

    def views(self, trajectory: Trajectory, seeds: Tensor, iteration: int, lengths: Tensor) -> Iterator[View]:
        place, length = _places(trajectory), trajectory.tokens.shape[1]
        blocks = -(-lengths // self.block_length)
        number = torch.arange(-(-length // self.block_length), device=seeds.device)
        order = uniform_noise(seeds[:, None], iteration * self.draws, length + number, 1)
        order = order.masked_fill(number >= blocks[:, None], torch.inf).argsort(1)
        for draw in range(self.draws):
            step = iteration * self.draws + draw
            noise, size = uniform_noise(seeds[:, None], step, place, 0), uniform_noise(seeds, step, place[:, 0], 1)
            begin = order.gather(1, (draw % blocks)[:, None]) * self.block_length
            end = torch.minimum(begin + self.block_length, lengths[:, None])
            inside = (place >= begin) & (place < end)
            count = 1 + (size * (end - begin)[:, 0]).long()
            some = inside & _lowest(noise.masked_fill(~inside, torch.inf), count)
            hidden = some | (place >= end) | (place < begin) & (noise < self.prompt_masking)
            view = _view(trajectory, hidden, torch.ones_like(size))
            prompt = _masked_prompt(trajectory, seeds, step, self.prompt_masking)
            ids = torch.cat([prompt, view.ids[:, prompt.shape[1] :]], 1)
            yield replace(view, ids=ids, scored=hidden & (place < lengths[:, None]))

    def loss(self, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
        scored, counts = scores.scored, scores.scored.sum(2).clamp(min=1).to(scores.new)
        elbo = ((scores.new * scored).sum(2) / counts).mean(0)
        covered = scored.any(0)  # by any draw
        rate = (counts / scores.lengths).log()[..., None]
        likelihood = (self.beta * scores.new - rate).masked_fill(~scored, -torch.inf).masked_fill(~covered, 0.0)
        upper = (
            ((likelihood.logsumexp(0) - math.log(len(scored))) * covered).sum(1)
            / covered.sum(1).clamp(min=1)
            / self.beta
        )
        bound = torch.where(scores.advantages > 0, elbo, self.omega * upper + (1 - self.omega) * elbo)
        none = torch.zeros_like(elbo)[:, None]
        return -scores.weight.sum(1) * scores.advantages * bound, none, none


@OBJECTIVES.register("vrpo")
@dataclass(frozen=True)
class VRPO:
    """DPO on ELBOs over ``draws`` random masks, the same for policy and reference (VRPO, LLaDA 1.5, arXiv 2505.19223), plus
    ``sft_weight`` times the preferred completion's negative ELBO a token. A run's ``beta`` is DPO's.

    A mask hides k of the n tokens up to the end, k uniform on 1..n, and all behind it; what it hides weighs n / k.
    """

    draws: int = 8
    sft_weight: float = 0.05

    def objective(self) -> Objective:
        check_at_least(self, 1, "draws")
        check_at_least(self, 0, "sft_weight")
        return Objective(self.views, fresh=True, to_the_end=True, loss=self.loss, pairs=True)

    def views(self, trajectory: Trajectory, seeds: Tensor, iteration: int, lengths: Tensor) -> Iterator[View]:
        place = _places(trajectory)
        for number in range(self.draws):
            count = 1 + (uniform_noise(seeds, number, place[:, 0], 1) * lengths).long()
            noise, behind = uniform_noise(seeds[:, None], number, place, 0), place >= lengths[:, None]
            some = _lowest(noise.masked_fill(behind, torch.inf), count)
            yield replace(_view(trajectory, some | behind, lengths / count / self.draws), scored=some)

    def loss(self, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
        new, _, reference = _over_views(scores, (0, 2))
        assert reference is not None
        gained = new - reference
        loss = (
            -F.logsigmoid(scores.beta * (gained[0::2] - gained[1::2])) - self.sft_weight * (new / scores.lengths)[0::2]
        )
        return loss.repeat_interleave(2), gained[:, None], torch.zeros_like(gained)[:, None]


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


def step_advantages(paid: Tensor, num_generations: int, scale: Literal["group", "none"]) -> Tensor:
    """Advantages of steps that are paid for: rewards minus the mean over all steps of the group, for ``scale="group"`` divided
    by their standard deviation, and of each step the sum from it on (GRPO, arXiv 2402.03300, section 4.1.3).

    paid: (B, S) float32, NaN behind a row's last step. Returns (B, S), 0 there and in groups in which all steps are paid alike.
    """
    real, found = ~paid.isnan(), torch.zeros_like(paid)
    for first in range(0, len(paid), num_generations):
        group = slice(first, first + num_generations)
        values = paid[group][real[group]]
        if (values != values[0]).any():
            centered = (values - values.mean()) / (values.std() + STD_EPSILON if scale == "group" else 1)
            found[group] = found[group].masked_scatter(real[group], centered)
    return found.flip(1).cumsum(1).flip(1) * real


def token_weights(scored: list[Tensor], loss_type: LossType) -> list[Tensor]:
    """What each scored token contributes to the sum over rows, which is divided by the number of rows.

    ``step`` (the paper): mean over a view's tokens, then over the views that score any. The others in TRL's names: ``grpo``,
    mean over all of a row's tokens; ``bnpo``, mean over all tokens of all rows, so that longer completions count more;
    ``dr_grpo``, sum over a row's tokens divided by the canvas length.

    Args:
        scored: one (B, L) bool a view. Returns one (B, L) float32 a view.
    """
    counts = torch.stack([s.sum(1) for s in scored])  # (views, B)
    if loss_type == "bnpo":
        each = (counts.shape[1] / counts.sum().clamp(min=1)).expand_as(counts)
    elif loss_type == "grpo":
        each = (1 / counts.sum(0).clamp(min=1)).expand_as(counts)
    elif loss_type == "dr_grpo":
        each = torch.full_like(counts, 1 / scored[0].shape[1], dtype=torch.float32)
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
