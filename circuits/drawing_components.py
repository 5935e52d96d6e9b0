"""Circuits of heads and MLPs made ready to be drawn: a row a layer, a column a head, the MLP last.

Edges into the query, the key and the value of one head are one link, which says what each brings. A key-value head
that several query heads share gets its link to each of them, marked as shared.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .circuit_record import CircuitRecord, Node
from .drawing import Drawing, Link, Part
from .eap_ig_json import EdgeGraph
from .layout import INPUT, LOGITS, NodeLayout

LIVE = "Edges outside what is drawn are not shown; a circuit keeps the scored position and contrast, nothing else."


@dataclass(frozen=True)
class Component:
    """What was measured of one source.

    Attributes:
        effect: on the metric.
        low, high: ends of its interval, None where there is none.
        rule, q: as of :class:`.drawing.Part`.
        about: further lines.
    """

    effect: float
    low: float | None = None
    high: float | None = None
    rule: str = ""
    q: float | None = None
    about: tuple[str, ...] = ()


def drawing_of_components(
    layout: NodeLayout,
    components: Mapping[str, Component],
    edges: Iterable[tuple[str, str, float]],
    *,
    title: str,
    effect: str,
    link_effect: str,
    notes: Sequence[str] = (),
) -> Drawing:
    """A circuit over the sources and destinations of ``layout``.

    Args:
        layout: the model's.
        components: by source's name; those that only edges name are drawn with effect 0.
        edges: (source, destination, score).
        title, effect, link_effect, notes: as of :class:`.drawing.Drawing`.

    Raises:
        ValueError: a name is not one of the layout's.
    """
    grouped: dict[tuple[str, str], dict[str, float]] = {}
    shared: dict[tuple[str, str], int] = {}
    for source, destination, score in edges:
        if source not in layout.source_index or destination not in layout.destination_index:
            raise ValueError(f"{source!r} → {destination!r} is no edge of a model of its sizes")
        # Of the heads that share a key or value, those that are in the circuit; all if none is known to be.
        every = _owners(layout, destination)
        owners = [head for head in every if head in components] or every
        for head in owners:
            into = grouped.setdefault((source, head), {})
            into[_port(destination)] = into.get(_port(destination), 0.0) + score / len(owners)
            shared[source, head] = max(shared.get((source, head), 1), len(owners))
    unknown = [name for name in components if name not in layout.source_index and name != LOGITS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no part of a model of its sizes")
    named = dict.fromkeys([*components, *(end for pair in grouped for end in pair)])
    order = {name: i for i, name in enumerate((*layout.sources, LOGITS))}
    parts = tuple(_part(layout, name, components.get(name)) for name in sorted(named, key=order.__getitem__))
    links = tuple(
        _link(pair, into, shared[pair])
        for pair, into in sorted(grouped.items(), key=lambda item: (order[item[0][0]], order[item[0][1]]))
    )
    return Drawing(
        title=title,
        columns=(*(f"head {h}" for h in range(layout.n_heads)), "MLP"),
        across="part of the layer",
        n_layers=layout.n_layers,
        parts=parts,
        links=links,
        effect=effect,
        link_effect=link_effect,
        notes=(*notes, LIVE),
    )


def drawing_of_edges(graph: EdgeGraph, *, title: str, unit: str = "in units of the metric") -> Drawing:
    """The circuit of an EAP-IG graph; a part's effect is the sum of its edges, all of them, where it has no score."""
    layout = graph.layout
    rows, columns = graph.circuit.nonzero(as_tuple=True)
    edges = [
        (layout.sources[u], layout.destinations[v], float(graph.scores[u, v]))
        for u, v in zip(rows.tolist(), columns.tolist(), strict=True)
    ]
    sums = graph.scores.sum(1).tolist()
    own = [math.nan] * len(sums) if graph.nodes is None else graph.nodes.tolist()
    inside = {name for source, destination, _ in edges for name in (source, *_owners(layout, destination))}
    found = {
        name: Component(score if math.isfinite(score) else total)
        for name, score, total in zip(layout.sources, own, sums, strict=True)
        if name in inside
    }
    return drawing_of_components(
        layout,
        found,
        edges,
        title=title,
        effect=f"score {unit}: what the part carries over all its edges",
        link_effect=f"score of the edge {unit}",
        notes=(f"{len(edges):,} of {layout.n_edges:,} edges are in the circuit. Scores are by gradients.",),
    )


def drawing_of_record(record: CircuitRecord) -> Drawing:
    """The circuit that ``heredity circuit`` found; effects are those of interventions where they were measured."""
    measured = [sum(it.effect is not None for it in some) for some in (record.nodes, record.edges)]
    found = {
        node.name: Component(
            node.attribution if node.effect is None else node.effect,
            node.low,
            node.high,
            about=_node_lines(node),
        )
        for node in record.nodes
    }
    edges = [(e.source, e.destination, e.score if e.effect is None else e.effect) for e in record.edges]
    kept, metric = record.proof.faithfulness, record.task.metric.replace("_", " ")
    return drawing_of_components(
        record.layout,
        found,
        edges,
        title=f"{record.task.name} in {record.model.spec}",
        effect=f"{metric}: what goes when the part has its counterfactual value (by gradients where that "
        "was not measured)",
        link_effect=f"{metric}: what goes with the edge (by gradients where not measured)",
        notes=(
            f"{record.size:,} of {record.layout.n_edges:,} edges. They keep {kept.estimate:.0%} of the effect (95 % "
            f"interval {kept.low:.0%} to {kept.high:.0%}) with counterfactual values everywhere else.",
            f"Effects of {measured[0]} of {len(record.nodes)} parts and of {measured[1]} of {len(record.edges)} edges "
            "were measured by intervention. Scores by gradients miss their sum by "
            f"{record.attribution.completeness:.1%}.",
        ),
    )


def _node_lines(node: Node) -> tuple[str, ...]:
    lines = [f"by gradients: {node.attribution:+.3g}"]
    if node.share is not None:
        lines.append(f"{node.share:.1%} of the whole effect")
    if node.effect is None:
        lines.append("not measured by intervention")
    elif node.confirmed is not None:
        lines.append("confirmed by intervention" if node.confirmed else "not confirmed by intervention")
    return tuple(lines)


def _owners(layout: NodeLayout, destination: str) -> tuple[str, ...]:
    owner = layout.owner(destination)
    return (owner,) if isinstance(owner, str) else owner


def _port(destination: str) -> str:
    kind = destination.partition("@")[0]
    return {"attn_q": "query", "attn_k": "key", "attn_v": "value"}.get(kind, "")


def _part(layout: NodeLayout, name: str, about: Component | None) -> Part:
    about = about or Component(0.0)
    middle = layout.n_heads / 2
    layer, _, head = name.partition("@")[2].partition(".")
    common = {"low": about.low, "high": about.high, "rule": about.rule, "q": about.q, "about": about.about}
    if name == INPUT:
        return Part(name, "embedding", "embedding", -1, middle, about.effect, **common)
    if name == LOGITS:
        return Part(name, "logits", "logit", layout.n_layers, middle, about.effect, **common)
    if head:
        said = f"head {head} of layer {layer}"
        return Part(name, said, "head", int(layer), float(head), about.effect, **common)
    return Part(name, f"MLP of layer {layer}", "mlp", int(layer), float(layout.n_heads), about.effect, **common)


def _link(pair: tuple[str, str], into: Mapping[str, float], heads: int) -> Link:
    effect = sum(into.values())
    lines = [f"into its {port}: {score:+.3g}" for port, score in into.items() if port]
    if heads > 1:
        lines.append(f"{heads} heads of the circuit share its key and value; here is one part in {heads}")
    return Link(*pair, effect, sum(abs(score) for score in into.values()), tuple(lines))
