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


class Bootstrap:
    """Draws of pooled shares, paired: the same problems and seeds are drawn for every cell that has them (fixed seeds).

    Seeds are drawn with replacement; of each, its problems. Seeds with the same problems get the same problems in a draw, so
    what is hard for all is not taken for a spread between seeds.
    """

    def __init__(self, draws: int = 10_000) -> None:
        self.count = draws
        self._problems: dict[tuple[str, int], np.ndarray] = {}
        self._seeds: dict[int, np.ndarray] = {}

    def _weights(self, name: str, size: int) -> np.ndarray:
        """How often each problem is drawn, (draws, problems)."""
        if (name, size) not in self._problems:
            rng = np.random.default_rng([size, *name.encode()])
            self._problems[name, size] = rng.multinomial(size, np.full(size, 1 / size), self.count).astype(np.float64)
        return self._problems[name, size]

    def _seed_weights(self, seeds: int) -> np.ndarray:
        """How often each seed is drawn, (draws, seeds); a single one always."""
        if seeds not in self._seeds:
            self._seeds[seeds] = np.random.default_rng(seeds).multinomial(seeds, np.full(seeds, 1 / seeds), self.count)
        return self._seeds[seeds]

    def draws(self, above: Sequence[np.ndarray], below: Sequence[np.ndarray], problems: Sequence[str]) -> np.ndarray:
        """Drawn values of sum(above) / sum(below), (draws,) float64.

        Args:
            above, below: one array (problems,) a seed. problems: what the problems of each seed are known by.
        """
        seeds = self._seed_weights(len(above))
        alike: dict[tuple[str, int], list[int]] = {}
        for i, (name, array) in enumerate(zip(problems, above, strict=True)):
            alike.setdefault((name, len(array)), []).append(i)
        parts = []
        for arrays in (above, below):
            drawn = np.empty(seeds.shape)
            for (name, size), places in alike.items():
                drawn[:, places] = self._weights(name, size) @ np.stack([arrays[i] for i in places], axis=1)
            parts.append((drawn * seeds).sum(1))
        return parts[0] / parts[1]

    @staticmethod
    def p(draws: np.ndarray) -> float:
        """Two-sided p of "no difference" from draws of a difference: twice the smaller tail, at least 2 / (draws + 1)."""
        tail = min((draws <= 0).sum(), (draws >= 0).sum())
        return float(min(1.0, 2 * (tail + 1) / (len(draws) + 1)))


def student_p(t: float, freedom: int) -> float:
    """Two-sided p of Student's t."""
    from scipy.stats import t as student  # only here: it takes a second to import

    return float(2 * student.sf(abs(t), freedom))


def student_half_width(values: Sequence[float]) -> float:
    """Half the 95 % interval of the mean of two or more values."""
    from scipy.stats import t as student

    return float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1)) / math.sqrt(len(values))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: below 0.05 where the error over all comparisons together is (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], possible: Sequence[float]
) -> tuple[float, tuple[float, float]]:
    """sum(ours)/sum(possible) - sum(theirs)/sum(possible) on the same problems, with its paired 95 % bootstrap interval."""
    bootstrap = Bootstrap()
    a, b, whole = (np.asarray(v, dtype=np.float64) for v in (ours, theirs, possible))
    draws = bootstrap.draws([a - b], [whole], ["problems"])
    low, high = np.quantile(draws, [0.025, 0.975])
    return float((a - b).sum() / whole.sum()), (float(low), float(high))


def pareto_front(rows: Iterable[T], key: Callable[[T], tuple[float, float]]) -> list[T]:
    """The rows that no other reaches with as few passes, by passes; of equals the first. ``key``: (passes, value)."""
    front: list[T] = []
    for row in sorted(rows, key=lambda row: (key(row)[0], -key(row)[1])):
        if not front or key(row)[1] > key(front[-1])[1]:
            front.append(row)
    return front
