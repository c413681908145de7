"""Intervals. Everything here is deterministic."""

from __future__ import annotations

import math

import numpy as np


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
