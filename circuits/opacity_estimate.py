"""From outcomes of the 2×2 to an estimate of opacity, or to a refusal.

With v(E, U) the metric when explained parts come from world E and unexplained parts from world U (1 the clean run, 0
the counterfactual), f = (v − v(0, 0)) / (v(1, 1) − v(0, 0)), and

    Ω = ½ [ (1 − f(1, 0)) + f(0, 1) ],    interaction = (1 − f(1, 0)) − f(0, 1)

which is the Shapley value of the unexplained parts in a game of two, so Ω and the explained share add up to 1. All
shares are ratios of means over prompts, with percentile bootstrap intervals over prompts; nothing is clipped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .intervals import Interval

BOOTSTRAPS = 2000
FEWEST = 30
"""Prompts below which no share is given: shares of single prompts vary by about half."""

Outcomes = Mapping[str, np.ndarray]
"""Metric per prompt, float64 [N], by who comes from the clean run: ``11``, ``10``, ``01``, ``00`` (explained,
unexplained)."""


@dataclass(frozen=True)
class Refused:
    """Opacity that was not measured; this is not opacity 0."""

    reason: str
    n: int
    """Prompts."""
    effect: Interval | None = None
    """Mean of v(1, 1) − v(0, 0) in units of the metric, where it was measured."""


@dataclass(frozen=True)
class Buckets:
    """Shapley values of three: explained parts, unexplained parts, attention patterns. They add up to 1."""

    explained: Interval
    unexplained: Interval
    routing: Interval
    routing_needed: Interval
    """Share lost when only the patterns are the counterfactual's."""
    routing_alone: Interval
    """Share restored by the clean run's patterns alone."""


@dataclass(frozen=True)
class Opacity:
    """The share of an effect that runs through unexplained parts, with 95 % intervals."""

    omega: Interval
    """½ (``needed`` + ``alone``). Negative where unexplained parts oppose the behaviour, above 1 where explained parts
    do."""
    needed: Interval
    """1 − f(1, 0): what is lost if unexplained parts carry what they carry in the counterfactual."""
    alone: Interval
    """f(0, 1): what unexplained parts restore by themselves."""
    interaction: Interval
    """``needed`` − ``alone``: above 0 both kinds are needed together (AND), below 0 either will do (OR, backup)."""
    effect: Interval
    """Mean of v(1, 1) − v(0, 0), in units of the metric: what all of this is a share of."""
    n: int
    """Prompts."""
    counterfactual: Literal["paired", "mean"]
    """What unexplained parts carry in world 0."""
    control: Interval | None = None
    """Ω when the difference of unexplained parts is replaced by a random direction of its norm. Where it is as large as
    ``omega``, the loss may come from being off the model's beaten track rather than from what the parts say."""
    buckets: Buckets | None = None
    """With attention patterns as a third kind of part; None where they were not held."""

    @property
    def explained(self) -> float:
        """1 − Ω; it includes what attention patterns do, unless ``buckets`` says how much that is."""
        return 1 - self.omega.estimate

    def __str__(self) -> str:
        o = self.omega
        words = f"opacity {o.estimate:.2f} [{o.low:.2f}; {o.high:.2f}] of an effect of {self.effect.estimate:.3g}"
        words += f" over {self.n} prompts"
        if o.high < 0:
            words += " (unexplained parts oppose the behaviour)"
        if self.interaction.low > 0:
            words += " (explained and unexplained parts act together)"
        if self.interaction.high < 0:
            words += " (explained and unexplained parts stand in for each other)"
        return words


def estimate(
    outcomes: Outcomes | Sequence[Outcomes],
    *,
    counterfactual: Literal["paired", "mean"] = "paired",
    control: Sequence[Outcomes] = (),
    routed: Mapping[str, np.ndarray] | None = None,
    fewest: int = FEWEST,
    seed: int = 0,
) -> Opacity | Refused:
    """Ω from measured outcomes, refused if they cannot support it.

    Args:
        outcomes: of one split; or of several whose q were drawn from their uncertainty, the estimate's first: intervals
            are then over draws of prompts and of q together.
        counterfactual: as the outcomes were measured.
        control: outcomes with random directions, one per draw.
        routed: outcomes of the game of three, ``111`` … ``000`` (explained, unexplained, patterns).
        fewest: prompts below which it is refused.
        seed: of the bootstrap.

    Raises:
        ValueError: outcomes of different numbers of prompts.
    """
    draws = [outcomes] if isinstance(outcomes, Mapping) else list(outcomes)
    every = [v for o in (*draws, *control, *([routed] if routed else [])) for v in o.values()]
    n = len(every[0])
    if any(len(v) != n for v in every):
        raise ValueError("outcomes must be of the same prompts")
    if not all(np.isfinite(v).all() for v in every):
        return Refused("the metric was not finite in some run", n)
    gap = draws[0]["11"] - draws[0]["00"]
    effect = effect_of(gap, fewest=fewest, seed=seed)
    if isinstance(effect, Refused):
        return effect
    rng = np.random.default_rng(seed)
    rows = rng.integers(n, size=(BOOTSTRAPS, n))
    which = rng.integers(len(draws), size=BOOTSTRAPS)

    def share(above: Sequence[np.ndarray]) -> Interval:
        stacked = np.stack(above) if len(above) > 1 else above[0][None]
        drawn = stacked[which % len(stacked)]
        ratios = np.take_along_axis(drawn, rows, 1).sum(1) / gap[rows].sum(1)
        return _interval(float(above[0].sum() / gap.sum()), ratios)

    def of(over: Sequence[Outcomes], weight_needed: float, weight_alone: float) -> Interval:
        return share([weight_needed * (gap - o["10"] + o["00"]) + weight_alone * (o["01"] - o["00"]) for o in over])

    mean_control = {k: np.mean([o[k] for o in control], 0) for k in ("10", "01", "00")} if control else None
    return Opacity(
        omega=of(draws, 0.5, 0.5),
        needed=of(draws, 1.0, 0.0),
        alone=of(draws, 0.0, 1.0),
        interaction=of(draws, 1.0, -1.0),
        effect=effect,
        n=n,
        counterfactual=counterfactual,
        control=None if mean_control is None else of([mean_control], 0.5, 0.5),
        buckets=None if routed is None else _buckets(routed, share),
    )


def effect_of(gap: np.ndarray, *, fewest: int = FEWEST, seed: int = 0) -> Interval | Refused:
    """The mean effect over prompts [N] that shares are to be of, refused where there can be none."""
    n = len(gap)
    if n < fewest:
        return Refused(f"{n} prompts are too few: shares of single prompts vary by about half, {fewest} are needed", n)
    if not np.isfinite(gap).all():
        return Refused("the metric was not finite in some run", n)
    draws = np.random.default_rng(seed).integers(n, size=(BOOTSTRAPS, n))
    effect = _interval(float(gap.mean()), gap[draws].mean(1))
    if effect.low <= 0 <= effect.high:
        return Refused(
            f"the effect it would be a share of, {effect.estimate:.3g}, is not told from 0 "
            f"([{effect.low:.3g}; {effect.high:.3g}])",
            n,
            effect,
        )
    return effect


def _buckets(v: Mapping[str, np.ndarray], share) -> Buckets:
    def shapley(player: int) -> Interval:
        total = np.zeros_like(v["000"])
        for others in ("00", "01", "10", "11"):
            with_it = others[:player] + "1" + others[player:]
            without = others[:player] + "0" + others[player:]
            total += (v[with_it] - v[without]) * (1 / 3 if others in ("00", "11") else 1 / 6)
        return share([total])

    return Buckets(shapley(0), shapley(1), shapley(2), share([v["111"] - v["110"]]), share([v["001"] - v["000"]]))


def _interval(estimate: float, draws: np.ndarray) -> Interval:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(estimate, float(low), float(high))
