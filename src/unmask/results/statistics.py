"""Intervals, tests, and the Pareto front. Everything here is deterministic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % score interval for a share, as (low, high) in [0, 1]. Raises ValueError without trials."""
    if trials < 1:
        raise ValueError("an interval needs at least one trial")
    p = successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))  # p is inside, whatever the rounding


def pooled_bootstrap(points: list[float], possible: list[float], draws: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of sum(points)/sum(possible), problems resampled (fixed seed)."""
    rng = np.random.default_rng(0)
    p, q = np.asarray(points), np.asarray(possible)
    rows = rng.integers(0, len(p), (draws, len(p)))
    ratios = p[rows].sum(1) / q[rows].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], possible: Sequence[float]
) -> tuple[float, tuple[float, float]]:
    """sum(ours)/sum(possible) - sum(theirs)/sum(possible) on the same problems, with its paired 95 % bootstrap interval."""
    a, b, whole = (np.array(values, dtype=float)[:, None] for values in (ours, theirs, possible))
    difference = a - b
    weights = problem_weights("problems", len(whole), 10_000)
    low, high = np.quantile((weights @ difference) / (weights @ whole), [0.025, 0.975])
    return float(difference.sum() / whole.sum()), (float(low), float(high))


def problem_weights(name: str, size: int, draws: int) -> np.ndarray:
    """How often a bootstrap draws each of ``size`` problems, (draws, size) float64; the same for the same name and size."""
    rng = np.random.default_rng([size, *name.encode()])
    return rng.multinomial(size, np.full(size, 1 / size), draws).astype(np.float64)


def pareto_front(rows: Iterable[T], key: Callable[[T], tuple[float, float]]) -> list[T]:
    """The rows that no other reaches with as few passes, by passes; of equals the first. ``key``: (passes, value)."""
    front: list[T] = []
    for row in sorted(rows, key=lambda row: (key(row)[0], -key(row)[1])):
        if not front or key(row)[1] > key(front[-1])[1]:
            front.append(row)
    return front
