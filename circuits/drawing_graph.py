"""Attribution graphs made ready to be drawn, from the record or from anyone's graph file."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .attribution_graph_json import ERROR, LATENT, LOGIT, TOKEN, GraphFile, GraphNode, error_place
from .attribution_graph_record import AttributionGraph, Explained
from .drawing import Drawing, Kind, Link, Part

FROZEN = "Attention patterns and norms are held fixed: why a head looks where it looks is no part of this graph."
DIRECT = "direct effect on what the upper part reads"


def drawing_of_graph(
    graph: AttributionGraph,
    *,
    target: int = 0,
    nodes: float = 0.8,
    edges: float = 0.98,
    explained: Mapping[tuple[int, int], Explained] | None = None,
) -> Drawing:
    """The most influential part of ``graph``, with the effect of every node on one of its targets over all paths.

    Args:
        graph: the graph.
        target: whose effects are shown.
        nodes, edges: shares of influence kept (:func:`.influence.prune`).
        explained: rules of latents by (layer, latent); the graph's own if None.
    """
    pruned, known = graph.prune(nodes=nodes, edges=edges), graph.explained if explained is None else explained
    effects, n, m = graph.effects()[target].tolist(), graph.n_latents, len(graph.errors)
    parts = []
    for s in pruned.sources.nonzero()[:, 0].tolist():
        if s < n:
            layer, place, latent = graph.latents[s].tolist()
            about = (f"activation: {float(graph.activations[s]):.3g}", _at(graph.places, place))
            rule, q = known.get((layer, latent), Explained(""))
            parts.append(_latent(layer, latent, place, effects[s], about, rule, q))
        elif s < n + m:
            layer, place = graph.errors[s - n].tolist()
            parts.append(_error(layer, place, effects[s], graph.places))
        else:
            token, place = graph.tokens[s - n - m].tolist()
            parts.append(_token(token, place, effects[s], graph.places))
    share = f"weight among the targets: {float(graph.logit_weights[target]):.3g}"
    name, value = f"“{graph.logits[target]}”", float(graph.read[n + target])
    parts.append(Part("target", name, "logit", graph.n_layers, len(graph.places) - 1, value, about=(share,)))
    ids = [*(_column_id(graph, s) for s in range(graph.weights.shape[1])), "target"]
    chosen = pruned.edges.clone()
    chosen[n:] &= torch.arange(len(graph.logits), device=chosen.device)[:, None] == target
    links = tuple(
        Link(ids[s], ids[t] if t < n else "target", weight, share) for t, s, weight, share in _edges(graph, chosen)
    )
    notes = [FROZEN, f"Replacement score {graph.scores.replacement:.2f}, completeness {graph.scores.completeness:.2f}."]
    notes += [f"Of {len(graph.logits)} targets, this is the graph of {name}."] if len(graph.logits) > 1 else []
    notes += [f"Left out before: {graph.kept.reason}."] if graph.kept.reason else []
    return Drawing(
        title=f"What makes {name} after “{graph.prompt}”",
        columns=graph.places,
        across="token",
        n_layers=graph.n_layers,
        parts=tuple(parts),
        links=links,
        effect=f"effect on {name} over all paths of the frozen model, in logits",
        link_effect=DIRECT,
        notes=tuple(notes),
    )


def drawing_of_graph_file(file: GraphFile) -> Drawing:
    """A graph file made ready to be drawn.

    Such files say how influential a node is, but not with which sign; the effect of a node is worked out here from the
    links, over all paths, on the most probable logit. Where a file was pruned, so are the paths.
    """
    logits = [node for node in file.nodes if node.feature_type == LOGIT]
    target = max(logits, key=lambda node: node.token_prob, default=None)
    layers = [int(node.layer) for node in file.nodes if node.feature_type in (LATENT, ERROR) and node.layer.isdigit()]
    n_layers = int(logits[0].layer) - 1 if logits and logits[0].layer.isdigit() else max(layers, default=0) + 1
    effects = _file_effects(file, target.node_id) if target else {}
    places = tuple(file.metadata.prompt_tokens)
    shown = [node for node in file.nodes if node.feature_type != LOGIT or node is target]
    parts = tuple(_file_part(node, n_layers, effects.get(node.node_id, 0.0), places) for node in shown)
    ids = {node.node_id: part.id for node, part in zip(shown, parts, strict=True)}
    into: dict[str, float] = {}
    for link in file.links:
        into[link.target] = into.get(link.target, 0.0) + abs(link.weight)
    links = []
    for link in file.links:
        if link.target in ids and link.source in ids:
            reach = 1.0 if target and link.target == target.node_id else abs(effects.get(link.target, 0.0))
            share = abs(link.weight) / into[link.target] if into[link.target] else 0.0
            links.append(Link(ids[link.source], ids[link.target], link.weight, share * reach))
    label = target.clerp if target else "nothing"
    return Drawing(
        title=f"{label} after “{file.metadata.prompt}”",
        columns=places,
        across="token",
        n_layers=n_layers,
        parts=parts,
        links=tuple(links),
        effect="effect on the most probable logit over the paths in the file, in logits",
        link_effect=DIRECT,
        notes=(
            FROZEN,
            f"From a graph file of {file.metadata.scan}.",
            *([f"Of {len(logits)} targets, this is the graph of the most probable."] if len(logits) > 1 else []),
        ),
    )


def _edges(graph: AttributionGraph, chosen: Tensor) -> Iterator[tuple[int, int, float, float]]:
    """Row, column and weight of each chosen edge, and the share of influence that runs along it."""
    at, source = chosen.nonzero(as_tuple=True)
    weight = graph.weights[at, source]
    sums = torch.stack([row.abs().sum(dtype=torch.float64) for row in graph.weights]).clamp_min(1e-10)
    mass = torch.cat([graph.influence[: graph.n_latents], graph.logit_weights.double()])
    share = weight.abs() / sums[at] * mass[at]
    yield from zip(at.tolist(), source.tolist(), weight.tolist(), share.tolist(), strict=True)


def _file_effects(file: GraphFile, target: str) -> dict[str, float]:
    """Signed effect of each node on ``target`` along all paths: a link's weight over the activation of its target is
    how much of the target it makes."""
    incoming: dict[str, list[tuple[str, float]]] = {}
    for link in file.links:
        incoming.setdefault(link.target, []).append((link.source, link.weight))
    by_id = {node.node_id: node for node in file.nodes}

    def depth(name: str) -> int:
        layer = by_id[name].layer
        return int(layer) if layer.isdigit() else -1

    found = dict.fromkeys(by_id, 0.0)
    for source, weight in incoming.get(target, ()):
        found[source] += weight
    for name in sorted((n for n in by_id if by_id[n].feature_type == LATENT), key=depth, reverse=True):
        activation = by_id[name].activation
        if activation:
            for source, weight in incoming.get(name, ()):
                if depth(source) < depth(name):
                    found[source] += found[name] * weight / activation
    return found


def _file_part(node: GraphNode, n_layers: int, effect: float, places: tuple[str, ...]) -> Part:
    place = min(max(node.ctx_idx, 0), max(len(places) - 1, 0))
    if node.feature_type == LOGIT:
        return Part("target", node.clerp, "logit", n_layers, place, effect)
    if node.feature_type == TOKEN:
        return Part(node.node_id, node.clerp or "token", "token", -1, place, effect, about=(_at(places, place),))
    if node.feature_type == ERROR:
        layer, place = error_place(node)
        return _error(min(layer, n_layers - 1), min(place, max(len(places) - 1, 0)), effect, places)
    layer = min(int(node.layer), n_layers - 1) if node.layer.isdigit() else 0
    about = (_at(places, place),)
    if node.activation is not None:
        about = (f"activation: {node.activation:.3g}", *about)
    kind: Kind = "latent" if node.feature_type in (LATENT, "lorsa") else "error"
    name = node.node_id.split("_")[1] if node.node_id.count("_") == 2 else node.node_id
    q = (node.model_extra or {}).get("q")
    return Part(
        id=node.node_id,
        name=f"latent {name} of layer {layer}"
        if node.feature_type == LATENT
        else f"{node.feature_type} {node.node_id}",
        kind=kind,
        layer=layer,
        column=place,
        effect=effect,
        rule=node.clerp,
        q=float(q) if isinstance(q, int | float) else None,
        about=about,
    )


def _latent(
    layer: int, latent: int, place: int, effect: float, about: tuple[str, ...], rule: str, q: float | None
) -> Part:
    name = f"latent {latent} of layer {layer}"
    return Part(f"{layer}_{latent}_{place}", name, "latent", layer, place, effect, rule=rule, q=q, about=about)


def _error(layer: int, place: int, effect: float, places: tuple[str, ...]) -> Part:
    about = (_at(places, place), "what the dictionary of this layer does not capture")
    return Part(f"{layer}_-1_{place}", f"error of layer {layer}", "error", layer, place, effect, about=about)


def _token(token: int, place: int, effect: float, places: tuple[str, ...]) -> Part:
    return Part(
        f"E_{token}_{place}", f"token “{places[place]}”", "token", -1, place, effect, about=(_at(places, place),)
    )


def _at(places: tuple[str, ...], place: int) -> str:
    return f"at “{places[place]}” (position {place})" if place < len(places) else f"position {place}"


def _column_id(graph: AttributionGraph, s: int) -> str:
    n, m = graph.n_latents, len(graph.errors)
    if s < n:
        layer, place, latent = graph.latents[s].tolist()
        return f"{layer}_{latent}_{place}"
    if s < n + m:
        layer, place = graph.errors[s - n].tolist()
        return f"{layer}_-1_{place}"
    token, place = graph.tokens[s - n - m].tolist()
    return f"E_{token}_{place}"
