"""Graph files: what public viewers ask for, what was in the graph, and both ways of writing an error's id."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor

from heredity.circuits.attribution_graph import attribution_graph
from heredity.circuits.attribution_graph_json import (
    ERROR,
    LATENT,
    LOGIT,
    TOKEN,
    GraphNode,
    error_place,
    graph_file,
    paired,
    read_graph_file,
    write_graph_file,
)
from heredity.circuits.attribution_graph_merge import merge
from heredity.circuits.attribution_graph_record import AttributionGraph, Explained
from heredity.circuits.attribution_graph_targets import logit_difference
from heredity.interp.dictionaries.record import DictionarySet
from heredity.interp.errors import GraphError
from heredity.interp.model import Model
from heredity.kernels import TopK

SCHEMA = json.loads((Path(__file__).parent / "attribution_graph.schema.json").read_text())


@pytest.fixture
def graph(
    tiny_model: Model, draw: Callable[..., Tensor], random_dictionaries: Callable[..., DictionarySet]
) -> AttributionGraph:
    return attribution_graph(tiny_model, random_dictionaries(tiny_model, "transcoder", TopK(4)), draw(1, 6)[0])


def written(graph: AttributionGraph, directory: Path, **options: Any) -> dict[str, Any]:
    path = write_graph_file(graph_file(graph, slug="a-graph", scan="tiny", **options), directory)
    content = json.loads(path.read_text())
    jsonschema.validate(content, SCHEMA)
    return content


def test_the_schema_refuses_what_viewers_cannot_read(graph: AttributionGraph, tmp_path: Path) -> None:
    content = written(graph, tmp_path)
    for broken in (
        {**content, "links": [{"source": "a", "weight": 1.0}]},
        {**content, "qParams": {"clickedId": None}},
        {**content, "nodes": [{**content["nodes"][0], "layer": 1}]},
        {k: v for k, v in content.items() if k != "qParams"},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)


@pytest.mark.parametrize(("nodes", "edges"), [(0.8, 0.98), (1.0, 1.0), (0.4, 0.5)])
def test_a_file_holds_the_pruned_graph(graph: AttributionGraph, tmp_path: Path, nodes: float, edges: float) -> None:
    content = written(graph, tmp_path, nodes=nodes, edges=edges, explained={(0, 7): Explained("a label", 0.5)})
    n, m, last = graph.n_latents, len(graph.errors), len(graph.places) - 1
    ids = [f"{layer}_{latent}_{place}" for layer, place, latent in graph.latents.tolist()]
    ids += [f"{layer}_-1_{place}" for layer, place in graph.errors.tolist()]
    ids += [f"E_{token}_{place}" for token, place in graph.tokens.tolist()]
    rows = [*ids[:n], *(f"{graph.n_layers + 1}_{token}_{last}" for token in graph.logit_tokens)]
    pruned = graph.prune(nodes=nodes, edges=edges)
    expected = {
        (ids[s], rows[t]): pytest.approx(float(graph.weights[t, s])) for t, s in pruned.edges.nonzero().tolist()
    }
    assert {(link["source"], link["target"]): link["weight"] for link in content["links"]} == expected and expected

    said = {node["node_id"]: node for node in content["nodes"]}
    assert len(said) == len(content["nodes"])
    assert set(said) == {ids[s] for s in pruned.sources.nonzero()[:, 0].tolist()} | set(rows[n:])
    kinds = [LATENT] * n + [ERROR] * m + [TOKEN] * len(graph.tokens)
    for s, (name, kind) in enumerate(zip(ids, kinds, strict=True)):
        if node := said.get(name):
            assert node["feature_type"] == kind and node["influence"] == pytest.approx(float(pruned.entered[s]))
    for (layer, place, latent), value in zip(graph.latents.tolist(), graph.activations.tolist(), strict=True):
        if node := said.get(f"{layer}_{latent}_{place}"):
            assert (node["layer"], node["ctx_idx"], node["feature"]) == (str(layer), place, paired(layer, latent))
            assert node["activation"] == pytest.approx(value)
            assert (node["clerp"], node.get("q")) == (("a label", 0.5) if (layer, latent) == (0, 7) else ("", None))
            assert node["jsNodeId"] == f"{layer}_{latent}-0"
    logits = [node for node in content["nodes"] if node["feature_type"] == LOGIT]
    assert [node["token_prob"] for node in logits] == pytest.approx(graph.logit_weights.tolist())
    assert [node["is_target_logit"] for node in logits] == [True] + [False] * (len(logits) - 1)
    assert logits[0]["clerp"] == f'Output "{graph.logits[0]}" (p={float(graph.logit_weights[0]):.3f})'
    about = content["metadata"]
    assert about["prompt_tokens"] == list(graph.places) and about["node_threshold"] == nodes
    assert about["replacement_score"] == pytest.approx(graph.scores.replacement)


def test_a_number_stands_for_layer_and_latent() -> None:
    """Cantor's pairing, which viewers undo."""
    assert paired(0, 0) == 0 and paired(1, 0) == 1 and paired(0, 1) == 2 and paired(2, 1) == 7
    pairs = {paired(layer, latent): (layer, latent) for layer in range(40) for latent in range(60)}
    assert len(pairs) == 2400
    for number, (layer, latent) in pairs.items():
        diagonal = int(((8 * number + 1) ** 0.5 - 1) // 2)
        inverse = number - diagonal * (diagonal + 1) // 2
        assert (diagonal - inverse, inverse) == (layer, latent)


def test_what_is_written_is_read_again(graph: AttributionGraph, tmp_path: Path) -> None:
    file = graph_file(graph, slug="a-graph", scan="tiny")
    assert read_graph_file(write_graph_file(file, tmp_path)) == file


def test_targets_and_merged_graphs_are_files_too(
    tiny_model: Model,
    draw: Callable[..., Tensor],
    random_dictionaries: Callable[..., DictionarySet],
    tmp_path: Path,
) -> None:
    """A difference of logits has an id behind the vocabulary; tokens that share a role have none and take −1."""
    parts, target = random_dictionaries(tiny_model, "transcoder", TopK(4)), [logit_difference(tiny_model, [4], [9])]
    graphs = [attribution_graph(tiny_model, parts, draw(1, 5, seed=i)[0], targets=target) for i in range(2)]
    content = written(merge(graphs, [[*"abcd", "end"]] * 2), tmp_path)
    (logit,) = [node for node in content["nodes"] if node["feature_type"] == LOGIT]
    assert logit["feature"] == tiny_model.shape.d_vocab and logit["ctx_idx"] == 4
    assert content["metadata"]["prompt_tokens"] == [*"abcd", "end"]


def test_both_ids_of_an_error_are_read() -> None:
    def node(name: str, kind: str = ERROR) -> GraphNode:
        return GraphNode.model_validate(
            {
                "node_id": name,
                "feature": -1,
                "layer": "3",
                "ctx_idx": 2,
                "feature_type": kind,
                "jsNodeId": "",
                "clerp": "",
            }
        )

    assert error_place(node("3_-1_2")) == error_place(node("0_3_2")) == (3, 2)
    assert error_place(node("0_-1_2")) == (0, 2)
    for wrong in (node("0_3_2", LATENT), node("3_5_2"), node("3_2"), node("x_-1_2")):
        with pytest.raises(ValueError):
            error_place(wrong)


def test_the_listing_holds_every_graph_of_a_directory_once(graph: AttributionGraph, tmp_path: Path) -> None:
    for slug, scan in (("one", "tiny"), ("two", "tiny"), ("one", "tiny-2")):
        write_graph_file(graph_file(graph, slug=slug, scan=scan), tmp_path)
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert sorted((entry["slug"], entry["scan"]) for entry in listed) == [("one", "tiny-2"), ("two", "tiny")]
    assert {path.name for path in tmp_path.iterdir()} == {"one.json", "two.json", "graph-metadata.json"}


@pytest.mark.parametrize("slug", ["", "../up", "a/b", ".hidden", "a b", "x" * 201])
def test_a_slug_is_the_name_of_a_file(graph: AttributionGraph, slug: str) -> None:
    with pytest.raises(ValueError, match="no slug"):
        graph_file(graph, slug=slug, scan="tiny")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"nodes": 3}, "nodes: "),
        ({"links": [{"source": "E_1_0", "target": "nowhere", "weight": 1.0}]}, "'nowhere', which is no node"),
        ({"links": [{"source": "E_1_0", "target": "E_1_0", "weight": "much"}]}, "links.0.weight"),
        ({"metadata": {"slug": "a"}}, "metadata.scan"),
    ],
)
def test_files_that_are_no_graph_are_refused(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    node = {"node_id": "E_1_0", "feature": 0, "layer": "E", "ctx_idx": 0, "feature_type": TOKEN}
    good = {
        "metadata": {"slug": "a", "scan": "b", "prompt_tokens": ["x"], "prompt": "x"},
        "qParams": {"clickedId": None},
        "nodes": [{**node, "jsNodeId": "E_1-0", "clerp": "", "something": "else"}],
        "links": [],
    }
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(good))
    assert read_graph_file(path).nodes[0].model_extra == {"something": "else"}
    path.write_text(json.dumps({**good, **change}))
    with pytest.raises(GraphError, match=fault):
        read_graph_file(path)
    with pytest.raises(GraphError, match="cannot be read"):
        read_graph_file(tmp_path / "absent.json")


def test_weights_stay_signed(graph: AttributionGraph, tmp_path: Path) -> None:
    weights = torch.tensor([link["weight"] for link in written(graph, tmp_path)["links"]])
    assert (weights < 0).any() and (weights > 0).any()
