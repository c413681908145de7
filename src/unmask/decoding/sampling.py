"""From hidden states to candidates: one pass over the vocabulary, one uniform number a position, reproducible row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.models.head import BUCKET, Head, rescale

# Streams of random numbers that one step draws for each position.
TOKEN, ORDER = 0, 1
NUCLEUS = 2**24  # logits that are sorted at a time
GOLDEN = -0x61C8864680B583EB  # splitmix64's increment as a signed integer


def _mix(z: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64 (multiplication wraps)."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def uniform_noise(seeds: Tensor, step: Tensor | int, positions: Tensor, stream: int) -> Tensor:
    """Uniform numbers in [0, 1) that depend on nothing but a row's seed, the step, the position and the stream.

    So a row is decoded alike in whatever batch it stands. seeds, step and positions int64, broadcast together -> float64.
    """
    number = 2 * step + (stream + 1) + torch.zeros_like(seeds)  # a tensor, so that the product wraps
    z = _mix(seeds + GOLDEN * number)
    z = _mix(z + GOLDEN * (positions + 1))
    return ((z >> 11) & 0x1FFFFFFFFFFFFF).double() * 2.0**-53


@dataclass(frozen=True)
class Candidates:
    """One candidate token a position, with what confidences need.

    Attributes:
        tokens: (N,) int64. logprob: (N,) float32 (float64 where the model is), log-probability of ``tokens`` at temperature 1.
        top, second: (N,) float64, the two largest probabilities (``second`` only where asked for).
        entropy: (N,) float64, in units of log V, where asked for.
        end: (N,) float64, probability of the end tokens together at temperature 1, where asked for.
    """

    tokens: Tensor
    logprob: Tensor
    top: Tensor
    second: Tensor | None = None
    entropy: Tensor | None = None
    end: Tensor | None = None


def candidates(
    head: Head,
    hidden: Tensor,
    temperature: float,
    noise: Tensor | None,
    needs: frozenset[str] = frozenset(),
    top_p: float = 1.0,
    end_ids: Sequence[int] = (),
) -> Candidates:
    """The most likely token of every position (temperature 0), or one sampled from softmax(logits / temperature).

    Sampling is exact, by inverse CDF in two stages, summed in float64: a lane of 64 tokens, then a token in it. (The
    reference draws V Gumbel numbers in bfloat16 and so over-samples the top token.)

    Args:
        hidden: (N, d) final hidden states. noise: (N,) float64 in [0, 1), or None at temperature 0.
        needs: ``second`` and ``entropy``, where a confidence reads them.
        top_p: below 1, tokens are sampled among the most likely ones whose probabilities (at ``temperature``) first exceed
            it (nucleus sampling, arXiv 1904.09751); this sorts the vocabulary. Scores and log-probabilities do not know of it.
        end_ids: tokens whose probability together is asked for.
    """
    noises = [None] * len(head.parts(hidden)) if noise is None else head.parts(noise)
    found = [
        _candidates(head, h, temperature, n, needs, top_p, end_ids)
        for h, n in zip(head.parts(hidden), noises, strict=True)
    ]
    if len(found) == 1:
        return found[0]
    columns: dict[str, Any] = {}
    for name, value in vars(found[0]).items():
        columns[name] = None if value is None else torch.cat([getattr(f, name) for f in found])
    return Candidates(**columns)


def _candidates(
    head: Head,
    hidden: Tensor,
    temperature: float,
    noise: Tensor | None,
    needs: frozenset[str],
    top_p: float,
    end_ids: Sequence[int],
) -> Candidates:
    # One entry a piece of the vocabulary, each on the scale of its largest logit.
    tops, masses, products, lanes, ends = [], [], [], [], []
    # Of the piece that leads so far, a row each: largest logit, its token, the piece's number, the sum of the other weights
    # (kept apart, for they may be too small to change a sum with 1), the largest of them.
    lead = torch.zeros(len(hidden), 5, dtype=torch.float64, device=hidden.device)
    lead[:, 0] = -torch.inf
    every = torch.arange(len(hidden), device=hidden.device)
    size, whole = 0, None
    for number, (a, logits) in enumerate(head.pieces(hidden)):
        size = a + logits.shape[1]
        if noise is not None and number == 0 and size == (logits.shape[1] if head.weight is None else len(head.weight)):
            whole = logits.clone()
        top = logits.amax(1)
        x = logits.sub_(top[:, None])
        if noise is not None and temperature != 1:
            lanes.append(_lane_sums((x / temperature).exp_()))
        if "entropy" in needs:
            weight = x.exp()
            products.append((weight * x).sum(1))  # of e^x x. (vecdot would be bfloat16 under autocast)
        else:
            weight = x.exp_()
        if noise is not None and temperature == 1:  # the same weights serve
            lanes.append(_lane_sums(weight))
            masses.append(lanes[-1].sum(1))
        else:
            masses.append(weight.sum(1))
        tops.append(top)
        if end_ids:
            ends.append(weight[:, [i - a for i in end_ids if a <= i < size]].double().sum(1))
        # A later piece leads in few rows. Looking which ones would make another device wait, so there all are done.
        better = ~(top <= lead[:, 0])  # so that a NaN shows
        rows = better.nonzero()[:, 0] if number and hidden.device.type == "cpu" else every
        own = weight[rows]
        at = own.argmax(1, keepdim=True)
        own.scatter_(1, at, 0.0)
        found = (top[rows], at[:, 0] + a, torch.full_like(rows, number), own.sum(1), own.amax(1))
        lead[rows] = torch.where(better[rows, None], torch.stack([f.double() for f in found], 1), lead[rows])
    share, top = rescale(tops)
    token, home, rest, second_weight = lead[:, 1].long(), lead[:, 2:3].long(), lead[:, 3], lead[:, 4]
    mass = torch.stack(masses, 1)
    rest = rest + (share * mass).scatter(1, home, 0.0).sum(1)  # odds against the most likely token
    logprob = -rest.log1p()
    probability = logprob.exp()
    second = entropy = None
    if "second" in needs:
        second = torch.maximum(share.scatter(1, home, 0.0).amax(1), second_weight) * probability
    if "entropy" in needs:
        spread = (share * torch.stack(products, 1)).sum(1) - (torch.special.entr(share) * mass).sum(1)
        entropy = (rest.log1p() - spread * probability) / math.log(size)
    if noise is not None:
        if top_p < 1:
            drawn, logit = _draw_nucleus(head, hidden, temperature, top_p, noise)
        else:
            scale = share ** (1 / temperature)
            weights = torch.cat([lane.double() * scale[:, i : i + 1] for i, lane in enumerate(lanes)], 1)
            drawn, logit = _draw(head, hidden, whole, weights, top, temperature, noise)
        logprob = torch.where(drawn == token, logprob, logit - top + logprob)
        token = drawn
    end = (share * torch.stack(ends, 1)).sum(1) * probability if end_ids else None
    return Candidates(token, logprob.to(tops[0]), probability, second, entropy, end)


def _lane_sums(weight: Tensor) -> Tensor:
    """Sums of 64 neighbours: (N, c) -> (N, ceil(c / 64))."""
    short = -weight.shape[1] % BUCKET
    return (F.pad(weight, (0, short)) if short else weight).unflatten(1, (-1, BUCKET)).sum(-1)


def _pick(cdf: Tensor, noise: Tensor) -> Tensor:
    """The first index whose running sum exceeds noise * total. cdf (N, K) float64, noise (N,) in [0, 1) -> (N, 1)."""
    total = cdf[:, -1]
    target = torch.minimum(noise * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target[:, None], right=True).clamp(max=cdf.shape[1] - 1)


def _draw(
    head: Head,
    hidden: Tensor,
    whole: Tensor | None,
    weights: Tensor,
    top: Tensor,
    temperature: float,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """A token (N,) by inverse CDF, and its logit: a lane by ``weights`` (N, lanes), then one of the lane's 64 tokens.

    What of ``noise`` remains once the lane is chosen is uniform again and chooses the token. The lane's logits come from
    ``whole`` (N, V) where the vocabulary was one piece, else from the head again.
    """
    cdf = weights.cumsum(1)
    lane = _pick(cdf, noise)
    width = weights.gather(1, lane)
    left = (noise * cdf[:, -1])[:, None] - (cdf.gather(1, lane) - width)
    if whole is None:
        logits = head.bucket_logits(hidden, lane[:, 0]).double()
    else:
        token = lane * BUCKET + torch.arange(BUCKET, device=lane.device)
        logits = whole.gather(1, token.clamp(max=whole.shape[1] - 1)).double()
        logits = logits.masked_fill(token >= whole.shape[1], -torch.inf)
    inner = ((logits - top[:, None]) / temperature).exp()
    at = _pick(inner.cumsum(1), (left / width).clamp(0, 1)[:, 0])
    # A rounded sum may point at an impossible token; the likeliest one of the lane stands in.
    at = torch.where(inner.gather(1, at) > 0, at, inner.argmax(1, keepdim=True))
    return (lane * BUCKET + at)[:, 0], logits.gather(1, at)[:, 0]


def _draw_nucleus(head: Head, hidden: Tensor, temperature: float, top_p: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """A token (N,) among the nucleus of each row, and its logit."""
    tokens, logits = [], []
    rows = max(1, NUCLEUS // sum(x.shape[1] for _, x in head.pieces(hidden[:1])))  # sorted at a time
    for h, n in zip(hidden.split(rows), noise.split(rows), strict=True):
        ordered = (
            torch.cat([x.clone() for _, x in head.pieces(h)], 1).double().sort(dim=1, descending=True, stable=True)
        )
        weight = (ordered.values / temperature).softmax(1)
        cdf = weight.cumsum(1)
        kept = weight.masked_fill(cdf - weight > top_p, 0.0)  # the first always stays
        at = _pick(kept.cumsum(1), n)
        tokens.append(ordered.indices.gather(1, at)[:, 0])
        logits.append(ordered.values.gather(1, at)[:, 0])
    return torch.cat(tokens), torch.cat(logits)
