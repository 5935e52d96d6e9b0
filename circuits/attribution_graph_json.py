"""Attribution graphs in the JSON that public viewers read (Neuronpedia, circuit-tracer's own page).

Ids: a latent is ``{layer}_{latent}_{position}``, a token ``E_{token}_{position}``, a logit
``{layers + 1}_{token}_{position}``, an error ``{layer}_-1_{position}``. Older files say ``0_{layer}_{position}`` for an
error, which is also the id of a latent of layer 0; both are read, the newer is written. ``influence`` is the share of
all influence that is reached once the node is taken in, most influential first.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from heredity.interp.errors import GraphError
from heredity.interp.store import replacing

from .attribution_graph_record import AttributionGraph, Explained

LATENT, ERROR, TOKEN, LOGIT = "cross layer transcoder", "mlp reconstruction error", "embedding", "logit"


class _Record(BaseModel):
    # Writers add keys of their own, which are kept.
    model_config = ConfigDict(frozen=True, extra="allow")


class GraphMetadata(_Record):
    """What the graph is of."""

    slug: str
    scan: str
    """Model and dictionaries, as the viewer knows them."""
    prompt_tokens: list[str]
    prompt: str
    schema_version: int | None = None
    """1: ``feature`` pairs layer and latent in one number (:func:`paired`)."""
    node_threshold: float | None = None


class QParams(_Record):
    """State of the viewer."""

    pinnedIds: list[str] = []
    supernodes: list[list[str]] = []
    linkType: str = "both"
    clickedId: str | None = ""
    sg_pos: str = ""


class GraphNode(_Record):
    """A node."""

    node_id: str
    feature: int | None
    layer: str
    ctx_idx: int
    """Position."""
    feature_type: Literal[
        "cross layer transcoder",
        "mlp reconstruction error",
        "embedding",
        "logit",
        "lorsa",
        "lorsa error",
        "bias",
    ]
    jsNodeId: str
    clerp: str
    """Label."""
    token_prob: float = 0.0
    is_target_logit: bool = False
    run_idx: int = 0
    reverse_ctx_idx: int = 0
    influence: float | None = None
    activation: float | None = None


class GraphLink(_Record):
    """A direct effect, signed."""

    source: str
    target: str
    weight: float


class GraphFile(_Record):
    """A whole file."""

    metadata: GraphMetadata
    qParams: QParams
    nodes: list[GraphNode]
    links: list[GraphLink]


def paired(layer: int, latent: int) -> int:
    """Layer and latent as one number (Cantor's pairing)."""
    return (layer + latent) * (layer + latent + 1) // 2 + latent


def error_place(node: GraphNode) -> tuple[int, int]:
    """(layer, position) of an error node, whichever way its id is written.

    Raises:
        ValueError: it is no error node.
    """
    parts = node.node_id.split("_")
    if node.feature_type == ERROR and len(parts) == 3:
        if parts[1] == "-1":
            return int(parts[0]), int(parts[2])
        if parts[0] == "0":
            return int(parts[1]), int(parts[2])
    raise ValueError(f"{node.node_id!r} is no error node")


def graph_file(
    graph: AttributionGraph,
    *,
    slug: str,
    scan: str,
    nodes: float = 0.8,
    edges: float = 0.98,
    explained: Mapping[tuple[int, int], Explained] | None = None,
) -> GraphFile:
    """The most influential part of ``graph`` as a file.

    Args:
        graph: the graph.
        slug: its name: letters, digits, ``.``, ``_`` and ``-``.
        scan: model and dictionaries, as the viewer knows them.
        nodes, edges: shares of influence kept (:func:`.influence.prune`).
        explained: rules of latents, which become their labels, and q beside them; the graph's own if None.

    Raises:
        ValueError: the slug could not be a file's name.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", slug):
        raise ValueError(f"{slug!r} is no slug: use letters, digits, '.', '_' and '-'")
    pruned = graph.prune(nodes=nodes, edges=edges)
    sources = _sources(graph, pruned.entered.tolist(), graph.explained if explained is None else explained)
    logits = _logits(graph)
    n, first_token = graph.n_latents, graph.weights.shape[1] - len(graph.tokens)
    rows, columns = pruned.edges.nonzero(as_tuple=True)
    ids = [node.node_id for node in sources]
    row_ids = [*ids[:n], *(node.node_id for node in logits)]
    links = [
        GraphLink(source=ids[column], target=row_ids[row], weight=weight)
        for row, column, weight in zip(
            rows.tolist(), columns.tolist(), graph.weights[rows, columns].tolist(), strict=True
        )
    ]
    kept = pruned.sources.clone()
    kept[first_token:] = True
    metadata = GraphMetadata(
        slug=slug,
        scan=scan,
        prompt_tokens=list(graph.places),
        prompt=graph.prompt,
        schema_version=1,
        node_threshold=nodes,
        **{
            "transcoder_list": [],
            "pruning_settings": {"node_threshold": nodes, "edge_threshold": edges},
            "info": {"generator": {"name": "heredity"}, "description": graph.kept.reason},
            "replacement_score": graph.scores.replacement,
            "completeness_score": graph.scores.completeness,
        },
    )
    shown = [node for node, is_kept in zip(sources, kept.tolist(), strict=True) if is_kept]
    return GraphFile(metadata=metadata, qParams=QParams(), nodes=[*shown, *logits], links=links)


def write_graph_file(file: GraphFile, directory: str | Path) -> Path:
    """Write ``{slug}.json``, and its entry in ``graph-metadata.json``, which lists all graphs of a directory.

    Raises:
        StoreError: they cannot be written.
    """
    directory = Path(directory)
    path, listing = directory / f"{file.metadata.slug}.json", directory / "graph-metadata.json"
    with replacing(path) as partial:
        partial.write_text(file.model_dump_json(), encoding="utf-8")
    own = file.metadata.model_dump()
    try:
        known = json.loads(listing.read_text(encoding="utf-8"))["graphs"]
        others = [entry for entry in known if entry.get("slug") != file.metadata.slug]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        others = []
    with replacing(listing) as partial:
        partial.write_text(json.dumps({"graphs": [*others, own]}, ensure_ascii=False), encoding="utf-8")
    return path


def read_graph_file(path: str | Path) -> GraphFile:
    """Read anyone's graph file, checked.

    Raises:
        GraphError: it is no such file, or a link leads to no node.
    """
    remedy = "Give an attribution graph as JSON (metadata, qParams, nodes, links)."
    try:
        file = GraphFile.model_validate_json(Path(path).read_bytes())
    except OSError as fault:
        raise GraphError(f"it cannot be read ({fault.strerror})", where=str(path), remedy=remedy) from None
    except ValidationError as fault:
        first = fault.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise GraphError(f"{field}: {first['msg']}", where=str(path), remedy=remedy) from None
    ids = {node.node_id for node in file.nodes}
    loose = [end for link in file.links for end in (link.source, link.target) if end not in ids]
    if loose:
        raise GraphError(f"a link leads to {loose[0]!r}, which is no node", where=str(path), remedy=remedy)
    return file


def _sources(
    graph: AttributionGraph, entered: list[float], explained: Mapping[tuple[int, int], Explained]
) -> list[GraphNode]:
    n, m = graph.n_latents, len(graph.errors)
    found = [
        GraphNode(
            node_id=f"{layer}_{latent}_{place}",
            feature=paired(layer, latent),
            layer=str(layer),
            ctx_idx=place,
            feature_type=LATENT,
            jsNodeId=f"{layer}_{latent}-0",
            clerp=known.rule,
            influence=share,
            activation=value,
            **_q(known),
        )
        for (layer, place, latent), value, share in zip(
            graph.latents.tolist(), graph.activations.tolist(), entered[:n], strict=True
        )
        for known in [explained.get((layer, latent), Explained(""))]
    ]
    found += [
        GraphNode(
            node_id=f"{layer}_-1_{place}",
            feature=-1,
            layer=str(layer),
            ctx_idx=place,
            feature_type=ERROR,
            jsNodeId=f"{layer}_-1-{place}",
            clerp=f"Err: layer {layer}",
            influence=share,
        )
        for (layer, place), share in zip(graph.errors.tolist(), entered[n : n + m], strict=True)
    ]
    for (token, place), share in zip(graph.tokens.tolist(), entered[n + m :], strict=True):
        found.append(
            GraphNode(
                node_id=f"E_{token}_{place}",
                feature=place,
                layer="E",
                ctx_idx=place,
                feature_type=TOKEN,
                jsNodeId=f"E_{token}-{place}",
                clerp=f'Emb: "{graph.places[place]}"',
                influence=share,
            )
        )
    return found


def _q(known: Explained) -> dict[str, Any]:
    """A key that viewers do not know and pass over."""
    return {} if known.q is None else {"q": known.q}


def _logits(graph: AttributionGraph) -> list[GraphNode]:
    layer, place = str(graph.n_layers + 1), len(graph.places) - 1
    found = []
    for i, (label, token) in enumerate(zip(graph.logits, graph.logit_tokens, strict=True)):
        # What is no single logit gets an id behind the vocabulary, as in circuit-tracer.
        number = token if token >= 0 else int(graph.provenance.get("vocabulary", 0)) + i
        p = float(graph.logit_weights[i])
        found.append(
            GraphNode(
                node_id=f"{layer}_{number}_{place}",
                feature=number,
                layer=layer,
                ctx_idx=place,
                feature_type=LOGIT,
                jsNodeId=f"L_{number}-{place}",
                clerp=f'Output "{label}" (p={p:.3f})',
                token_prob=p,
                is_target_logit=i == 0,
            )
        )
    return found
