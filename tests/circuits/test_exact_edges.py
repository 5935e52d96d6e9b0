"""Exact patching and greedy pruning where the truth is known: linear nets and a planted circuit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from heredity.circuits.acdc import prune, prune_scores
from heredity.circuits.activation_paths import attribute_edges_by_activations
from heredity.circuits.edges import attribute_edges
from heredity.circuits.exact_edges import exchange_edges
from heredity.circuits.layout import layout_of
from heredity.circuits.pairs import LogitDifference, Pairs
from heredity.circuits.relp import attribute_edges_by_relevance


@pytest.fixture(params=[2])
def linear(beds: Any, request: pytest.FixtureRequest) -> Any:
    """A net without norms, with linear MLPs and uniform attention: by any method every effect is exact."""
    model = beds.bed(beds.BedConfig(request.param, 2, 6, 3, 5, 8, 8, 5, activation="none"), seed=2)
    for block in model.bridge.blocks:
        for kind in ("q", "k"):
            for value in getattr(block.attn, kind).parameters():
                value.zero_()
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = (torch.randint(8, (3, 5), generator=generator) for _ in range(2))
    pairs = Pairs(clean, corrupt, torch.tensor([4, 3, 4]))
    return model, pairs, LogitDifference(pairs.last, [[1], [2], [3]], [[4], [5], [6]])


def test_in_a_linear_net_all_methods_are_exact(linear: Any) -> None:
    exact = exchange_edges(*linear)
    for found in (
        attribute_edges(*linear, method="eap"),
        attribute_edges(*linear, method="clean-corrupted"),
        attribute_edges(*linear, steps=2),
        attribute_edges_by_activations(*linear, steps=2),
        attribute_edges_by_relevance(*linear),
    ):
        torch.testing.assert_close(found.scores, exact.scores, rtol=1e-4, atol=1e-5)
        assert found.completeness < 1e-5
    # All that reaches the logits comes over the edges into them.
    assert float(exact.scores[:, -1].sum()) == pytest.approx(float((exact.clean - exact.corrupt).mean()), abs=1e-4)


def test_exact_effects_are_those_of_a_run_with_the_edge_changed(bed_of: Callable, plain: Any, beds: Any) -> None:
    model, pairs, metric = bed_of("grouped")
    single = beds.wrap(model.bridge.float())
    found = exchange_edges(single, pairs, metric)
    written = plain.of(single)
    clean, corrupt = (written.run(tokens) for tokens in (pairs.clean, pairs.corrupt))
    rows = torch.arange(len(pairs))
    base = metric(clean.logits, rows)
    for source, destination in found.layout.edges.nonzero().tolist()[::7]:
        added = torch.zeros(*found.layout.edges.shape, *clean.writes[0].shape, dtype=torch.float64)
        added[source, destination] = corrupt.writes[source] - clean.writes[source]
        effect = (base - metric(written.run(pairs.clean, added=added).logits, rows)).mean()
        assert float(found.scores[source, destination]) == pytest.approx(float(effect), abs=2e-4)


@pytest.mark.parametrize("linear", [1], indirect=True)
def test_pruning_keeps_what_matters(linear: Any) -> None:
    model, pairs, metric = linear
    layout = layout_of(model)
    exact = exchange_edges(model, pairs, metric).scores
    half = float(exact.max()) / 2
    kept = prune(model, layout, pairs, metric, [1e9, half, 0.01])
    assert not kept[0].any()
    assert bool((kept <= layout.edges).all())
    # In a linear net the first edge looked at falls by its own effect.
    last = int(layout.reach[-1]) - 1
    assert [bool(circuit[last, -1]) for circuit in kept[1:]] == [
        float(exact[last, -1]) >= limit for limit in (half, 0.01)
    ]
    # Alone it is pruned the same.
    assert torch.equal(prune(model, layout, pairs, metric, [0.01])[0], kept[2])
    scores = prune_scores(kept, [1e9, half, 0.01])
    assert bool((scores[kept[1]] == half).all())
    assert bool((scores[kept[2] & ~kept[1]] == 0.01).all())
    assert bool((scores[~kept.any(0)] == 0).all())
