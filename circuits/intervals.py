"""Means with their intervals: percentile bootstrap over pairs, and Student's where there are only a few values."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

BOOTSTRAPS = 1000


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its 95 % percentile bootstrap interval over pairs."""

    estimate: float
    low: float
    high: float


def mean(values: np.ndarray, seed: int) -> Interval:
    """The mean of ``values`` [N]."""
    return ratio(values, np.ones(len(values)), seed)


def student(values: Sequence[float]) -> Interval:
    """The mean of divergences with Student's 95 % interval, cut at 0; of one value, that value.

    Not a bootstrap: of three values, its lower end is hardly ever below the smallest, however far they scatter.
    """
    array = np.asarray(values, dtype=np.float64)
    n, middle = len(array), float(array.mean())
    half = float(stats.t.ppf(0.975, n - 1) * array.std(ddof=1) / n**0.5) if n > 1 else 0.0
    return Interval(middle, max(0.0, middle - half), middle + half)


def ratio(above: np.ndarray, below: np.ndarray, seed: int) -> Interval:
    """Σ above / Σ below over pairs (a ratio of means)."""
    draws = np.random.default_rng(seed).integers(len(above), size=(BOOTSTRAPS, len(above)))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = above[draws].sum(1) / below[draws].sum(1)
        estimate = float(above.sum() / below.sum())
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(estimate, float(low), float(high))
