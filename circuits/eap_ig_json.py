"""Circuits of heads and MLPs in the JSON of EAP-IG, which the MIB benchmark takes too, both ways.

    {"cfg": {n_layers, n_heads, parallel_attn_mlp, d_model},
     "nodes": {"input" | "a{layer}.h{head}" | "m{layer}" | "logits": {in_graph, score?}},
     "edges": {"a0.h1->a3.h2<q>": {score, in_graph}}}

(hannamw/EAP-IG, ``Graph.to_json``). The sign of a score is that of :mod:`.edges`: there (a(x′) − a(x)) · ∂L/∂in with
the loss L = −m.

**Shared key-value heads.** That format knows one key and one value per query head. Here query heads that share a
key-value head share its destination, so its edges are written once per query head, each with an equal part of the
score: scores over any cut still add up. Reading adds the parts, which is also right for a file made by a model whose
heads were ungrouped (its parts differ). How many key-value heads there are is written as ``n_kv_heads`` beside the
other sizes, where EAP-IG ignores it; files without it are read as ungrouped unless the reader says otherwise. An edge
of a shared head is in the circuit if any of its parts is; :attr:`EdgeGraph.torn` counts those of which not all are.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heredity.interp.errors import GraphError
from heredity.interp.store import replacing

from .layout import INPUT, LOGITS, NodeLayout

LARGEST = 1 << 27
"""Sources times destinations of the largest graph that is read."""
_EDGE = re.compile(r"(input|m\d{1,6}|a\d{1,6}\.h\d{1,6})->(logits|m\d{1,6}|a\d{1,6}\.h\d{1,6}<[qkv]>)")
_REMEDY = "Give a graph written by EAP-IG's to_json or by heredity."


@dataclass(frozen=True, eq=False)
class EdgeGraph:
    """Scores of edges, and which of them are in the circuit.

    Attributes:
        layout: names of rows and columns.
        scores: float64 [sources, destinations], 0 where there is no edge.
        circuit: bool [sources, destinations].
        nodes: float64 [sources], NaN where a node has no score of its own; None if the file has none.
        torn: edges into shared heads of which only some query heads' parts were in the circuit.
    """

    layout: NodeLayout
    scores: Tensor
    circuit: Tensor
    nodes: Tensor | None = None
    torn: int = 0


def write_eap_ig(graph: EdgeGraph, path: str | Path) -> None:
    """Write a graph as EAP-IG reads it.

    Raises:
        StoreError: it cannot be written.
    """
    layout, group = graph.layout, graph.layout.n_heads // graph.layout.n_kv_heads
    rows = [_theirs(name) for name in layout.sources]
    columns = [_destinations(layout, name) for name in layout.destinations]
    edges: dict[str, Any] = {}
    for u, v in layout.edges.nonzero().tolist():
        part = {"score": float(graph.scores[u, v]) / len(columns[v]), "in_graph": bool(graph.circuit[u, v])}
        edges |= {f"{rows[u]}->{name}": part for name in columns[v]}
    nodes: dict[str, Any] = {
        name: {"in_graph": inside} for name, inside in zip(rows, _inside(graph).tolist(), strict=True)
    }
    if graph.nodes is not None:
        for name, score in zip(rows, graph.nodes.tolist(), strict=True):
            nodes[name]["score"] = score
    nodes["logits"] = {"in_graph": True}
    sizes = {
        "n_layers": layout.n_layers,
        "n_heads": layout.n_heads,
        "parallel_attn_mlp": layout.parallel,
        "d_model": layout.d_model,
        **({"n_kv_heads": layout.n_kv_heads} if group > 1 else {}),
    }
    with replacing(Path(path)) as partial:
        partial.write_text(json.dumps({"cfg": sizes, "nodes": nodes, "edges": edges}), encoding="utf-8")


def read_eap_ig(path: str | Path, *, n_kv_heads: int | None = None) -> EdgeGraph:
    """Read a graph of EAP-IG.

    Args:
        path: the file.
        n_kv_heads: key-value heads per layer of the model, where the file does not say.

    Raises:
        GraphError: it is no such file, or names nodes and edges its sizes do not have.
    """
    where = str(path)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        sizes, nodes, edges = content["cfg"], content["nodes"], content["edges"]
        layout = _layout(sizes, n_kv_heads)
        said = {name: float(about["score"]) for name, about in nodes.items() if "score" in about}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        raise GraphError(
            f"no EAP-IG graph can be read there ({type(fault).__name__}: {fault})", where=where, remedy=_REMEDY
        ) from None
    shape = len(layout.sources), len(layout.destinations)
    row_of = {_theirs(name): i for i, name in enumerate(layout.sources)}
    column_of = {part: v for v, name in enumerate(layout.destinations) for part in _destinations(layout, name)}
    scores, parts = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.int64)
    real = layout.edges
    for name, about in edges.items():
        match = _EDGE.fullmatch(name)
        u, v = (row_of.get(match[1]), column_of.get(match[2])) if match else (None, None)
        score = about.get("score") if isinstance(about, Mapping) else None
        if u is None or v is None or not real[u, v]:
            raise GraphError(f"{name!r} is no edge of a model of its sizes", where=where, remedy=_REMEDY)
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise GraphError(f"edge {name!r} has no finite score", where=where, remedy=_REMEDY)
        scores[u, v] += score
        parts[u, v] += bool(about.get("in_graph"))
    whole = torch.tensor([len(_destinations(layout, name)) for name in layout.destinations])
    own = None
    if said:
        own = torch.tensor([said.get(_theirs(name), math.nan) for name in layout.sources], dtype=torch.float64)
    return EdgeGraph(layout, scores, parts > 0, own, int(((parts > 0) & (parts < whole)).sum()))


def _layout(sizes: Mapping[str, Any], n_kv_heads: int | None) -> NodeLayout:
    n_layers, n_heads, d_model = (sizes[name] for name in ("n_layers", "n_heads", "d_model"))
    shared = sizes.get("n_kv_heads", n_heads) if n_kv_heads is None else n_kv_heads
    if any(type(n) is not int or n < 1 for n in (n_layers, n_heads, d_model, shared)) or n_heads % shared:
        raise ValueError("cfg must give n_layers, n_heads and d_model, and n_kv_heads a divisor of n_heads")
    if n_layers * (n_heads + 1) * n_layers * (3 * n_heads + 1) > LARGEST:
        raise ValueError(f"{n_layers} layers of {n_heads} heads are more than can be read")
    return NodeLayout(n_layers, n_heads, shared, d_model, bool(sizes.get("parallel_attn_mlp", False)))


def _theirs(source: str) -> str:
    """Their name of a source."""
    kind, _, place = source.partition("@")
    if kind == INPUT:
        return "input"
    layer, _, head = place.partition(".")
    return f"a{layer}.h{head}" if head else f"m{layer}"


def _destinations(layout: NodeLayout, name: str) -> list[str]:
    """Their names of a destination: one, or of a shared head one per query head."""
    if name == LOGITS:
        return ["logits"]
    owner = layout.owner(name)
    letter = name.partition("@")[0].removeprefix("attn_")
    heads = [owner] if isinstance(owner, str) else owner
    return [_theirs(head) + (f"<{letter}>" if letter in ("q", "k", "v") else "") for head in heads]


def _inside(graph: EdgeGraph) -> Tensor:
    """Which sources the circuit runs through, bool [sources]."""
    layout = graph.layout
    inside, entered = graph.circuit.any(1), torch.zeros(len(layout.sources), dtype=torch.bool)
    entered[0] = True
    for name, reached in zip(layout.destinations, graph.circuit.any(0).tolist(), strict=True):
        if reached and name != LOGITS:
            owner = layout.owner(name)
            for source in [owner] if isinstance(owner, str) else owner:
                entered[layout.source_index[source]] = True
    return inside & entered
