"""Circuits run for real: the two ends, agreement of two ways to exchange an edge, ablations, batching."""

import pytest
import torch

from heredity.circuits import edge_patching, prefix
from heredity.circuits.edge_patching import CircuitRunner, mean_written, measure, patch_edges, run_circuit, written
from heredity.circuits.layout import layout_of
from heredity.circuits.pairs import LogitDifference, Pairs

FAMILIES = ["llama", "gpt2", "neox", "gemma2", "phi3", "granite", "cohere"]


@pytest.fixture
def pairs(draw) -> Pairs:
    clean = draw(4, 8)
    corrupt = clean.clone()
    corrupt[:, 4] = draw(4, 8, 1)[:, 4]
    return Pairs(clean, corrupt, torch.tensor([6, 7, 7, 5]))


@pytest.fixture
def metric(pairs: Pairs) -> LogitDifference:
    return LogitDifference(pairs.last, [[5], [6, 7], [8], [9]], [[10], [11], [12, 13], [14]])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_edges_are_the_model_and_none_the_counterfactual(family: str, pair_of, pairs, metric) -> None:
    model = pair_of(family)[0]
    layout = layout_of(model)
    rows = torch.arange(4)
    with torch.no_grad():
        clean, corrupt = (metric(model.logits(tokens), rows).double() for tokens in (pairs.clean, pairs.corrupt))
    runner = CircuitRunner(model, layout, pairs, metric)
    assert torch.allclose(runner(layout.edges), clean, atol=1e-4)
    assert torch.allclose(runner(torch.zeros_like(layout.edges)), corrupt, atol=1e-4)
    assert float((clean - corrupt).abs().max()) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_one_edge_exchanged_alone_is_all_but_that_edge(family: str, pair_of, pairs, metric) -> None:
    # patch_edges changes what one destination reads; CircuitRunner builds what every destination reads.
    model = pair_of(family)[0]
    layout = layout_of(model)
    edges = [(int(s), int(d)) for s, d in layout.edges.nonzero()][::11]
    runner = CircuitRunner(model, layout, pairs, metric)
    whole = runner(layout.edges)
    found = patch_edges(model, layout, pairs, metric, edges)
    for edge, effect in zip(edges, found, strict=True):
        circuit = layout.edges.clone()
        circuit[edge] = False
        assert torch.allclose(whole - runner(circuit), effect, atol=2e-4), edge
    assert float(found.abs().max()) > 1e-2


def test_an_edge_into_a_query_is_the_query_computed_by_hand(pair_of, pairs, metric) -> None:
    # GPT-2, layer 1, head 2, from the first layer's MLP: the projection written out with the bare module's weights.
    model = pair_of("gpt2")[0]
    layout = layout_of(model)
    bare = model.bridge.original_model.transformer.h[1]
    with torch.no_grad():
        sites = ["resid_pre@1", "mlp_out@0", "attn_q@1"]
        own, other = (model.capture(tokens, sites) for tokens in (pairs.clean, pairs.corrupt))
        stream = own["resid_pre@1"] - own["mlp_out@0"] + other["mlp_out@0"]
        kernel = model.bridge.blocks[1].attn.q.original_component
        normed = torch.nn.functional.layer_norm(
            stream, stream.shape[-1:], bare.ln_1.weight, bare.ln_1.bias, bare.ln_1.eps
        )
        query = own["attn_q@1"].clone()
        weight = kernel.weight if type(kernel).__name__ == "Conv1D" else kernel.weight.T
        query[:, :, 2] = (normed @ weight + kernel.bias).unflatten(-1, (4, -1))[:, :, 2]
        rows = torch.arange(4)
        patched = metric(model.logits(pairs.clean, edits={"attn_q@1": lambda value: query}), rows)
        base = metric(model.logits(pairs.clean), rows)
    edge = layout.source_index["mlp_out@0"], layout.destination_index["attn_q@1.2"]
    found = patch_edges(model, layout, pairs, metric, [edge])[0]
    assert torch.allclose(found, (base - patched).double(), atol=1e-5) and float(found.abs().max()) > 1e-4


def test_a_circuit_row_by_row_is_the_circuit(pair_of, pairs) -> None:
    model = pair_of("llama")[0]
    layout = layout_of(model)
    other = written(model, layout, pairs.corrupt)
    circuits = torch.rand(4, *layout.edges.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    together = run_circuit(model, layout, pairs.clean, circuits & layout.edges, other)
    for i in range(4):
        alone = run_circuit(model, layout, pairs.clean[[i]], circuits[i] & layout.edges, other[:, [i]])
        assert torch.allclose(together[[i]], alone, atol=1e-4)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_sparse_and_dense_circuits_do_not_depend_on_batches(share: float, pair_of, pairs, metric, monkeypatch) -> None:
    model = pair_of("llama")[0]
    layout = layout_of(model)
    circuit = (torch.rand(layout.edges.shape, generator=torch.Generator().manual_seed(1)) < share) & layout.edges
    together = measure(model, layout, pairs, metric, circuit)
    monkeypatch.setattr(edge_patching, "GROUP_TOKENS", 1)
    monkeypatch.setattr(edge_patching, "KEPT_BYTES", 0)
    runner = CircuitRunner(model, layout, pairs, metric)
    assert torch.allclose(runner(circuit), together, atol=1e-4) and torch.allclose(runner(circuit), together, atol=1e-4)
    monkeypatch.setattr(prefix, "can_share", lambda model: False)
    assert torch.allclose(measure(model, layout, pairs, metric, circuit), together, atol=1e-4)


@pytest.mark.parametrize("family", ["neox", "gemma2"])
def test_a_circuit_row_by_row_agrees_whichever_edges_are_fewer(family: str, pair_of, pairs) -> None:
    model = pair_of(family)[0]
    layout = layout_of(model)
    other = written(model, layout, pairs.corrupt)
    for share in (0.03, 0.3, 0.97):
        circuit = (torch.rand(layout.edges.shape, generator=torch.Generator().manual_seed(5)) < share) & layout.edges
        rows = run_circuit(model, layout, pairs.clean, circuit.expand(4, -1, -1), other)
        assert torch.allclose(run_circuit(model, layout, pairs.clean, circuit, other), rows, atol=2e-4)


def test_means_and_zeros_are_what_their_names_say(pair_of, pairs, metric) -> None:
    model = pair_of("gpt2")[0]
    layout = layout_of(model)
    means = mean_written(model, layout, pairs)
    real = torch.arange(8)[None] <= pairs.last[:, None]
    with torch.no_grad():
        seen = model.capture(pairs.corrupt, ["mlp_out@1", "attn_head@0.3"])
    for name, value in seen.items():
        assert torch.allclose(means[layout.source_index[name], 0, 0], value[real].mean(0), atol=1e-5)
    none = torch.zeros_like(layout.edges)
    rows = torch.arange(4)
    stream = means.sum(0)
    with torch.no_grad():
        expected = metric(model.logits(pairs.clean, edits={"final": lambda x: stream.expand_as(x)}), rows)
        nothing = metric(model.logits(pairs.clean, edits={"final": lambda x: x * 0}), rows)
    assert torch.allclose(measure(model, layout, pairs, metric, none, ablation="mean"), expected.double(), atol=1e-4)
    assert torch.allclose(measure(model, layout, pairs, metric, none, ablation="zero"), nothing.double(), atol=1e-5)
    for ablation in ("mean", "zero"):
        whole = measure(model, layout, pairs, metric, layout.edges, ablation=ablation)
        with torch.no_grad():
            assert torch.allclose(whole, metric(model.logits(pairs.clean), rows).double(), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_writes_add_up_to_the_stream(family: str, pair_of, draw) -> None:
    model = pair_of(family)[0]
    layout = layout_of(model)
    tokens = draw(2, 6)
    with torch.no_grad():
        stream = model.capture(tokens, ["final"])["final"]
    assert torch.allclose(written(model, layout, tokens).sum(0), stream, atol=1e-3 * float(stream.abs().max()))
