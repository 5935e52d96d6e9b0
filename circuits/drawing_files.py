"""Circuits and attribution graphs on disk, of whatever kind, made ready to be drawn."""

import json
from pathlib import Path
from typing import Any

from heredity.interp.errors import GraphError

from .drawing import Drawing


def read_drawing(path: str | Path) -> Drawing | None:
    """What is at ``path`` as a drawing, None if it is no circuit or graph that is known here.

    Known are: a circuit that ``heredity circuit`` wrote, an attribution graph (a directory with ``graph.json``), a
    graph file of public viewers, a circuit of EAP-IG or MIB.

    Raises:
        GraphError: it is one of these, but damaged.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "graph.json").exists():
            return None
        from .attribution_graph_record import AttributionGraph
        from .drawing_graph import drawing_of_graph

        return drawing_of_graph(AttributionGraph.load(path))
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if isinstance(content, dict) and str(content.get("format", "")).startswith("heredity circuit "):
        from .circuit_record import load_circuit
        from .drawing_components import drawing_of_record

        return drawing_of_record(load_circuit(path))
    keys = set(content) if isinstance(content, dict) else set()
    if {"metadata", "nodes", "links"} <= keys:
        from .attribution_graph_json import read_graph_file
        from .drawing_graph import drawing_of_graph_file

        try:
            return drawing_of_graph_file(read_graph_file(path))
        except ValueError as fault:
            remedy = "Give an attribution graph as JSON (metadata, qParams, nodes, links)."
            raise GraphError(str(fault), where=str(path), remedy=remedy) from None
    if {"cfg", "nodes", "edges"} <= keys:
        from .drawing_components import drawing_of_edges
        from .eap_ig_json import read_eap_ig

        return drawing_of_edges(read_eap_ig(path), title=path.stem)
    return None
