"""Circuits made ready to be drawn: nothing invented, nothing lost but what the notes say, and the union of two."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from heredity.circuits.attribution_graph import attribution_graph
from heredity.circuits.attribution_graph_json import graph_file, write_graph_file
from heredity.circuits.attribution_graph_record import AttributionGraph, Explained
from heredity.circuits.circuit_record import Attribution, CircuitRecord, Edge, ModelAbout, Node, Proof, Sizes, TaskAbout
from heredity.circuits.drawing import Drawing, Link, Part, union
from heredity.circuits.drawing_components import (
    Component,
    drawing_of_components,
    drawing_of_edges,
    drawing_of_record,
)
from heredity.circuits.drawing_files import read_drawing
from heredity.circuits.drawing_graph import drawing_of_graph, drawing_of_graph_file
from heredity.circuits.eap_ig_json import EdgeGraph, write_eap_ig
from heredity.circuits.intervals import Interval
from heredity.circuits.layout import NodeLayout
from heredity.interp.dictionaries.record import DictionarySet
from heredity.interp.errors import GraphError
from heredity.interp.model import Model
from heredity.kernels import TopK


@pytest.fixture
def graph(
    tiny_model: Model, draw: Callable[..., Tensor], random_dictionaries: Callable[..., DictionarySet]
) -> AttributionGraph:
    parts = random_dictionaries(tiny_model, "transcoder", TopK(4))
    return attribution_graph(tiny_model, parts, draw(1, 6)[0])


# --- attribution graphs ---


@pytest.mark.parametrize("target", [0, 2])
def test_a_drawn_graph_is_the_pruned_graph_of_one_target(graph: AttributionGraph, target: int) -> None:
    explained = {(int(graph.latents[0, 0]), int(graph.latents[0, 2])): Explained("a rule", 0.7)}
    drawn = drawing_of_graph(graph, target=target, nodes=0.95, explained=explained)
    pruned = graph.prune(nodes=0.95)
    assert len(drawn.parts) == int(pruned.sources.sum()) + 1
    by_id, effects, n = {part.id: part for part in drawn.parts}, graph.effects()[target], graph.n_latents
    for s, (layer, place, latent) in enumerate(graph.latents.tolist()):
        part = by_id.get(f"{layer}_{latent}_{place}")
        assert (part is not None) == bool(pruned.sources[s])
        if part is not None:
            assert (part.layer, part.column, part.kind) == (layer, place, "latent")
            assert part.effect == pytest.approx(float(effects[s]))
            assert (part.rule, part.q) == (("a rule", 0.7) if (layer, latent) in explained else ("", None))
    assert by_id["target"].effect == pytest.approx(float(graph.read[n + target]))
    into = {link.source for link in drawn.links if link.target == "target"}
    assert len(into) == int(pruned.edges[n + target].sum())
    assert len(drawn.links) == int(pruned.edges[:n].sum()) + len(into)
    assert any("held fixed" in note for note in drawn.notes)
    assert sum(link.strength for link in drawn.links if link.target == "target") <= float(graph.logit_weights[target])


def test_effects_of_a_file_are_those_of_the_graph(graph: AttributionGraph, tmp_path: Path) -> None:
    """Where nothing is pruned, what a file's links say over all paths is what the graph says."""
    path = write_graph_file(graph_file(graph, slug="g", scan="tiny", nodes=1.0, edges=1.0), tmp_path)
    drawn, own = read_drawing(path), drawing_of_graph(graph, nodes=1.0, edges=1.0)
    assert drawn is not None
    expected = {part.id: part for part in own.parts}
    assert {part.id for part in drawn.parts} == set(expected)
    for part in drawn.parts:
        twin = expected[part.id]
        assert (part.layer, part.column, part.kind) == (twin.layer, twin.column, twin.kind)
        if part.kind != "logit":
            assert part.effect == pytest.approx(twin.effect, rel=1e-4, abs=1e-5)
    assert {(link.source, link.target) for link in drawn.links} == {(link.source, link.target) for link in own.links}


def test_labels_and_q_of_a_file_are_shown(graph: AttributionGraph) -> None:
    file = graph_file(graph, slug="g", scan="tiny", nodes=1.0)
    layer, place, latent = graph.latents[3].tolist()
    node = next(n for n in file.nodes if n.node_id == f"{layer}_{latent}_{place}")
    told = node.model_copy(update={"clerp": "says so", "q": 0.4})
    nodes = [told if n is node else n for n in file.nodes]
    drawn = drawing_of_graph_file(file.model_copy(update={"nodes": nodes}))
    part = next(p for p in drawn.parts if p.id == node.node_id)
    assert (part.rule, part.q) == ("says so", 0.4)


# --- heads and MLPs ---

LAYOUT = NodeLayout(2, 4, 2, 8)


def test_parts_stand_by_layer_and_head_and_shared_heads_share_a_link() -> None:
    drawn = drawing_of_components(
        LAYOUT,
        {"attn_head@0.1": Component(0.5, 0.4, 0.6, "a rule", 0.8), "mlp_out@1": Component(-0.2)},
        [
            ("attn_head@0.1", "attn_q@1.2", 0.25),
            ("attn_head@0.1", "attn_v@1.1", 0.5),  # of heads 2 and 3
            ("embed", "mlp_in@1", -0.1),
            ("mlp_out@1", "logits", 1.0),
        ],
        title="t",
        effect="e",
        link_effect="l",
    )
    place = {part.id: (part.layer, part.column) for part in drawn.parts}
    assert place == {
        "embed": (-1, 2.0),
        "attn_head@0.1": (0, 1.0),
        "attn_head@1.2": (1, 2.0),
        "attn_head@1.3": (1, 3.0),
        "mlp_out@1": (1, 4.0),
        "logits": (2, 2.0),
    }
    links = {(link.source, link.target): link for link in drawn.links}
    both, one = links["attn_head@0.1", "attn_head@1.2"], links["attn_head@0.1", "attn_head@1.3"]
    assert both.effect == pytest.approx(0.5) and one.effect == pytest.approx(0.25)
    assert both.about[:2] == ("into its query: +0.25", "into its value: +0.25") and one.about[-1].startswith(
        "2 heads of the circuit share"
    )
    assert links["embed", "mlp_out@1"].effect == -0.1 and links["mlp_out@1", "logits"].about == ()
    head = next(part for part in drawn.parts if part.id == "attn_head@0.1")
    assert (head.effect, head.low, head.high, head.rule, head.q) == (0.5, 0.4, 0.6, "a rule", 0.8)
    assert sum(link.effect for link in drawn.links) == pytest.approx(0.25 + 0.5 - 0.1 + 1.0)


def test_names_of_another_model_are_refused() -> None:
    for components, edges in (({"attn_head@5.0": Component(1.0)}, []), ({}, [("embed", "attn_k@0.3", 1.0)])):
        with pytest.raises(ValueError, match="of a model of its sizes"):
            drawing_of_components(LAYOUT, components, edges, title="", effect="", link_effect="")


def test_an_eap_ig_file_is_drawn(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(len(LAYOUT.sources), len(LAYOUT.destinations), generator=g, dtype=torch.float64)
    scores = scores.masked_fill(~LAYOUT.edges, 0)
    circuit = scores.abs() > 1.2
    write_eap_ig(EdgeGraph(LAYOUT, scores, circuit), tmp_path / "ioi.json")
    drawn = read_drawing(tmp_path / "ioi.json")
    assert drawn is not None and drawn.title == "ioi" and drawn.columns[-1] == "MLP"
    assert sum(link.effect for link in drawn.links) == pytest.approx(float(scores[circuit].sum()))
    effects = {part.id: part.effect for part in drawn.parts}
    for name in LAYOUT.sources:
        if circuit[LAYOUT.source_index[name]].any():
            assert effects[name] == pytest.approx(float(scores[LAYOUT.source_index[name]].sum()))
    again = drawing_of_edges(EdgeGraph(LAYOUT, scores, circuit, torch.full((len(scores),), 3.0)), title="x")
    assert {part.effect for part in again.parts if part.kind != "logit"} == {3.0}


def test_a_record_of_a_discovery_is_drawn_with_measured_effects() -> None:
    record = CircuitRecord.model_construct(
        model=ModelAbout(spec="m", architecture="a", sha256="0", n_params=1),
        task=TaskAbout.model_construct(name="ioi", metric="logit difference"),
        attribution=Attribution(method="eap-ig", steps=5, completeness=0.012, tolerance=0.02),
        sizes=Sizes(n_layers=2, n_heads=4, n_kv_heads=2, d_model=8, parallel=False),
        proof=Proof.model_construct(faithfulness=Interval(0.91, 0.85, 0.97)),
        size=2,
        nodes=(
            Node(name="embed", layer=-1, attribution=1.5),
            Node(
                name="attn_head@0.1", layer=0, attribution=0.4, share=0.3, effect=0.5, low=0.4, high=0.6, confirmed=True
            ),
        ),
        edges=(
            Edge(source="embed", destination="attn_v@0.0", score=0.3, effect=0.2, low=0.1, high=0.3, confirmed=True),
            Edge(source="attn_head@0.1", destination="logits", score=-0.1),
        ),
    )
    drawn = drawing_of_record(record)
    parts = {part.id: part for part in drawn.parts}
    assert set(parts) == {"embed", "attn_head@0.1", "logits"}  # not head 0, which only shares its value
    head = parts["attn_head@0.1"]
    assert (head.effect, head.low, head.high) == (0.5, 0.4, 0.6)
    assert head.about == ("by gradients: +0.4", "30.0% of the whole effect", "confirmed by intervention")
    assert (parts["embed"].effect, parts["embed"].low) == (1.5, None)
    assert parts["embed"].about[-1] == "not measured by intervention"
    links = {(link.source, link.target): link.effect for link in drawn.links}
    assert links == {("embed", "attn_head@0.1"): 0.2, ("attn_head@0.1", "logits"): -0.1}
    assert "91% of the effect (95 % interval 85% to 97%)" in drawn.notes[0]
    assert drawn.notes[1].startswith("Effects of 1 of 2 parts and of 1 of 2 edges were measured")


def test_what_is_no_circuit_is_none_and_what_is_damaged_is_refused(tmp_path: Path) -> None:
    assert read_drawing(tmp_path) is None and read_drawing(tmp_path / "absent.json") is None
    for name, content in (("a.json", "[1]"), ("b.json", "{"), ("c.json", '{"verdict": "pass"}')):
        (tmp_path / name).write_text(content)
        assert read_drawing(tmp_path / name) is None
    (tmp_path / "d.json").write_text('{"metadata": {}, "nodes": [], "links": []}')
    (tmp_path / "e.json").write_text('{"cfg": {}, "nodes": {}, "edges": {}}')
    (tmp_path / "f.json").write_text('{"format": "heredity circuit 1"}')
    (tmp_path / "graph.json").write_text("{}")
    for path in (tmp_path / "d.json", tmp_path / "e.json", tmp_path / "f.json", tmp_path):
        with pytest.raises(GraphError):
            read_drawing(path)


# --- unions ---


def drawing(parts: dict[str, float], links: list[tuple[str, str, float]], n_layers: int = 2) -> Drawing:
    return Drawing(
        title="t",
        columns=("a", "b"),
        across="token",
        n_layers=n_layers,
        parts=tuple(
            Part(i, i, "latent", 0 if i != "top" else n_layers, 0, e, rule=f"rule {i}") for i, e in parts.items()
        ),
        links=tuple(Link(a, b, e, abs(e)) for a, b, e in links),
        effect="e",
        link_effect="l",
    )


def test_a_union_tells_kept_lost_and_new() -> None:
    first = drawing({"x": 1.0, "y": -2.0}, [("x", "y", 0.5)])
    second = drawing({"y": 3.0, "z": 0.1}, [("y", "z", 0.2)])
    both = union(first, second, ("P", "S"))
    assert {part.id: (part.status, part.effect) for part in both.parts} == {
        "x": ("lost", 1.0),
        "y": ("kept", 3.0),
        "z": ("new", 0.1),
    }
    kept = next(part for part in both.parts if part.id == "y")
    assert kept.about == ("effect in P: -2", "effect in S: +3")
    assert {(link.source, link.target): link.status for link in both.links} == {("x", "y"): "lost", ("y", "z"): "new"}
    assert both.compared == ("P", "S")
    noted = union(replace(first, notes=("same", "one")), replace(second, notes=("same", "two")), ("P", "S"))
    assert noted.notes == ("same", "P: one", "S: two")


def test_a_circuit_with_itself_is_kept_and_exchanging_two_exchanges_lost_and_new() -> None:
    first, second = drawing({"x": 1.0, "y": 2.0}, [("x", "y", 1.0)]), drawing({"y": 2.0, "z": 1.0}, [])
    same = union(first, first)
    assert {part.status for part in same.parts} == {link.status for link in same.links} == {"kept"}
    swap = {"kept": "kept", "lost": "new", "new": "lost"}
    there, back = union(first, second), union(second, first)
    assert {p.id: p.status for p in back.parts} == {p.id: swap[p.status or ""] for p in there.parts}


def test_a_deeper_model_lifts_the_targets_of_the_other() -> None:
    both = union(drawing({"x": 1.0, "top": 1.0}, []), drawing({"x": 1.0, "top": 1.0, "z": 1.0}, [], n_layers=4))
    assert both.n_layers == 4 and {part.layer for part in both.parts if part.id == "top"} == {4}
    back = union(drawing({"x": 1.0}, [], n_layers=4), drawing({"x": 1.0, "top": 1.0}, []))
    assert {part.layer for part in back.parts if part.id == "top"} == {4}


def test_circuits_over_other_columns_are_refused() -> None:
    first = drawing({"x": 1.0}, [])
    with pytest.raises(ValueError, match="cannot be laid over"):
        union(first, replace(first, columns=("a", "c")))


def test_what_is_left_out_of_a_drawing_is_said() -> None:
    many = drawing({f"p{i}": float(i) for i in range(10)}, [(f"p{i}", f"p{i + 1}", i / 10) for i in range(9)])
    few = many.strongest(4, 2)
    assert {part.id for part in few.parts} == {"p6", "p7", "p8", "p9"}
    assert [(link.source, link.target) for link in few.links] == [("p8", "p9"), ("p7", "p8")]
    assert few.notes == (
        "Drawn are the 4 parts with the largest effects, of 10.",
        "Drawn are the 2 strongest links between them, of 3.",
    )
    whole = many.strongest(10, 9)
    assert whole.parts == many.parts and set(whole.links) == set(many.links) and whole.notes == ()
