"""Graphs in EAP-IG's JSON: names and sizes by hand, round trips, shared key-value heads, files that are none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from heredity.circuits.eap_ig_json import EdgeGraph, read_eap_ig, write_eap_ig
from heredity.circuits.layout import NodeLayout
from heredity.interp.errors import GraphError


def drawn(layout: NodeLayout, seed: int = 0, with_nodes: bool = False) -> EdgeGraph:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(layout.sources), len(layout.destinations), generator=g, dtype=torch.float64)
    scores = scores.masked_fill(~layout.edges, 0)
    circuit = (scores.abs() > 0.8) & layout.edges
    nodes = torch.randn(len(layout.sources), generator=g, dtype=torch.float64) if with_nodes else None
    return EdgeGraph(layout, scores, circuit, nodes)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("with_nodes", [False, True])
def test_what_is_written_is_read_again(tmp_path: Path, parallel: bool, kv_heads: int, with_nodes: bool) -> None:
    graph = drawn(NodeLayout(3, 4, kv_heads, 16, parallel), with_nodes=with_nodes)
    write_eap_ig(graph, tmp_path / "graph.json")
    again = read_eap_ig(tmp_path / "graph.json")
    assert again.layout == graph.layout and again.torn == 0
    torch.testing.assert_close(again.scores, graph.scores, rtol=1e-12, atol=0)
    assert torch.equal(again.circuit, graph.circuit) and graph.circuit.any()
    assert (again.nodes is None) == (graph.nodes is None)
    if graph.nodes is not None and again.nodes is not None:
        torch.testing.assert_close(again.nodes, graph.nodes)


def test_names_are_theirs_and_shared_heads_are_written_once_per_query_head(tmp_path: Path) -> None:
    """Every node and edge that EAP-IG would make of these sizes, by its own rules, and no other."""
    layout = NodeLayout(2, 4, 2, 8)
    graph = drawn(layout)
    write_eap_ig(graph, tmp_path / "graph.json")
    said = json.loads((tmp_path / "graph.json").read_text())
    assert said["cfg"] == {"n_layers": 2, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 8, "n_kv_heads": 2}
    before, expected = ["input"], set()
    for layer in range(2):
        heads = [f"a{layer}.h{head}" for head in range(4)]
        expected |= {f"{u}->{head}<{letter}>" for u in before for head in heads for letter in "qkv"}
        before += heads
        expected |= {f"{u}->m{layer}" for u in before}
        before.append(f"m{layer}")
    expected |= {f"{u}->logits" for u in before}
    assert set(said["edges"]) == expected and set(said["nodes"]) == {*before, "logits"}

    # Heads 2 and 3 share key-value head 1: half of the score each, so that sums stay what they were.
    native = float(graph.scores[layout.source_index["mlp_out@0"], layout.destination_index["attn_k@1.1"]])
    parts = [said["edges"][f"m0->a1.h{head}<k>"]["score"] for head in (2, 3)]
    assert parts == pytest.approx([native / 2] * 2)
    out_of_input = sum(edge["score"] for name, edge in said["edges"].items() if name.startswith("input->"))
    assert out_of_input == pytest.approx(float(graph.scores[0].sum()))
    query = float(graph.scores[layout.source_index["attn_head@0.3"], layout.destination_index["attn_q@1.2"]])
    assert said["edges"]["a0.h3->a1.h2<q>"]["score"] == pytest.approx(query)
    assert said["nodes"]["input"] == {"in_graph": bool(graph.circuit[0].any())}


def test_parts_of_an_ungrouped_file_are_added_and_torn_heads_counted(tmp_path: Path) -> None:
    """As EAP-IG writes them after ungrouping: every query head has scores of its own, no n_kv_heads."""
    graph = drawn(NodeLayout(2, 4, 4, 8), seed=3)
    write_eap_ig(graph, tmp_path / "graph.json")
    assert read_eap_ig(tmp_path / "graph.json").layout.n_kv_heads == 4
    grouped = read_eap_ig(tmp_path / "graph.json", n_kv_heads=2)
    fine, coarse = graph.layout.destination_index, grouped.layout.destination_index
    torn = 0
    for kind in ("attn_k", "attn_v"):
        for layer in range(2):
            for shared in range(2):
                own = [fine[f"{kind}@{layer}.{2 * shared + i}"] for i in (0, 1)]
                at = coarse[f"{kind}@{layer}.{shared}"]
                torch.testing.assert_close(grouped.scores[:, at], graph.scores[:, own].sum(1))
                assert torch.equal(grouped.circuit[:, at], graph.circuit[:, own].any(1))
                torn += int((graph.circuit[:, own].any(1) & ~graph.circuit[:, own].all(1)).sum())
    assert grouped.torn == torn > 0
    assert torch.equal(grouped.scores[:, coarse["attn_q@1.2"]], graph.scores[:, fine["attn_q@1.2"]])


def test_only_nodes_the_circuit_runs_through_are_in_it(tmp_path: Path) -> None:
    layout = NodeLayout(2, 2, 2, 8)
    circuit = torch.zeros_like(layout.edges)
    row, column = layout.source_index, layout.destination_index
    circuit[row["embed"], column["attn_v@0.1"]] = True
    circuit[row["attn_head@0.1"], column["logits"]] = True
    circuit[row["mlp_out@0"], column["logits"]] = True  # nothing goes into it
    circuit[row["embed"], column["mlp_in@1"]] = True  # nothing comes out of it
    write_eap_ig(EdgeGraph(layout, layout.edges.double(), circuit), tmp_path / "graph.json")
    nodes = json.loads((tmp_path / "graph.json").read_text())["nodes"]
    assert {name for name, about in nodes.items() if about["in_graph"]} == {"input", "a0.h1", "logits"}


def test_scores_that_are_missing_in_a_file_are_no_edges_of_the_circuit(tmp_path: Path) -> None:
    file = {
        "cfg": {"n_layers": 1, "n_heads": 2, "d_model": 4, "parallel_attn_mlp": False},
        "nodes": {"m0": {"in_graph": True, "score": float("nan")}, "a0.h1": {"in_graph": True, "score": 2.0}},
        "edges": {"a0.h1->m0": {"score": -1, "in_graph": True}},
    }
    (tmp_path / "graph.json").write_text(json.dumps(file))
    found = read_eap_ig(tmp_path / "graph.json")
    u, v = found.layout.source_index["attn_head@0.1"], found.layout.destination_index["mlp_in@0"]
    assert found.circuit.nonzero().tolist() == [[u, v]] and float(found.scores.sum()) == -1
    assert found.nodes is not None and float(found.nodes[u]) == 2.0 and int(found.nodes.isnan().sum()) == 3


GOOD: dict[str, Any] = {
    "cfg": {"n_layers": 1, "n_heads": 2, "d_model": 4, "parallel_attn_mlp": False},
    "nodes": {},
    "edges": {},
}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"cfg": {"n_layers": 1, "n_heads": 2}}, "KeyError: 'd_model'"),
        ({"cfg": {**GOOD["cfg"], "n_layers": "1"}}, "cfg must give"),
        ({"cfg": {**GOOD["cfg"], "n_layers": 10**6}}, "more than can be read"),
        ({"cfg": {**GOOD["cfg"], "n_kv_heads": 3}}, "divisor of n_heads"),
        ({"nodes": []}, "AttributeError"),
        ({"edges": {"m0->a0.h0<q>": {"score": 1, "in_graph": True}}}, "no edge of a model"),
        ({"edges": {"input->a0.h9<q>": {"score": 1, "in_graph": True}}}, "no edge of a model"),
        ({"edges": {"input->a0.h0": {"score": 1, "in_graph": True}}}, "no edge of a model"),
        ({"edges": {"input->m0": {"score": float("inf"), "in_graph": True}}}, "no finite score"),
        ({"edges": {"input->m0": True}}, "no finite score"),
    ],
)
def test_files_that_are_no_graph_are_refused(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    (tmp_path / "graph.json").write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(GraphError, match=fault):
        read_eap_ig(tmp_path / "graph.json")


@pytest.mark.parametrize("content", ["", "[" * 100_000, "[]", '{"cfg": 1}'])
def test_what_is_no_json_of_that_kind_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "graph.json").write_text(content)
    with pytest.raises(GraphError, match="no EAP-IG graph can be read"):
        read_eap_ig(tmp_path / "graph.json")
    with pytest.raises(GraphError):
        read_eap_ig(tmp_path / "absent.json")
