"""Faithfulness over sizes, the smallest circuit, what is outside, and stability."""

import itertools

import numpy as np
import pytest
import torch

from heredity.circuits.edge_patching import CircuitRunner
from heredity.circuits.edges import attribute_edges
from heredity.circuits.faithfulness import (
    Curve,
    Faithfulness,
    Point,
    connected,
    faithfulness_curve,
    smallest,
    top,
    top_nodes,
)
from heredity.circuits.intervals import Interval, mean, ratio
from heredity.circuits.layout import LOGITS, NodeLayout
from heredity.circuits.necessity import complement, minimality, missed
from heredity.circuits.pairs import LogitDifference, Pairs
from heredity.circuits.stability import stability


@pytest.fixture(scope="module")
def found(parent, draw):
    """Scores on the tiny model, and faithfulness on the same pairs."""
    clean = draw(8, 7)
    corrupt = clean.clone()
    corrupt[:, 3] = draw(8, 7, 1)[:, 3]
    pairs = Pairs(clean, corrupt, torch.full((8,), 6))
    with torch.no_grad():  # answers that make every pair's effect large and positive
        change = parent.logits(clean)[:, -1] - parent.logits(corrupt)[:, -1]
    metric = LogitDifference(pairs.last, change.argmax(-1)[:, None].tolist(), change.argmin(-1)[:, None].tolist())
    scores = attribute_edges(parent, pairs, metric, parts=True)
    return scores, Faithfulness(CircuitRunner(parent, scores.layout, pairs, metric))


def paths(circuit: torch.Tensor, layout: NodeLayout) -> set[tuple[int, int]]:
    """Edges on a path from the embedding to the logits, by walking all paths."""
    good: set[tuple[int, int]] = set()

    def walk(row: int, trail: tuple[tuple[int, int], ...]) -> None:
        for column in circuit[row].nonzero().flatten().tolist():
            here = (*trail, (row, column))
            owner = layout.owner(layout.destinations[column])
            if owner == LOGITS:
                good.update(here)
            else:
                for name in (owner,) if isinstance(owner, str) else owner:
                    walk(layout.source_index[name], here)

    walk(0, ())
    return good


@pytest.mark.parametrize("seed", range(12))
def test_connected_keeps_the_edges_on_paths(seed: int) -> None:
    layout = NodeLayout(2, 2, 1 + seed % 2, 4, parallel=seed % 3 == 0)
    generator = torch.Generator().manual_seed(seed)
    circuit = (torch.rand(layout.edges.shape, generator=generator) < 0.25) & layout.edges
    kept = {(int(s), int(d)) for s, d in connected(circuit, layout).nonzero()}
    assert kept == paths(circuit, layout)


def test_dropping_unconnected_edges_changes_no_measurement(found) -> None:
    scores, f = found
    layout = f.layout
    for n in (10, 40, 120):
        chosen = torch.zeros_like(layout.edges)
        chosen.view(-1)[scores.scores.abs().flatten().topk(n).indices] = True
        assert torch.allclose(f.runner(chosen), f.runner(top(scores.scores, layout, n)), atol=1e-4)


def test_ends_of_the_curve_and_its_area(found) -> None:
    scores, f = found
    curve = faithfulness_curve(f, scores.scores, grid=(0.05, 0.2, 0.5, 1.0))
    assert curve.points[-1].faithfulness.estimate == pytest.approx(1) and curve.points[-1].share == 1
    assert f(torch.zeros_like(f.layout.edges)).estimate == pytest.approx(0, abs=1e-6)
    for point in curve.points:
        assert point.share == point.size / f.layout.n_edges <= point.requested + 1e-3
        assert point.faithfulness.low <= point.faithfulness.estimate <= point.faithfulness.high
    # Random scores need far more edges.
    noise = torch.rand(scores.scores.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    random = faithfulness_curve(f, noise, grid=(0.05, 0.2, 0.5, 1.0))
    assert curve.area < random.area


def test_areas_are_trapezoids_over_measured_shares() -> None:
    def curve(signed: bool) -> Curve:
        sizes = [(0.1, 0.5), (0.4, 1.2), (1.0, 1.0)]
        points = tuple(Point(s, s, int(100 * s), Interval(f, f, f)) for s, f in sizes)
        return Curve("counterfactual", "edges", signed, points)

    assert curve(True).area == pytest.approx(0.1 * 0.25 + 0.3 * 0.85 + 0.6 * 1.1)
    assert curve(False).area == pytest.approx(0.1 * 0.75 + 0.3 * 0.35 + 0.6 * 0.1)


def test_circuits_of_nodes_have_all_edges_out_of_them(found) -> None:
    scores, f = found
    circuit = top_nodes(scores.scores, f.layout, 5)
    rows = scores.nodes().abs().topk(5).indices
    expected = torch.zeros_like(circuit)
    expected[rows] = f.layout.edges[rows]
    assert bool((circuit == expected).all())
    curve = faithfulness_curve(f, scores.scores, unit="nodes", grid=(0.5, 1.0))
    assert [point.size for point in curve.points] == [8, 16] and curve.unit == "nodes"


def test_the_smallest_circuit_reaches_the_target_and_a_smaller_one_does_not(found) -> None:
    scores, f = found
    size, circuit = smallest(f, scores.scores, 0.8)
    assert bool((circuit == top(scores.scores, f.layout, size)).all())
    assert f(circuit).estimate >= 0.8
    smaller = range(int(size / 1.06), size)
    assert any(f(top(scores.scores, f.layout, n)).estimate < 0.8 for n in smaller)
    everything, all_edges = smallest(f, scores.scores, 1e9)
    assert everything == f.layout.n_edges and bool((all_edges == f.layout.edges).all())


def test_complement_and_bands(found) -> None:
    scores, f = found
    assert complement(f, f.layout.edges).estimate == pytest.approx(0, abs=1e-6)
    assert complement(f, torch.zeros_like(f.layout.edges)).estimate == pytest.approx(1)
    _, circuit = smallest(f, scores.scores, 0.8)
    bands = minimality(f, circuit, scores.scores, bands=3)
    assert (bands[0].first, bands[-1].last) == (1, int(circuit.sum()))
    assert all(a.last + 1 == b.first for a, b in itertools.pairwise(bands))
    assert bands[0].drop.estimate == max(band.drop.estimate for band in bands)
    ranked = scores.scores.abs().masked_fill(~circuit, -1).flatten().argsort(descending=True)
    without = circuit.clone()
    without.view(-1)[ranked[: bands[0].last]] = False
    assert bands[0].drop.estimate == pytest.approx(f(circuit).estimate - f(without).estimate, abs=1e-6)


def test_the_bound_on_what_was_missed_holds(found) -> None:
    scores, f = found
    circuit = top(scores.scores, f.layout, 150)
    outside = f.layout.edges & ~circuit
    said = missed(f, circuit, draws=16)
    assert said.bound is not None and said.share is not None and said.outside == int(outside.sum())
    # Average effects of the edges that look strongest, over other random halves.
    generator = torch.Generator().manual_seed(99)
    strongest = scores.scores.abs().masked_fill(~outside, -1).flatten().topk(4).indices
    for k in strongest.tolist():
        effects = []
        for _ in range(12):
            kept = f.layout.edges & ~(outside & (torch.rand(outside.shape, generator=generator) < 0.5))
            with_edge, without = kept.clone(), kept.clone()
            with_edge.view(-1)[k], without.view(-1)[k] = True, False
            effects.append(float((f.runner(with_edge) - f.runner(without)).mean()))
        assert abs(np.mean(effects)) <= said.bound
    nothing = missed(f, f.layout.edges)
    assert (nothing.draws, nothing.bound, nothing.share) == (0, None, None)


def test_stability_is_one_for_equal_pairs_and_small_for_noise() -> None:
    layout = NodeLayout(2, 4, 2, 8)
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(1, *layout.edges.shape, generator=generator)
    same = stability(one.repeat(10, 1, 1), layout, 20)
    assert same.jaccard == pytest.approx(1) and same.with_all == pytest.approx(1) and same.draws == 100
    noise = torch.randn(10, *layout.edges.shape, generator=generator)
    assert stability(noise, layout, 20).jaccard < 0.6
    mixed = stability(one + 0.3 * noise, layout, 20).jaccard
    assert stability(noise, layout, 20).jaccard < mixed < 1
    assert stability(noise, layout, layout.n_edges).jaccard == pytest.approx(1)


def test_stability_is_the_mean_of_explicit_jaccards() -> None:
    layout = NodeLayout(1, 2, 1, 4)
    parts = torch.randn(5, *layout.edges.shape, generator=torch.Generator().manual_seed(2))
    chosen = torch.randint(5, (4, 5), generator=torch.Generator().manual_seed(7))
    sets = []
    for draw in chosen:
        total = parts[draw].sum(0).masked_fill(~layout.edges, 0).abs().flatten()
        sets.append(set(total.topk(4).indices.tolist()))
    expected = np.mean([len(a & b) / len(a | b) for a, b in itertools.combinations(sets, 2)])
    assert stability(parts, layout, 4, draws=4, seed=7).jaccard == pytest.approx(float(expected))


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = sum(one.low <= 2 <= one.high for one in (mean(rng.normal(2, 1, 40), 0) for _ in range(200)))
    assert 175 <= hits <= 200
    assert ratio(np.array([1.0, 2.0]), np.array([2.0, 4.0]), 0) == Interval(0.5, 0.5, 0.5)
