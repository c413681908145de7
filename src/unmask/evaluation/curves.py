"""What the recorded trajectories of a cell show: end tokens and confidence over the steps, and the order of commits."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from unmask.decoding.trajectory import Trajectory

TIME_BINS, POSITION_BINS = 16, 32


def kept_trajectories(trajectory: Trajectory) -> list[dict[str, list[Any]]]:
    """What a record keeps of each row, (L,) each: ``tokens``, ``steps`` (-1: never committed), ``logprobs`` (nats)."""
    logprobs = [[round(v, 5) for v in row] for row in trajectory.logprob.tolist()]
    rows = zip(trajectory.tokens.tolist(), trajectory.step.tolist(), logprobs, strict=True)
    return [{"tokens": tokens, "steps": steps, "logprobs": logprob} for tokens, steps, logprob in rows]


def curves(records: Sequence[dict[str, Any]], end_ids: Collection[int], steps: int | None) -> dict[str, Any]:
    """Curves of one cell from records with trajectories.

    Args:
        end_ids: the tokens that end a text. steps: steps of the decoder's plan; None where rows
            take as many as they need (a threshold).

    Returns:
        Lists with one entry a step, up to the last that any row took; None where nothing of the kind was committed:
            ``commits``: mean number of tokens committed, over all rows. ``eos_share``: share of end tokens among them.
            ``end_confidence``, ``other_confidence``: mean probability of the committed end tokens and of the others.
        ``order``: [time][position], 16 x 32. The share of a position's commits that fall into a part of the decode; step s
            of S (the plan's, or the row's own) lies in part 16 s / S, position i of L in column 32 i / L. A column sums to
            1, or holds None.
    """
    tokens, at, logprobs = (np.array([r[key] for r in records]) for key in ("tokens", "steps", "logprobs"))
    length, done = tokens.shape[1], at >= 0
    count = int(at.max()) + 1
    ends = np.isin(tokens, list(end_ids))

    def by_step(chosen: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        picked = None if weights is None else weights[chosen]
        return np.bincount(at[chosen], weights=picked, minlength=count)

    def share(part: np.ndarray, whole: np.ndarray) -> list[float | None]:
        quotients = (p / w if w else math.nan for p, w in zip(part, whole, strict=True))
        return [None if math.isnan(q) else round(float(q), 6) for q in quotients]

    commits, end_commits = by_step(done), by_step(done & ends)
    order = np.zeros((TIME_BINS, POSITION_BINS))
    column = np.broadcast_to(np.arange(length) * POSITION_BINS // length, at.shape)
    taken = at.max(1, keepdims=True) + 1 if steps is None else np.full((len(at), 1), steps)
    np.add.at(order, ((at * TIME_BINS // taken)[done], column[done]), 1)
    return {
        "commits": [round(float(c) / len(records), 6) for c in commits],
        "eos_share": share(end_commits, commits),
        "end_confidence": share(by_step(done & ends, np.exp(logprobs)), end_commits),
        "other_confidence": share(by_step(done & ~ends, np.exp(logprobs)), commits - end_commits),
        "order": [share(row, order.sum(0)) for row in order],
    }
