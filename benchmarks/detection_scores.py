"""The statistics of the detection table: AUROC with an interval over seeds, rates, hits among the first nodes.

Sources: area under the ROC curve as the Mann-Whitney statistic (Hanley & McNeil 1982); its interval by inverting their
variance (method 5 of Newcombe 2006, Statistics in Medicine 25:559), which has a width at areas of 0 and 1 too, and by
the bootstrap over clusters (Efron & Tibshirani 1993, chapter 8); rates after Clopper & Pearson 1934.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb, isnan

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, norm

DRAWS = 2000
"""Bootstrap draws over seeds."""

BySeed = Mapping[int, Sequence[float]]
"""Scores of pairs by the seed they were made from; pairs of one seed share a parent, so they are drawn together."""


@dataclass(frozen=True)
class Area:
    """An area under the ROC curve with its 95 % interval, from how many positives and negatives."""

    value: float
    low: float
    high: float
    positives: int
    negatives: int


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Share of (positive, negative) pairs in which the positive scores higher, ties counted half."""
    if not len(positive) or not len(negative):
        return float("nan")
    return float(_wins(positive, negative) / (len(positive) * len(negative)))


def area(positive: BySeed, negative: BySeed, draws: int = DRAWS) -> Area | None:
    """The area, with the wider of two intervals at each end: bootstrap over seeds, and Newcombe's with a seed counted
    once however many pairs it has. None where either side is empty.
    """
    positive = {seed: scores for seed, scores in positive.items() if len(scores)}
    negative = {seed: scores for seed, scores in negative.items() if len(scores)}
    if not positive or not negative:
        return None
    seeds = sorted({*positive, *negative})
    wins = np.array([[_wins(positive.get(p, ()), negative.get(n, ())) for n in seeds] for p in seeds])
    sizes = np.array([[len(side.get(seed, ())) for seed in seeds] for side in (positive, negative)], dtype=float)
    weights = np.random.default_rng(0).multinomial(len(seeds), [1 / len(seeds)] * len(seeds), size=draws)
    total = (weights @ sizes[0]) * (weights @ sizes[1])
    drawn = np.einsum("di,ij,dj->d", weights, wins, weights)[total > 0] / total[total > 0]
    value = float(wins.sum() / (sizes[0].sum() * sizes[1].sum()))
    low, high = newcombe(value, len(positive), len(negative))
    ends = np.quantile(drawn, [0.025, 0.975])
    return Area(value, min(low, float(ends[0])), max(high, float(ends[1])), int(sizes[0].sum()), int(sizes[1].sum()))


def _wins(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Pairs in which the positive scores higher, ties counted half."""
    order = np.sort(np.asarray(negative, dtype=float))
    below = np.searchsorted(order, positive, side="left")
    return float((below + np.searchsorted(order, positive, side="right")).sum() / 2)


def newcombe(value: float, positives: int, negatives: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of an area of independent scores: the areas from whose own standard error ``value`` is not too far."""
    z, common = norm.ppf((1 + level) / 2), (positives + negatives) / 2 - 1

    def apart(theta: float) -> float:
        spread = 1 + common * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return abs(value - theta) - z * (theta * (1 - theta) * spread / (positives * negatives)) ** 0.5

    # At 0 and 1 the standard error vanishes; just inside them it outweighs the distance.
    inner = min(max(value, 1e-12), 1 - 1e-12)
    low = 0.0 if value == 0 else float(brentq(apart, 0.0, inner))  # pyright: ignore[reportArgumentType]
    high = 1.0 if value == 1 else float(brentq(apart, inner, 1.0))  # pyright: ignore[reportArgumentType]
    return low, high


def rate(hits: int, of: int) -> tuple[float, float]:
    """Exact 95 % interval of a share (Clopper & Pearson)."""
    if not of:
        return 0.0, 1.0
    interval = binomtest(hits, of).proportion_ci(method="exact")
    return float(interval.low), float(interval.high)


def planted_heads(planted: Sequence[str], heads: int) -> set[str]:
    """The nodes that carry what was planted: a planted ``attn_out@L`` is every head of layer L."""
    found = set()
    for node in planted:
        kind, _, layer = node.partition("@")
        found |= {f"attn_head@{layer}.{head}" for head in range(heads)} if kind == "attn_out" else {node}
    return found


def hit(planted: set[str], ranked: Sequence[str], first: int) -> bool | None:
    """Whether one of the ``first`` ranked nodes is planted; None where nothing was planted."""
    return bool(planted & set(ranked[:first])) if planted else None


def by_chance(planted: int, of: int, first: int) -> float:
    """Probability that ``first`` of ``of`` nodes drawn at random hold one of ``planted``."""
    return 1 - comb(of - planted, min(first, of)) / comb(of, min(first, of))


def node_auroc(planted: set[str], scores: Mapping[str, float]) -> float | None:
    """Area of planted nodes above the others; None where all are planted, or none."""
    yes = [value for node, value in scores.items() if node in planted]
    no = [value for node, value in scores.items() if node not in planted]
    value = auroc(yes, no)
    return None if isnan(value) else value
