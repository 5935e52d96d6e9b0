"""Opacity from outcomes of the four runs: exact values, intervals, refusals."""

from typing import Any

import numpy as np
import pytest

from heredity.circuits.opacity_estimate import Opacity, Refused, estimate


def table(v: Any, n: int = 40, noise: float = 0.0, seed: int = 0) -> dict[str, np.ndarray]:
    """Outcomes of a function of (explained, unexplained), the same for every prompt but for noise in its size."""
    size = 1 + noise * np.random.default_rng(seed).standard_normal(n)
    return {f"{e}{u}": size * v(float(e), float(u)) for e in (0, 1) for u in (0, 1)}


@pytest.mark.parametrize(
    ("v", "needed", "alone"),
    [
        (lambda e, u: 0.7 * e + 0.3 * u, 0.3, 0.3),
        (lambda e, u: 2 * e - u, -1.0, -1.0),
        (lambda e, u: e * u, 1.0, 0.0),
        (max, 0.0, 1.0),
        (lambda e, u: np.tanh(2.2 * (e + u)), 1 - np.tanh(2.2) / np.tanh(4.4), np.tanh(2.2) / np.tanh(4.4)),
    ],
    ids=["additive", "cancel", "and", "or", "saturating"],
)
def test_two_parts(v: Any, needed: float, alone: float) -> None:
    found = estimate(table(v, noise=0.2))
    assert isinstance(found, Opacity)
    assert found.needed.estimate == pytest.approx(needed)
    assert found.alone.estimate == pytest.approx(alone)
    assert found.omega.estimate == pytest.approx((needed + alone) / 2)
    assert found.interaction.estimate == pytest.approx(needed - alone)
    # Every prompt has the same shares, so a ratio of means does not vary.
    assert found.omega.high - found.omega.low < 1e-9


def test_opposing_parts_are_said_to_oppose() -> None:
    found = estimate(table(lambda e, u: 2 * e - u, noise=0.1))
    assert isinstance(found, Opacity)
    assert found.omega.high < 0 and "oppose" in str(found)


def test_and_and_or_are_told_apart_where_the_share_is_the_same() -> None:
    both, either = estimate(table(lambda e, u: e * u)), estimate(table(max))
    assert isinstance(both, Opacity) and isinstance(either, Opacity)
    assert both.omega.estimate == either.omega.estimate == 0.5
    assert "act together" in str(both) and "stand in for each other" in str(either)


def test_a_ratio_of_means_not_a_mean_of_ratios() -> None:
    """One prompt without an effect would make a mean of ratios anything."""
    outcomes = table(lambda e, u: 0.7 * e + 0.3 * u)
    for key, value in zip(outcomes, (0.0, 5.0, 0.0, 1e-9), strict=True):
        outcomes[key][0] = value
    found = estimate(outcomes)
    assert isinstance(found, Opacity) and abs(found.alone.estimate - (39 * 0.3 + 5) / 39) < 1e-6


@pytest.mark.parametrize("n", [1, 29])
def test_too_few_prompts_are_refused(n: int) -> None:
    found = estimate(table(lambda e, u: e, n=n))
    assert isinstance(found, Refused) and f"{n} prompts" in found.reason


def test_an_effect_that_is_not_told_from_0_is_refused() -> None:
    noise = np.random.default_rng(0).standard_normal(50)
    found = estimate({"11": noise, "10": noise / 2, "01": noise / 2, "00": np.zeros(50)})
    assert isinstance(found, Refused) and "not told from 0" in found.reason
    assert found.effect is not None and found.effect.low < 0 < found.effect.high


def test_a_metric_that_is_not_finite_is_refused() -> None:
    outcomes = table(lambda e, u: e)
    outcomes["10"][3] = np.nan
    found = estimate(outcomes)
    assert isinstance(found, Refused) and "finite" in found.reason


def test_intervals_cover_what_varies_over_prompts() -> None:
    """The share of a random half of the prompts, for the nominal 95 % of samples."""
    rng, covered = np.random.default_rng(1), 0
    for trial in range(60):
        opaque = rng.random(60) < 0.4
        v = {"11": np.ones(60), "10": 1.0 - opaque, "01": 1.0 * opaque, "00": np.zeros(60)}
        found = estimate(v, seed=trial)
        assert isinstance(found, Opacity)
        covered += found.omega.low <= 0.4 <= found.omega.high
    assert covered >= 52
