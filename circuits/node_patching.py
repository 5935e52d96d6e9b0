"""What sources really carry: each, or a set of them, exchanged in a run of its own, many runs at once."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from heredity.interp.model import Edit, Model

from .edge_patching import GROUP_TOKENS, written
from .layout import NodeLayout
from .pairs import Metric, Pairs
from .prefix import Batch
from .writes import ENTRY, both, check_additive, head_writes, mlp_write, stream_scale, write_site

PASS_TOKENS = 512
"""Padded tokens in one forward."""


def patch_nodes(
    model: Model, layout: NodeLayout, pairs: Pairs, metric: Metric, nodes: Sequence[int] | None = None
) -> Tensor:
    """m(x) − m(x with a source writing what it writes on x′), float64 [nodes, N].

    The indirect effect by noising, with the sign of :mod:`.edges`: positive supports the behaviour.

    Args:
        model, layout, pairs, metric: as elsewhere.
        nodes: rows of ``layout.sources``; all if None.

    Raises:
        ModelError: the architecture's parts cannot be exchanged one by one.
    """
    chosen = range(len(layout.sources)) if nodes is None else nodes
    return patch_sets(model, layout, pairs, metric, [(node,) for node in chosen])


def patch_sets(
    model: Model, layout: NodeLayout, pairs: Pairs, metric: Metric, sets: Sequence[Collection[int]]
) -> Tensor:
    """m(x) − m(x with all sources of a set writing what they write on x′), float64 [sets, N].

    Args:
        model, layout, pairs, metric: as elsewhere.
        sets: rows of ``layout.sources``.

    Raises:
        ModelError: the architecture's parts cannot be exchanged one by one.
    """
    check_additive(model)
    found = torch.zeros(len(sets), len(pairs), dtype=torch.float64)
    for rows in pairs.groups(GROUP_TOKENS, share=True):
        batch = Batch(model, pairs, rows)
        clean = batch.pairs.clean
        other = written(model, layout, batch.pairs.corrupt, batch)
        with torch.inference_mode():
            base = batch.value(metric, clean).double()
            per_pass = max(1, PASS_TOKENS // clean.numel())
            for first in range(0, len(sets), per_pass):
                some = sets[first : first + per_pass]
                values = batch.value(metric, clean.repeat(len(some), 1), _edits(model, layout, some, other))
                found[first : first + len(some), rows] = base - values.double().unflatten(0, (len(some), len(rows)))
    return found


def _edits(model: Model, layout: NodeLayout, sets: Sequence[Collection[int]], other: Tensor) -> dict[str, Edit]:
    """Exchange the nodes of ``sets[i]`` in the i-th of as many copies of the batch."""
    n, scale = other.shape[1], stream_scale(model)
    nodes = [(copy, node) for copy, some in enumerate(sets) for node in some]
    edits: dict[str, Edit] = {}
    z: dict[int, Tensor] = {}
    out: dict[int, Tensor] = {}

    def keep(store: dict[int, Tensor], layer: int) -> Edit:
        def edit(value: Tensor) -> Tensor:
            store[layer] = value
            return value

        return edit

    def exchange(copies: list[tuple[int, int]], own) -> Edit:
        def edit(stream: Tensor) -> Tensor:
            stream = stream.clone()
            for copy, node in copies:
                part = slice(copy * n, (copy + 1) * n)
                stream[part] += other[node] / scale - own(node, part)
            return stream

        return edit

    entries = [copy for copy, node in nodes if node == 0]
    if entries:

        def exchange_entry(value: Tensor) -> Tensor:
            value = value.clone()
            for copy in entries:
                value[copy * n : (copy + 1) * n] = other[0]
            return value

        edits[ENTRY] = exchange_entry
    for layer in range(layout.n_layers):
        rows = layout.written_by(layer)
        heads = [(copy, node) for copy, node in nodes if rows.start <= node < rows.stop - 1]
        mlps = [(copy, node) for copy, node in nodes if node == rows.stop - 1]
        if heads:
            edits[f"attn_z@{layer}"] = keep(z, layer)

            def head(node: int, part: slice, layer: int = layer, first: int = rows.start) -> Tensor:
                return head_writes(model, layer, z[layer][part], [node - first])[:, :, 0]

            _then(edits, write_site(model, layer, "head"), exchange(heads, head))
        if mlps:

            def mlp(node: int, part: slice, layer: int = layer) -> Tensor:
                return mlp_write(model, layer, out[layer][part])

            _then(edits, f"mlp_out@{layer}", keep(out, layer))
            _then(edits, write_site(model, layer, "mlp"), exchange(mlps, mlp))
    return edits


def _then(edits: dict[str, Edit], site: str, edit: Edit) -> None:
    edits[site] = both(edits[site], edit) if site in edits else edit
