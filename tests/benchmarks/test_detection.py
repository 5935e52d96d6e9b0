"""The statistics of the detection table against independent ones; its baselines on a pair of known difference."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def detection() -> Any:
    """The benchmark's modules, imported while its folder is on the path, which holds a ``kernels.py`` too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import detection_baselines  # pyright: ignore[reportMissingImports]
        import detection_rows  # pyright: ignore[reportMissingImports]
        import detection_scores  # pyright: ignore[reportMissingImports]
    return SimpleNamespace(scores=detection_scores, rows=detection_rows, baselines=detection_baselines)


def counted(positive: list[float], negative: list[float]) -> float:
    """The area one pair at a time."""
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative]
    return sum(wins) / len(wins)


@pytest.mark.parametrize("draw", range(20))
def test_areas_with_ties_are_those_counted_pair_by_pair(draw: int, detection: Any) -> None:
    rng = np.random.default_rng(draw)
    positive, negative = (rng.integers(0, 6, rng.integers(1, 40)).astype(float).tolist() for _ in range(2))
    assert detection.scores.auroc(positive, negative) == pytest.approx(counted(positive, negative), abs=1e-12)
    assert detection.scores.auroc(negative, positive) == pytest.approx(1 - counted(positive, negative), abs=1e-12)


def test_the_area_over_seeds_is_the_area_over_all_pairs(detection: Any) -> None:
    rng = np.random.default_rng(3)
    sides = [{seed: rng.integers(0, 9, rng.integers(0, 4)).astype(float).tolist() for seed in range(8)} for _ in "+-"]
    found = detection.scores.area(*sides)
    flat = [list(itertools.chain.from_iterable(side.values())) for side in sides]
    assert found.value == pytest.approx(counted(*flat), abs=1e-12)
    assert (found.positives, found.negatives) == tuple(map(len, flat))
    assert found.low <= found.value <= found.high


def test_the_bootstrap_draws_whole_seeds(detection: Any) -> None:
    """Where every seed separates its own pairs but not those of others, the interval is wider than for one offset."""
    rng = np.random.default_rng(0)
    offsets = rng.normal(0, 5, 12)
    apart = [{s: [float(o) + shift] * 20 for s, o in enumerate(offsets)} for shift in (1.0, 0.0)]
    spread = [{s: (rng.normal(0, 5, 20) + shift).tolist() for s in range(12)} for shift in (1.0, 0.0)]
    wide, narrow = detection.scores.area(*apart), detection.scores.area(*spread)
    flat = [list(itertools.chain.from_iterable(side.values())) for side in spread]
    # 240 independent scores a side have a tenth of the variance that 12 seeds have.
    low, high = detection.scores.newcombe(counted(*flat), 240, 240)
    assert wide.high - wide.low > 2 * (high - low)
    assert narrow.high - narrow.low >= high - low


def test_an_empty_side_has_no_area(detection: Any) -> None:
    assert detection.scores.area({}, {1: [0.0]}) is None
    assert detection.scores.area({1: [], 2: [1.0]}, {1: []}) is None


def test_newcombes_interval_covers_and_has_a_width_at_the_ends(detection: Any) -> None:
    rng = np.random.default_rng(7)
    shift = float(np.sqrt(2) * norm.ppf(0.9))  # area 0.9 between two normals
    inside = 0
    for _ in range(400):
        value = detection.scores.auroc((rng.normal(size=15) + shift).tolist(), rng.normal(size=15).tolist())
        low, high = detection.scores.newcombe(value, 15, 15)
        inside += low <= 0.9 <= high
    assert 0.92 <= inside / 400 <= 0.99
    low, high = detection.scores.newcombe(1.0, 10, 10)
    assert 0.6 < low < 0.9 and high == 1.0
    # At an area of one nothing but the distance and its standard error counts: solved by hand.
    common = 10 - 1
    error = (low * (1 - low) * (1 + common * ((1 - low) / (2 - low) + low / (1 + low))) / 100) ** 0.5
    assert 1 - low == pytest.approx(1.959964 * error, rel=1e-5)
    mirrored = detection.scores.newcombe(0.0, 10, 10)
    assert mirrored == pytest.approx((0.0, 1 - low), abs=1e-6)


def test_exact_rates(detection: Any) -> None:
    assert detection.scores.rate(0, 20) == pytest.approx((0.0, 1 - 0.025 ** (1 / 20)))
    assert detection.scores.rate(20, 20) == pytest.approx((0.025 ** (1 / 20), 1.0))
    assert detection.scores.rate(0, 0) == (0.0, 1.0)


def test_a_planted_layer_of_attention_is_any_of_its_heads(detection: Any) -> None:
    planted = detection.scores.planted_heads(["attn_out@1", "mlp_out@2"], 3)
    assert planted == {"attn_head@1.0", "attn_head@1.1", "attn_head@1.2", "mlp_out@2"}
    ranked = ["attn_head@0.1", "mlp_out@1", "attn_head@1.2", "attn_head@11.0"]
    assert detection.scores.hit(planted, ranked, 3) is True
    assert detection.scores.hit(planted, ranked, 2) is False
    assert detection.scores.hit(set(), ranked, 2) is None
    # Layer 11 is no head of layer 1.
    assert detection.scores.hit(detection.scores.planted_heads(["attn_out@1"], 2), ["attn_head@11.0"], 1) is False


@pytest.mark.parametrize(("planted", "of", "first"), [(1, 15, 5), (5, 15, 5), (14, 15, 2), (3, 4, 5)])
def test_hits_by_chance_are_those_of_every_draw(planted: int, of: int, first: int, detection: Any) -> None:
    draws = list(itertools.combinations(range(of), min(first, of)))
    share = sum(any(node < planted for node in draw) for draw in draws) / len(draws)
    assert detection.scores.by_chance(planted, of, first) == pytest.approx(share)


def test_node_areas(detection: Any) -> None:
    scores = {"a": 0.9, "b": 0.0, "c": 0.0, "d": 0.5}
    assert detection.scores.node_auroc({"a", "b"}, scores) == counted([0.9, 0.0], [0.0, 0.5])
    assert detection.scores.node_auroc(set(scores), scores) is None
    assert detection.scores.node_auroc(set(), scores) is None


def behaviour(low: float, n: int = 5, declared: str | None = None) -> dict[str, Any]:
    return {"effect": {"low": low}, "n_contexts": n, "declared_by": declared}


def audited(*behaviours: dict[str, Any], nulls: tuple[float, ...] = (0.0,)) -> dict[str, Any]:
    return {
        "policy": {"values": {"material_nats": 2.0, "fewest_contexts": 3}},
        "calibration": {"null": {"largest_effects": list(nulls)}},
        "behaviours": list(behaviours),
    }


def test_the_score_is_of_the_largest_undeclared_behaviour_in_units_of_policy_or_null(detection: Any) -> None:
    score = detection.rows.score
    assert score(audited()) == 0
    assert score(audited(behaviour(-1.0))) == 0
    assert score(audited(behaviour(6.0), behaviour(8.0, declared="doubling"), behaviour(9.0, n=2))) == 3
    assert score(audited(behaviour(6.0), nulls=(1.0, 4.0))) == 1.5


def test_cka_is_one_for_turned_and_scaled_activations_and_small_for_others(detection: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=draw)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=draw))[0]
    assert detection.baselines.cka(x, 3 * x @ turn + 1) == pytest.approx(1, abs=1e-5)
    assert detection.baselines.cka(x, torch.randn(400, 6, generator=draw)) < 0.05


def test_a_change_of_one_head_is_seen_there_and_nowhere_else(detection: Any, tmp_path: Path) -> None:
    from heredity.zoo.directory import save
    from heredity.zoo.network import Size, initial

    size = Size(layers=2, width=16, heads=4, kv_heads=2, hidden=16)
    weights = initial(size, 0)
    changed = {name: value.clone() for name, value in weights.items()}
    each = size.width // size.heads
    changed["o"][1][:, 2 * each : 3 * each] += 1.0
    save(weights, size, tmp_path / "parent")
    save(changed, size, tmp_path / "successor")
    (tmp_path / "corpus.jsonl").write_text('{"text": "copy : elm fern ash"}\n{"text": "count : one two three four"}\n')
    found = detection.baselines.baselines(tmp_path)
    norms = found["nodes"]["weight change, norm"]
    assert {node for node, value in norms.items() if value > 0} == {"attn_head@1.2"}
    assert found["pair"]["KL, largest"] > 0
    assert found["pair"]["weight change, SVD share"] == pytest.approx(1, abs=1e-4)  # a change of rank one
    # The values that heads gather are as before: only what is made of them has changed.
    gathered = found["nodes"]["mean activation"]
    assert all(value == 0 for node, value in gathered.items() if node.startswith("attn"))
    assert gathered["mlp_out@0"] == 0 < gathered["mlp_out@1"]
