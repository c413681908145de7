"""From hidden states to candidates: one pass over the vocabulary, one uniform number a position, reproducible row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.models.head import BUCKET, Head, rescale, within

# Streams of random numbers that one step draws for each position.
TOKEN, ORDER = 0, 1
NUCLEUS = 2**24  # logits that are sorted at a time
GOLDEN = -0x61C8864680B583EB  # splitmix64's increment as a signed integer


def _mix(z: Tensor) -> Tensor:
    """The splitmix64 finalizer on int64 (multiplication wraps)."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def uniform_noise(seeds: Tensor, step: Tensor | int, positions: Tensor, stream: int) -> Tensor:
    """Uniform numbers in [0, 1) that depend on nothing but a row's seed, the step, the position and the stream.

    So a row is decoded alike in whatever batch. seeds, step and positions int64, broadcast together -> float64.
    """
    number = 2 * step + (stream + 1) + torch.zeros_like(seeds)  # a tensor, so that the product wraps
    z = _mix(seeds + GOLDEN * number)
    z = _mix(z + GOLDEN * (positions + 1))
    return ((z >> 11) & 0x1FFFFFFFFFFFFF).double() * 2.0**-53


@dataclass(frozen=True)
class Candidates:
    """One candidate token a position, with what confidences read, (N,) each."""

    tokens: Tensor
    """int64."""
    logprob: Tensor
    """Of ``tokens`` at temperature 1; float32, float64 where the model is."""
    top: Tensor
    """The largest probability, float64."""
    second: Tensor
    """The second largest, float64."""
    entropy: Tensor | None = None
    """In nats, float64, where asked for."""
    most: Tensor | None = None
    """The entropy of a uniform distribution, log V, with ``entropy``."""
    end: Tensor | None = None
    """Probability of the end tokens together at temperature 1, float64, where asked for."""
    also: Tensor | None = None
    """(N, S) float64: log-probabilities of further tokens, where asked for."""
    likely: Tensor | None = None
    """The most likely tokens where ``tokens`` are sampled, int64."""
    score: Tensor | None = None
    """What a decoder scores them by instead of its confidence, float64."""


def candidates(
    head: Head,
    hidden: Tensor,
    temperature: float,
    noise: Tensor | None,
    entropy: bool = False,
    top_p: float = 1.0,
    end_ids: Sequence[int] = (),
    also: Tensor | None = None,
) -> Candidates:
    """The most likely token of every position (temperature 0), or one sampled from softmax(logits / temperature).

    Sampling is exact, by inverse CDF in two stages, summed in float64: a bucket of 64 tokens, then a token in it. (The
    reference draws V Gumbel numbers in bfloat16 and so over-samples the top token.)

    Args:
        hidden: (N, d) final hidden states. noise: (N,) float64 in [0, 1), or None at temperature 0.
        top_p: below 1, nucleus sampling (arXiv 1904.09751) among the most likely tokens whose probabilities at
            ``temperature`` first exceed it; this sorts the vocabulary. Scores and log-probabilities do not know of it.
        entropy, end_ids: whether to compute the entropy, and of which tokens the probability together.
        also: (N, S) int64, tokens whose log-probabilities are wanted, -1 for none; at temperature 0.
    """
    found = []
    for i, h in enumerate(head.parts(hidden)):
        if noise is None:
            found.append(
                _Vocabulary(head, h, entropy, end_ids, None, None if also is None else head.parts(also)[i]).candidates
            )
            continue
        u = head.parts(noise)[i]
        read = _Vocabulary(head, h, entropy, end_ids, temperature)
        likely = read.candidates
        if top_p < 1:
            drawn, logit = _draw_nucleus(head, h, read.size, temperature, top_p, u)
        else:
            drawn, logit = _draw(head, h, read, temperature, u)
        logprob = torch.where(drawn == likely.tokens, read.logprob, logit - read.top + read.logprob)
        found.append(replace(likely, tokens=drawn, logprob=logprob.to(likely.logprob), likely=likely.tokens))
    computed = [name for name, value in vars(found[0]).items() if value is not None]
    return replace(found[0], **{name: torch.cat([getattr(f, name) for f in found]) for name in computed})


class _Vocabulary:
    """One pass over the vocabulary.

    ``candidates``: the most likely tokens; ``top``, ``logprob`` (N,): their logits and log-probabilities, float64. ``share``
    (N, pieces): what brings a piece's sums to the scale of the largest logit of all. With a temperature, ``buckets``: a
    piece's sums over 64 neighbors of exp((logit - the piece's top) / temperature), and ``whole``: all logits of one piece.
    ``size``: tokens of the vocabulary.
    """

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        with_entropy: bool,
        end_ids: Sequence[int],
        temperature: float | None,
        also: Tensor | None = None,
    ) -> None:
        self.whole: Tensor | None = None
        self.buckets: list[Tensor] = []
        tops, masses, products, ends = [], [], [], []
        every = torch.arange(len(hidden), device=hidden.device)

        # Of the piece that leads so far: the sum of the other tokens' weights is kept apart from the largest one, which is 1,
        # for it may be too small to change a sum with 1.
        lead = [hidden.new_zeros(len(hidden), dtype=torch.float64) for _ in range(5)]
        largest, token, piece, rest, second = lead
        largest.fill_(-torch.inf)
        size, more = 0, None
        if also is not None:
            more = torch.full(also.shape, -torch.inf, dtype=torch.float64, device=also.device)
        for number, (a, logits) in enumerate(head.pieces(hidden)):
            size = a + logits.shape[1]
            if temperature is not None and number == 0 and (head.weight is None or size == len(head.weight)):
                self.whole = logits.clone()
            if also is not None and more is not None and also.shape[1]:
                at, inside = within(also, a, logits)
                more = torch.where(inside, logits.gather(1, at).double(), more)
            top = logits.amax(1)
            x = logits.sub_(top[:, None])
            if temperature is not None and temperature != 1:
                self.buckets.append(_bucket_sums((x / temperature).exp_()))
            weight = x.exp() if with_entropy else x.exp_()
            if with_entropy:
                products.append((weight * x).sum(1))  # of e^x x. (vecdot would be bfloat16 under autocast)
            if temperature == 1:  # the same weights serve
                self.buckets.append(_bucket_sums(weight))
            masses.append((self.buckets[-1] if temperature == 1 else weight).sum(1))
            tops.append(top)
            if end_ids:  # (a list as index would be copied to the device in every step)
                none = weight.new_zeros(len(weight), dtype=torch.float64)
                ends.append(sum((weight[:, i - a].double() for i in end_ids if a <= i < size), none))
            # A later piece leads in few rows. Looking which ones would make another device wait, so there all are done.
            better = ~(top <= largest)  # so that a NaN shows
            rows = better.nonzero()[:, 0] if number and hidden.device.type == "cpu" else every
            own = weight[rows]
            at = own.argmax(1, keepdim=True)
            own.scatter_(1, at, 0.0)
            found = (top[rows], at[:, 0] + a, torch.full_like(rows, number), own.sum(1), own.amax(1))
            for old, new in zip(lead, found, strict=True):
                old[rows] = torch.where(better[rows], new.double(), old[rows])
        self.size = size
        self.share, self.top = rescale(tops)
        mass, home = torch.stack(masses, 1), piece.long()[:, None]
        rest = rest + (self.share * mass).scatter(1, home, 0.0).sum(1)  # odds against the most likely token
        self.logprob = -rest.log1p()
        probability = self.logprob.exp()
        second = torch.maximum(self.share.scatter(1, home, 0.0).amax(1), second) * probability
        entropy = end = None
        if with_entropy:
            spread = (self.share * torch.stack(products, 1)).sum(1) - (torch.special.entr(self.share) * mass).sum(1)
            entropy = rest.log1p() - spread * probability
        if end_ids:
            end = (self.share * torch.stack(ends, 1)).sum(1) * probability
        most = None if entropy is None else torch.full_like(entropy, math.log(size))
        more = None if more is None else more - self.top[:, None] + self.logprob[:, None]
        self.candidates = Candidates(
            token.long(), self.logprob.to(tops[0]), probability, second, entropy, most, end, more
        )


def _bucket_sums(weight: Tensor) -> Tensor:
    """Sums of 64 neighbors: (N, c) -> (N, ceil(c / 64))."""
    short = -weight.shape[1] % BUCKET
    return (F.pad(weight, (0, short)) if short else weight).unflatten(1, (-1, BUCKET)).sum(-1)


def _pick(cdf: Tensor, noise: Tensor) -> Tensor:
    """The first index whose running sum exceeds noise * total. cdf (N, K) float64, noise (N,) in [0, 1) -> (N, 1)."""
    total = cdf[:, -1]
    target = torch.minimum(noise * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target[:, None], right=True).clamp(max=cdf.shape[1] - 1)


def _draw(head: Head, hidden: Tensor, read: _Vocabulary, temperature: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """A token (N,) by inverse CDF, and its logit: a bucket by its sum, then one of its 64 tokens.

    What of ``noise`` remains once the bucket is chosen is uniform again and chooses the token.
    """
    scale = read.share ** (1 / temperature)
    weights = torch.cat([sums.double() * scale[:, i : i + 1] for i, sums in enumerate(read.buckets)], 1)
    cdf = weights.cumsum(1)
    bucket = _pick(cdf, noise)
    width = weights.gather(1, bucket)
    left = (noise * cdf[:, -1])[:, None] - (cdf.gather(1, bucket) - width)
    if read.whole is None:
        logits = head.bucket_logits(hidden, bucket[:, 0]).double()
    else:
        token = bucket * BUCKET + torch.arange(BUCKET, device=bucket.device)
        size = read.whole.shape[1]
        logits = read.whole.gather(1, token.clamp(max=size - 1)).double().masked_fill(token >= size, -torch.inf)
    inner = ((logits - read.top[:, None]) / temperature).exp()
    at = _pick(inner.cumsum(1), (left / width).clamp(0, 1)[:, 0])
    # A rounded sum may point at an impossible token; the likeliest one of the bucket replaces it.
    at = torch.where(inner.gather(1, at) > 0, at, inner.argmax(1, keepdim=True))
    return (bucket * BUCKET + at)[:, 0], logits.gather(1, at)[:, 0]


def _draw_nucleus(
    head: Head, hidden: Tensor, size: int, temperature: float, top_p: float, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """A token (N,) among the nucleus of each row, and its logit. size: tokens of the vocabulary."""
    found, rows = [], max(1, NUCLEUS // size)  # sorted at a time
    for h, n in zip(hidden.split(rows), noise.split(rows), strict=True):
        logits = torch.cat([x.clone() for _, x in head.pieces(h)], 1).double()
        ordered = logits.sort(dim=1, descending=True, stable=True)
        weight = (ordered.values / temperature).softmax(1)
        kept = weight.masked_fill(weight.cumsum(1) - weight > top_p, 0.0)  # the first always stays
        at = _pick(kept.cumsum(1), n)
        found.append((ordered.indices.gather(1, at)[:, 0], ordered.values.gather(1, at)[:, 0]))
    tokens, values = zip(*found, strict=True)
    return torch.cat(tokens), torch.cat(values)
