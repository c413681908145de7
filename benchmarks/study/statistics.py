"""Bootstrap over problems and seeds, Student's t, and the adjustment of many tests. Everything here is deterministic."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student

from unmask.results.statistics import problem_weights


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
            self._problems[name, size] = problem_weights(name, size, self.count)
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
    return float(2 * student.sf(abs(t), freedom))


def student_half_width(values: Sequence[float]) -> float:
    """Half the 95 % interval of the mean of two or more values."""
    return float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1)) / math.sqrt(len(values))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: below 0.05 where the error over all comparisons together is (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
