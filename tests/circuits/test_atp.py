"""AtP*: gradients, exchanged softmaxes and dropped layers against the same done by hand; saturation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from heredity.circuits.atp import attribute_nodes
from heredity.circuits.edges import attribute_edges
from heredity.circuits.node_patching import patch_nodes


def by_hand(
    plain: Any, model: Any, pairs: Any, metric: Any, layout: Any, fix: bool, held: int | None = None
) -> dict[str, torch.Tensor]:
    """Effects [pairs] by node's name, from a gradient at each node and at each attention pattern."""
    clean, corrupt = (plain.run(tokens) for tokens in (pairs.clean, pairs.corrupt))
    names = [name for name in layout.destinations if name.startswith("attn_")]
    sites = sorted({name.partition(".")[0] for name in names})
    with torch.inference_mode():
        ends = [model.capture(tokens, sites) for tokens in (pairs.clean, pairs.corrupt)]
    added = torch.zeros(*layout.edges.shape, *clean.writes[0].shape, dtype=torch.float64, requires_grad=True)
    inner = {}
    for name in names:
        site, _, head = name.partition(".")
        inner[name] = torch.zeros_like(ends[0][site][:, :, int(head)]).clone().requires_grad_()
    patterns = {key: pattern.clone().requires_grad_() for key, pattern in clean.patterns.items()}
    rows = torch.arange(len(pairs))
    metric(plain.run(pairs.clean, added=added, inner=inner, held_layer=held).logits, rows).sum().backward()
    for layer in range(layout.n_layers):  # patterns behind it follow
        own = {key: pattern for key, pattern in patterns.items() if key[0] == layer != held}
        if not own:
            continue
        metric(plain.run(pairs.clean, patterns=own, held_layer=held).logits, rows).sum().backward()
    assert added.grad is not None
    found = {}
    for row, name in enumerate(layout.sources):
        change = clean.writes[row] - corrupt.writes[row]
        found[name] = torch.einsum("bpm,vbpm->b", change, added.grad[row])
    shared = layout.n_heads // layout.n_kv_heads
    for name in names:
        site, _, head = name.partition(".")
        kind, _, layer = site.partition("@")
        change = (ends[0][site] - ends[1][site])[:, :, int(head)]
        if not fix or kind == "attn_v":
            gradient = inner[name].grad
            found[name] = (change * (0 if gradient is None else gradient)).sum((1, 2))
            continue
        heads = [int(head)] if kind == "attn_q" else range(int(head) * shared, (int(head) + 1) * shared)
        # Only what is added to this query or key differs from the clean run.
        moved = _patterns_with(plain, pairs, name, -change)
        found[name] = torch.zeros(len(pairs), dtype=torch.float64)
        for h in heads:
            slope = patterns[int(layer), h].grad
            if slope is not None:
                found[name] += ((clean.patterns[int(layer), h] - moved[int(layer), h]) * slope).sum((1, 2))
    return found


def _patterns_with(plain: Any, pairs: Any, name: str, change: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
    return plain.run(pairs.clean, inner={name: change.clone()}).patterns


@pytest.mark.parametrize("fix", [False, True])
@pytest.mark.parametrize("kind", ["bare", "layer", "grouped"])
def test_scores_and_magnitudes(kind: str, fix: bool, bed_of: Callable, plain: Any) -> None:
    model, pairs, metric = bed_of(kind)
    found = attribute_nodes(model, pairs, metric, fix_attention=fix)
    layout, written = found.layout, plain.of(model)
    expected = by_hand(written, model, pairs, metric, layout, fix)
    torch.testing.assert_close(found.scores, torch.stack([expected[name].mean() for name in found.nodes]))
    magnitudes = torch.zeros(len(found.nodes), len(pairs), dtype=torch.float64)
    for layer in range(layout.n_layers):
        dropped = by_hand(written, model, pairs, metric, layout, fix, held=layer)
        for row in range(layout.written_by(layer).start, layout.written_by(layer).stop):
            dropped[layout.sources[row]] = torch.zeros(len(pairs), dtype=torch.float64)
        magnitudes += torch.stack([dropped[name] for name in found.nodes]).abs() / (layout.n_layers - 1)
    torch.testing.assert_close(found.magnitudes, magnitudes.mean(1))


def test_plain_scores_of_sources_are_sums_of_edges(bed_of: Callable) -> None:
    model, pairs, metric = bed_of("grouped")
    nodes = attribute_nodes(model, pairs, metric, fix_attention=False, drop=False)
    edges = attribute_edges(model, pairs, metric, method="eap")
    torch.testing.assert_close(nodes.scores[: len(edges.layout.sources)], edges.nodes())


def test_a_loaded_model(parent: Any, draw: Callable) -> None:
    """With small changes every estimate is the effect."""
    from heredity.circuits.pairs import LogitDifference, Pairs

    tokens = draw(2, 6)
    other = tokens.clone()
    other[:, 2] += 1
    pairs = Pairs(tokens, other, torch.tensor([5, 5]))
    metric = LogitDifference(pairs.last, [[3], [7]], [[4], [8]])
    found = attribute_nodes(parent, pairs, metric)
    edges = attribute_edges(parent, pairs, metric, method="eap")
    torch.testing.assert_close(found.scores[: len(edges.layout.sources)], edges.nodes(), rtol=1e-3, atol=1e-5)
    # What the last layer writes reaches the logits through one norm only, so its estimates are near the effects.
    last = range(edges.layout.written_by(2).start, edges.layout.written_by(2).stop)
    exact = patch_nodes(parent, edges.layout, pairs, metric, last).mean(1)
    assert float(torch.corrcoef(torch.stack([exact, found.scores[list(last)]]))[0, 1]) > 0.9
