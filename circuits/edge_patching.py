"""Running a model on a circuit's edges only: the ground truth that scores of edges are measured against.

Every destination reads the stream as it would be if the edges outside the circuit carried something else:

    in_v = Σ_{u in circuit} a_u(this run) + Σ_{u outside} other_u

with ``other`` the sources' values on the counterfactual prompts (interchange, as in ACDC and MIB), their means, or 0.
With every edge in the circuit it is the model; with none, each destination sees only ``other``.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from heredity.interp.model import Edit, Model

from .layout import NodeLayout
from .pairs import Metric, Pairs
from .reads import KINDS, norm, projection, read_sites
from .writes import ENTRY, head_writes, mlp_write

Ablation = Literal["counterfactual", "mean", "zero"]
GROUP_TOKENS = 128
"""Padded tokens run at once; memory for what edges carry is sources · tokens · d_model floats."""


def written(model: Model, layout: NodeLayout, tokens: Tensor) -> Tensor:
    """What each source writes on ``tokens`` [batch, pos]: [sources, batch, pos, d_model]."""
    layers = range(layout.n_layers)
    with torch.inference_mode():
        sites = [ENTRY, *(f"{kind}@{layer}" for layer in layers for kind in ("attn_z", "mlp_out"))]
        seen = model.capture(tokens, sites)
        out = seen[ENTRY].new_empty(len(layout.sources), *seen[ENTRY].shape)
        out[0] = seen[ENTRY]
        for layer in layers:
            block = out[layout.written_by(layer)]
            block[:-1] = head_writes(model, layer, seen[f"attn_z@{layer}"], range(layout.n_heads)).permute(2, 0, 1, 3)
            block[-1] = mlp_write(model, layer, seen[f"mlp_out@{layer}"])
    return out


def mean_written(model: Model, layout: NodeLayout, pairs: Pairs) -> Tensor:
    """Mean of what each source writes over the real tokens of the counterfactual prompts, [sources, 1, 1, d_model]."""
    total, count = torch.zeros(len(layout.sources), layout.d_model, dtype=torch.float64), 0
    for rows in pairs.groups(GROUP_TOKENS):
        group = pairs.of(rows)
        real = torch.arange(group.corrupt.shape[1])[None] <= group.last[:, None]
        total += written(model, layout, group.corrupt)[:, real].double().sum(1)
        count += int(real.sum())
    return (total / count).float()[:, None, None]


def run_circuit(model: Model, layout: NodeLayout, tokens: Tensor, circuit: Tensor, other: Tensor) -> Tensor:
    """Logits [batch, pos, d_vocab] on ``tokens`` with edges outside ``circuit`` carrying ``other``.

    Args:
        model: the model.
        layout: its layout.
        tokens: int64 [batch, pos].
        circuit: bool [sources, destinations], or one per row [batch, sources, destinations].
        other: [sources, batch, pos, d_model], or what broadcasts to it.
    """
    run = _Run(model, layout, circuit, other, tuple(tokens.shape))
    with torch.inference_mode():
        return model.logits(tokens, edits=run.edits())


def measure(
    model: Model,
    layout: NodeLayout,
    pairs: Pairs,
    metric: Metric,
    circuit: Tensor,
    *,
    ablation: Ablation = "counterfactual",
    means: Tensor | None = None,
) -> Tensor:
    """The metric of each pair's clean prompt with only the edges of ``circuit`` [sources, destinations], float64 [N].

    Args:
        model, layout, pairs, metric, circuit: as elsewhere.
        ablation: what the other edges carry.
        means: of :func:`mean_written`, computed here if absent and needed.
    """
    if ablation == "mean" and means is None:
        means = mean_written(model, layout, pairs)
    out = torch.zeros(len(pairs), dtype=torch.float64)
    for rows in pairs.groups(GROUP_TOKENS):
        group = pairs.of(rows)
        if ablation == "counterfactual":
            other = written(model, layout, group.corrupt)
        else:
            other = torch.zeros(len(layout.sources), 1, 1, layout.d_model) if means is None else means
        out[rows] = metric(run_circuit(model, layout, group.clean, circuit, other), rows).double()
    return out


def patch_edges(model: Model, layout: NodeLayout, pairs: Pairs, metric: Metric, edges: list[tuple[int, int]]) -> Tensor:
    """What each edge really carries: m(x) − m(x with the edge carrying its value on x′), float64 [edges, N].

    Positive supports the behaviour, as in :mod:`.edges`. One row of a forward per edge and pair.
    """
    found = torch.zeros(len(edges), len(pairs), dtype=torch.float64)
    for rows in pairs.groups(GROUP_TOKENS):
        group = pairs.of(rows)
        other = written(model, layout, group.corrupt)
        with torch.inference_mode():
            base = metric(model.logits(group.clean), rows).double()
        for which in _chunks(len(edges), max(1, GROUP_TOKENS // group.clean.numel())):
            circuit = torch.ones(len(which), 1, *layout.edges.shape, dtype=torch.bool)
            for i, k in enumerate(which):
                circuit[i, 0, edges[k][0], edges[k][1]] = False
            circuit = circuit.expand(-1, len(group), -1, -1).flatten(0, 1)
            logits = run_circuit(
                model, layout, group.clean.repeat(len(which), 1), circuit, other.repeat(1, len(which), 1, 1)
            )
            values = metric(logits, rows.repeat(len(which))).double().unflatten(0, (len(which), len(group)))
            for i, k in enumerate(which):
                found[k, rows] = base - values[i]
    return found


def _chunks(n: int, size: int) -> Iterator[range]:
    for first in range(0, n, size):
        yield range(first, min(n, first + size))


class _Run:
    """The edits of one forward, and what sources have written so far in it."""

    def __init__(
        self, model: Model, layout: NodeLayout, circuit: Tensor, other: Tensor, shape: tuple[int, ...]
    ) -> None:
        self.model, self.layout, self.other = model, layout, other
        self.outside = (~circuit).float()
        self.difference = torch.zeros(len(layout.sources), *shape, layout.d_model)
        self.streams: dict[str, Tensor] = {}
        self.layer_inputs: Tensor | None = None

    def edits(self) -> dict[str, Edit]:
        """One edit per site that a source writes or a destination reads at."""
        places = read_sites(self.model, self.layout.parallel)
        edits: dict[str, Edit] = {site: self._watch(site) for site in dict.fromkeys(places.values())}
        for layer in range(self.layout.n_layers):
            for kind in KINDS:
                edits[f"attn_{kind}@{layer}"] = self._project(layer, kind, places[f"attn@{layer}"])
            edits[f"attn_z@{layer}"] = self._heads(layer)
            edits[f"mlp_in@{layer}"] = self._mlp_in(layer, places[f"mlp@{layer}"])
            edits[f"mlp_out@{layer}"] = self._mlp_out(layer)
        edits["final"] = lambda stream: stream + self._outside(slice(len(self.layout.destinations) - 1, None))[0]
        return edits

    def _watch(self, site: str) -> Edit:
        def edit(stream: Tensor) -> Tensor:
            if site == ENTRY:
                self._wrote(slice(0, 1), stream[None])
            self.streams[site] = stream
            return stream

        return edit

    def _project(self, layer: int, kind: str, site: str) -> Edit:
        def edit(value: Tensor) -> Tensor:
            columns = self.layout.read_by_attention(layer)
            first = {"q": 0, "k": self.layout.n_heads, "v": self.layout.n_heads + self.layout.n_kv_heads}[kind]
            own = slice(columns.start + first, columns.start + first + value.shape[2])
            inputs = self.streams[site] + self._outside(own)
            p = projection(self.model, layer, kind)
            normed = norm(self.model, layer, "attn")(inputs)
            return torch.einsum("hbpm,hmd->bphd", normed, p.weight) + p.bias

        return edit

    def _heads(self, layer: int) -> Edit:
        def edit(z: Tensor) -> Tensor:
            writes = head_writes(self.model, layer, z, range(self.layout.n_heads)).permute(2, 0, 1, 3)
            rows = self.layout.written_by(layer)
            self._wrote(slice(rows.start, rows.stop - 1), writes)
            return z

        return edit

    def _mlp_in(self, layer: int, site: str) -> Edit:
        def edit(value: Tensor) -> Tensor:
            column = self.layout.read_by_mlp(layer)
            stream = self.streams[site] + self._outside(slice(column, column + 1))[0]
            return norm(self.model, layer, "mlp")(stream).to(value.dtype)

        return edit

    def _mlp_out(self, layer: int) -> Edit:
        def edit(out: Tensor) -> Tensor:
            rows = self.layout.written_by(layer)
            self._wrote(slice(rows.stop - 1, rows.stop), mlp_write(self.model, layer, out)[None])
            return out

        return edit

    def _wrote(self, rows: slice, value: Tensor) -> None:
        self.difference[rows] = self.other[rows] - value

    def _outside(self, columns: slice) -> Tensor:
        """What edges outside the circuit change at some destinations, [destinations, batch, pos, d_model]."""
        before = int(self.layout.reach[columns].max())
        outside = self.outside[..., :before, columns]
        letters = "bsv,sbpm->vbpm" if outside.ndim == 3 else "sv,sbpm->vbpm"
        return torch.einsum(letters, outside, self.difference[:before])
