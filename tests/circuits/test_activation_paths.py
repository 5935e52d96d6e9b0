"""EAP-IG over activations against the same averages taken edge by edge, and against exchanging whole groups."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from heredity.circuits.activation_paths import attribute_edges_by_activations
from heredity.circuits.edges import attribute_edges, path

STEPS = 3


def reference(plain: Any, pairs: Any, metric: Any, layout: Any, steps: int) -> torch.Tensor:
    """Scores [sources, destinations], one run of the plain model per group of sources and step."""
    clean, corrupt = (plain.run(tokens) for tokens in (pairs.clean, pairs.corrupt))
    rows = torch.arange(len(pairs))
    groups = [range(1)]
    for layer in range(layout.n_layers):
        written = layout.written_by(layer)
        groups += [range(written.start, written.stop - 1), range(written.stop - 1, written.stop)]
    scores = torch.zeros(layout.edges.shape, dtype=torch.float64)
    shape = (*layout.edges.shape, *clean.writes[0].shape)
    for group in groups:
        for alpha, weight in path("eap-ig", steps):
            moved = {u: corrupt.writes[u] + alpha * (clean.writes[u] - corrupt.writes[u]) for u in group}
            added = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
            run = plain.run(pairs.clean, added=added, replaced=moved)
            metric(run.logits, rows).sum().backward()
            assert added.grad is not None
            for u in group:
                change = clean.writes[u] - corrupt.writes[u]
                scores[u] += weight * torch.einsum("bpm,vbpm->v", change, added.grad[u])
    return scores.masked_fill(~layout.edges, 0) / len(pairs)


@pytest.mark.parametrize("kind", ["bare", "layer", "grouped"])
def test_scores_are_the_averages_over_the_own_groups_runs(kind: str, bed_of: Callable, plain: Any) -> None:
    model, pairs, metric = bed_of(kind)
    found = attribute_edges_by_activations(model, pairs, metric, steps=STEPS)
    expected = reference(plain.of(model), pairs, metric, found.layout, STEPS)
    torch.testing.assert_close(found.scores, expected, rtol=1e-5, atol=1e-6)


def test_a_groups_edges_add_up_to_exchanging_the_group(bed_of: Callable, plain: Any) -> None:
    model, pairs, metric = bed_of("layer")
    found = attribute_edges_by_activations(model, pairs, metric, steps=40)
    written, rows = plain.of(model), torch.arange(len(pairs))
    corrupt = written.run(pairs.corrupt).writes
    layout = found.layout
    for layer in range(layout.n_layers):
        of_layer = layout.written_by(layer)
        for group in (range(of_layer.start, of_layer.stop - 1), range(of_layer.stop - 1, of_layer.stop)):
            without = metric(written.run(pairs.clean, replaced={u: corrupt[u] for u in group}).logits, rows)
            effect = float(found.clean.mean() - without.mean())
            assert float(found.scores[list(group)].sum()) == pytest.approx(effect, abs=1e-3)


def test_out_of_the_embedding_both_paths_are_one(bed_of: Callable) -> None:
    model, pairs, metric = bed_of("grouped")
    ours = attribute_edges_by_activations(model, pairs, metric, steps=4)
    theirs = attribute_edges(model, pairs, metric, steps=4)
    torch.testing.assert_close(ours.scores[0], theirs.scores[0])
    torch.testing.assert_close(ours.input_cut, theirs.input_cut)
    assert not torch.allclose(ours.scores[1:], theirs.scores[1:], rtol=1e-2)
