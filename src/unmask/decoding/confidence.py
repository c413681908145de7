"""Confidence: which candidates to commit first. Scores lie in [0, 1] (float64), so that a factor below 1 always lowers them.

EOSER (arXiv 2509.23924, section 3.1) multiplies the score of end-of-sequence candidates by
gamma_s = gamma_min + (1 - gamma_min) * progress_s; logits and sampled tokens stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.config import Registry
from unmask.decoding.sampling import Candidates


class Confidence(NamedTuple):
    """A rule for scores."""

    score: Callable[[Candidates, Tensor | None], Tensor]
    """(candidates, uniform noise (N,) where the rule is ``noisy``, else None) -> scores (N,) float64 in [0, 1]."""
    entropy: bool = False
    """Whether it reads the candidates' entropy."""
    noisy: bool = False
    """Whether it draws a number for every position."""

    @staticmethod
    def of(name: str) -> Confidence:
        """The rule of that name; a plain function reads no entropy and draws nothing. Raises UserError."""
        rule = CONFIDENCES.resolve(name)
        return rule if isinstance(rule, Confidence) else Confidence(rule)


CONFIDENCES: Registry[Confidence | Callable[[Candidates, Tensor | None], Tensor]] = Registry("confidence")
"""Rules by name; ``@CONFIDENCES.register("name")`` adds one."""


@CONFIDENCES.register("low-confidence")
def low_confidence(c: Candidates, _: Tensor | None) -> Tensor:
    """Probability of the candidate at temperature 1 (``low-confidence remasking`` in LLaDA's words)."""
    return c.logprob.double().exp()


@CONFIDENCES.register("random")
@partial(Confidence, noisy=True)
def random(_: Candidates, noise: Tensor | None) -> Tensor:
    """Uniform noise: positions in random order."""
    assert noise is not None
    return noise


@CONFIDENCES.register("margin")
def margin(c: Candidates, _: Tensor | None) -> Tensor:
    """Difference between the two largest probabilities."""
    return c.top - c.second


@CONFIDENCES.register("entropy")
@partial(Confidence, entropy=True)
def entropy(c: Candidates, _: Tensor | None) -> Tensor:
    """1 - H / log V: one for a certain position, zero for a uniform one."""
    assert c.entropy is not None and c.most is not None
    return (1 - c.entropy / c.most).clamp(0, 1)


def reject_eos(scores: Tensor, tokens: Tensor, end_ids: Tensor, gamma: Tensor | float) -> Tensor:
    """EOSER: end candidates keep the share ``gamma`` of their score. scores, tokens and gamma (or a number) of one shape."""
    return torch.where(torch.isin(tokens, end_ids), scores * gamma, scores)


def suppress_eos(scores: Tensor, tokens: Tensor, end_ids: Tensor) -> Tensor:
    """The hard control: an end candidate is committed only once no other candidate is left.

    End candidates score next to nothing, below every other one, but keep their order among themselves (float64 has the range).
    """
    return torch.where(torch.isin(tokens, end_ids), scores * 1e-100, scores.clamp(min=1e-99))


def exclude_eos(scores: Tensor, tokens: Tensor, end_ids: Tensor, end: Tensor) -> Tensor:
    """LLaDA's evaluation: confidence is the candidate's probability among the tokens that are no end tokens.

    Its code (``confidence_eos_eot_inf``) scores end candidates 0 and so leaves their order open; here they keep theirs.
    end: (N,) float64, the probability of the end tokens together.
    """
    among_others = (scores / (1 - end).clamp(min=torch.finfo(end.dtype).tiny)).clamp(max=1)
    return suppress_eos(torch.where(torch.isin(tokens, end_ids), scores, among_others), tokens, end_ids)
