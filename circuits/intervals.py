"""Means and ratios of means over pairs with percentile bootstrap intervals."""

from dataclasses import dataclass

import numpy as np

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


def ratio(above: np.ndarray, below: np.ndarray, seed: int) -> Interval:
    """Σ above / Σ below over pairs (a ratio of means)."""
    draws = np.random.default_rng(seed).integers(len(above), size=(BOOTSTRAPS, len(above)))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = above[draws].sum(1) / below[draws].sum(1)
        estimate = float(above.sum() / below.sum())
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(estimate, float(low), float(high))
