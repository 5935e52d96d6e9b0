"""Nodes exchanged in one batch of copies, against one edit at a time and against circuits without a node's edges."""

import pytest
import torch

from heredity.circuits import node_patching
from heredity.circuits.edge_patching import CircuitRunner
from heredity.circuits.edges import attribute_edges
from heredity.circuits.layout import layout_of
from heredity.circuits.node_patching import patch_nodes
from heredity.circuits.pairs import LogitDifference, Pairs


@pytest.fixture
def pairs(draw) -> Pairs:
    clean = draw(3, 7)
    corrupt = clean.clone()
    corrupt[:, 2:4] = draw(3, 7, 1)[:, 2:4]
    return Pairs(clean, corrupt, torch.tensor([6, 5, 6]))


@pytest.fixture
def metric(pairs: Pairs) -> LogitDifference:
    return LogitDifference(pairs.last, [[5], [6, 7], [8]], [[10], [11], [12]])


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2", "phi3", "granite"])
def test_a_node_exchanged_is_all_its_edges_exchanged(family: str, pair_of, pairs, metric) -> None:
    model = pair_of(family)[0]
    layout = layout_of(model)
    runner = CircuitRunner(model, layout, pairs, metric)
    whole = runner(layout.edges)
    found = patch_nodes(model, layout, pairs, metric)
    assert found.shape == (len(layout.sources), 3)
    for row in range(len(layout.sources)):
        circuit = layout.edges.clone()
        circuit[row] = False
        assert torch.allclose(found[row], whole - runner(circuit), atol=3e-4), layout.sources[row]
    assert float(found.abs().max()) > 1e-2


def test_a_head_exchanged_is_one_edit_at_its_site(parent, pairs, metric) -> None:
    layout = layout_of(parent)
    rows = torch.arange(3)
    for name in ("attn_head@1.2", "mlp_out@0", "attn_head@2.3"):
        with torch.no_grad():
            value = parent.capture(pairs.corrupt, [name])[name]
            patched = metric(parent.logits(pairs.clean, edits={name: lambda _, value=value: value}), rows)
            base = metric(parent.logits(pairs.clean), rows)
        found = patch_nodes(parent, layout, pairs, metric, [layout.source_index[name]])[0]
        assert torch.allclose(found, (base - patched).double(), atol=1e-5)


def test_the_embedding_exchanged_is_the_whole_effect(parent, pairs, metric) -> None:
    rows = torch.arange(3)
    with torch.no_grad():
        clean, corrupt = (metric(parent.logits(tokens), rows) for tokens in (pairs.clean, pairs.corrupt))
    found = patch_nodes(parent, layout_of(parent), pairs, metric, [0])[0]
    assert torch.allclose(found, (clean - corrupt).double(), atol=1e-5)


def test_batches_and_order_change_nothing(parent, pairs, metric, monkeypatch) -> None:
    layout = layout_of(parent)
    nodes = [5, 0, 14, 7, 10]
    together = patch_nodes(parent, layout, pairs, metric, nodes)
    monkeypatch.setattr(node_patching, "PASS_TOKENS", 1)
    monkeypatch.setattr(node_patching, "GROUP_TOKENS", 1)
    alone = patch_nodes(parent, layout, pairs, metric, nodes[::-1])
    assert torch.allclose(together, alone.flip(0), atol=1e-5)


def test_scores_of_last_layer_heads_are_what_exchanging_them_does(parent, pairs, metric) -> None:
    # They reach the logits through one MLP and one norm only, so a path's gradient is close to the truth.
    layout = layout_of(parent)
    heads = list(range(layout.written_by(2).start, layout.written_by(2).stop))
    scores = attribute_edges(parent, pairs, metric, steps=40).nodes()[heads]
    exact = patch_nodes(parent, layout, pairs, metric, heads).mean(1)
    big = exact.abs() > 0.3 * exact.abs().max()
    assert bool((scores[big].sign() == exact[big].sign()).all())
