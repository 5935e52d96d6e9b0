"""Running a model on a circuit's edges only: the ground truth that scores of edges are measured against.

Every destination reads the stream as it would be if the edges outside the circuit carried something else:

    in_v = Σ_{u in circuit} a_u(this run) + Σ_{u outside} other_u

with ``other`` the sources' values on the counterfactual prompts (interchange, as in ACDC and MIB), their means, or 0.
With every edge in the circuit it is the model; with none, each destination sees only ``other``.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from heredity.interp.model import Edit, Model

from .layout import NodeLayout
from .pairs import Metric, Pairs
from .prefix import Batch
from .reads import KINDS, check_reads, norm, projection, read_sites
from .writes import ENTRY, both, check_additive, head_writes, mlp_write, stream_scale

Ablation = Literal["counterfactual", "mean", "zero"]
GROUP_TOKENS = 256
"""Padded tokens run at once; memory for what edges carry is sources · tokens · d_model floats."""
KEPT_BYTES = 2**29
"""Memory for what edges outside a circuit carry, kept from one circuit to the next."""


def written(model: Model, layout: NodeLayout, tokens: Tensor, batch: Batch | None = None) -> Tensor:
    """What each source adds to the stream on ``tokens`` [batch, pos]: [sources, batch, pos, d_model].

    Args:
        model, layout: as elsewhere.
        tokens: int64 [batch, pos].
        batch: whose beginning goes before ``tokens``, if any.
    """
    layers, scale = range(layout.n_layers), stream_scale(model)
    with torch.inference_mode():
        sites = [ENTRY, *(f"{kind}@{layer}" for layer in layers for kind in ("attn_z", "mlp_out"))]
        seen = model.capture(tokens, sites) if batch is None else batch.capture(tokens, sites)
        out = seen[ENTRY].new_empty(len(layout.sources), *seen[ENTRY].shape)
        out[0] = seen[ENTRY]
        for layer in layers:
            block = out[layout.written_by(layer)]
            heads = head_writes(model, layer, seen[f"attn_z@{layer}"], range(layout.n_heads))
            block[:-1] = scale * heads.permute(2, 0, 1, 3)
            block[-1] = scale * mlp_write(model, layer, seen[f"mlp_out@{layer}"])
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


class CircuitRunner:
    """Measures circuits on the same pairs, one after the other.

    Args:
        model, layout, pairs, metric: as elsewhere.
        ablation: what edges outside a circuit carry. Of "counterfactual", as much as ``KEPT_BYTES`` holds is computed
            once for all circuits.

    Raises:
        ModelError: the architecture's edges cannot be told apart.
    """

    def __init__(
        self, model: Model, layout: NodeLayout, pairs: Pairs, metric: Metric, ablation: Ablation = "counterfactual"
    ) -> None:
        check_additive(model)
        check_reads(model, layout.parallel)
        self.model, self.layout, self.pairs, self.metric = model, layout, pairs, metric
        self.ablation: Ablation = ablation
        share = ablation == "counterfactual"
        self._batches = [Batch(model, pairs, rows, share=share) for rows in pairs.groups(GROUP_TOKENS, share=share)]
        self._kept: dict[int, Tensor] = {}
        self._other: Tensor | None = None
        if ablation == "mean":
            self._other = mean_written(model, layout, pairs)
        elif ablation == "zero":
            self._other = torch.zeros(len(layout.sources), 1, 1, layout.d_model)

    def __call__(self, circuit: Tensor) -> Tensor:
        """The metric of each pair's clean prompt with only the edges of ``circuit`` [sources, destinations], float64
        [N]."""
        out = torch.zeros(len(self.pairs), dtype=torch.float64)
        for i, batch in enumerate(self._batches):
            tokens = batch.pairs.clean
            run = _Run(self.model, self.layout, circuit, self._carried(i), tuple(tokens.shape))
            with torch.inference_mode():
                out[batch.rows] = batch.value(self.metric, tokens, run.edits()).double()
        return out

    def _carried(self, i: int) -> Tensor:
        if self._other is not None:
            return self._other
        if i in self._kept:
            return self._kept[i]
        batch = self._batches[i]
        other = written(self.model, self.layout, batch.pairs.corrupt, batch)
        if sum(kept.nbytes for kept in self._kept.values()) + other.nbytes <= KEPT_BYTES:
            self._kept[i] = other
        return other


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
) -> Tensor:
    """The metric of each pair's clean prompt with only the edges of ``circuit`` [sources, destinations], float64 [N].

    :class:`CircuitRunner` is quicker for several circuits.
    """
    return CircuitRunner(model, layout, pairs, metric, ablation)(circuit)


def patch_edges(
    model: Model, layout: NodeLayout, pairs: Pairs, metric: Metric, edges: Sequence[tuple[int, int]]
) -> Tensor:
    """What each edge really carries: m(x) − m(x with the edge carrying its value on x′), float64 [edges, N].

    Positive supports the behaviour, as in :mod:`.edges`. One row of a forward per edge and pair.

    Args:
        model, layout, pairs, metric: as elsewhere.
        edges: (row of ``layout.sources``, column of ``layout.destinations``).

    Raises:
        ModelError: the architecture's edges cannot be told apart.
    """
    check_additive(model)
    check_reads(model, layout.parallel)
    found = torch.zeros(len(edges), len(pairs), dtype=torch.float64)
    for rows in pairs.groups(GROUP_TOKENS // 2, share=True):
        batch = Batch(model, pairs, rows)
        clean = batch.pairs.clean
        change = written(model, layout, batch.pairs.corrupt, batch) - written(model, layout, clean, batch)
        with torch.inference_mode():
            base = batch.value(metric, clean).double()
            size = max(1, 2 * GROUP_TOKENS // clean.numel())
            for first in range(0, len(edges), size):
                some = edges[first : first + size]
                values = batch.value(metric, clean.repeat(len(some), 1), _exchanges(model, layout, some, change))
                found[first : first + len(some), rows] = base - values.double().unflatten(0, (len(some), len(rows)))
    return found


def _exchanges(model: Model, layout: NodeLayout, edges: Sequence[tuple[int, int]], change: Tensor) -> dict[str, Edit]:
    """Edits that add ``change`` of the source of ``edges[i]`` to what its destination reads, in the i-th copy."""
    n = change.shape[1]
    places = read_sites(model, layout.parallel)
    edits: dict[str, Edit] = {}
    streams: dict[str, Tensor] = {}

    def watch(site: str) -> Edit:
        def edit(stream: Tensor) -> Tensor:
            streams[site] = stream
            return stream

        return edit

    def head(part: slice, row: int, site: str, layer: int, kind: str, head: int) -> Edit:
        def edit(value: Tensor) -> Tensor:
            value = value.clone()
            before = streams[site][part]
            ln = norm(model, layer, "attn")
            weight = projection(model, layer, kind).weight[head]
            value[part, :, head] += (ln(before + change[row]) - ln(before)) @ weight
            return value

        return edit

    def mlp(part: slice, row: int, site: str, layer: int) -> Edit:
        def edit(value: Tensor) -> Tensor:
            value = value.clone()
            value[part] = norm(model, layer, "mlp")(streams[site][part] + change[row])
            return value

        return edit

    def final(part: slice, row: int) -> Edit:
        def edit(stream: Tensor) -> Tensor:
            stream = stream.clone()
            stream[part] += change[row]
            return stream

        return edit

    for i, (row, column) in enumerate(edges):
        part = slice(i * n, (i + 1) * n)
        kind, _, place = layout.destinations[column].partition("@")
        if not place:
            site, own = "final", final(part, row)
        else:
            layer, _, number = place.partition(".")
            stream = places[f"{'mlp' if kind == 'mlp_in' else 'attn'}@{layer}"]
            edits.setdefault(stream, watch(stream))
            if kind == "mlp_in":
                site, own = f"mlp_in@{layer}", mlp(part, row, stream, int(layer))
            else:
                letter = kind.removeprefix("attn_")
                site, own = f"{kind}@{layer}", head(part, row, stream, int(layer), letter, int(number))
        edits[site] = both(edits[site], own) if site in edits else own
    return edits


class _Run:
    """The edits of one forward, and what sources have written so far in it."""

    def __init__(
        self, model: Model, layout: NodeLayout, circuit: Tensor, other: Tensor, shape: tuple[int, ...]
    ) -> None:
        self.model, self.layout, self.other = model, layout, other
        self.scale = stream_scale(model)
        self.circuit = circuit
        self.difference = other.new_zeros(len(layout.sources), *shape, layout.d_model)
        self.others, self.counted = other.new_zeros(*shape, layout.d_model), 0
        self.attention: tuple[int, Tensor] | None = None
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
        last = len(self.layout.destinations) - 1
        edits["final"] = lambda stream: self._inputs(stream, slice(last, last + 1))[0]
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
            if self.attention is None or self.attention[0] != layer:
                inputs = self._inputs(self.streams[site], self.layout.read_by_attention(layer))
                self.attention = layer, norm(self.model, layer, "attn")(inputs)
            first = {"q": 0, "k": self.layout.n_heads, "v": self.layout.n_heads + self.layout.n_kv_heads}[kind]
            p = projection(self.model, layer, kind)
            normed = self.attention[1][first : first + value.shape[2]]
            return torch.einsum("hbpm,hmd->bphd", normed, p.weight) + p.bias

        return edit

    def _heads(self, layer: int) -> Edit:
        def edit(z: Tensor) -> Tensor:
            writes = head_writes(self.model, layer, z, range(self.layout.n_heads)).permute(2, 0, 1, 3)
            rows = self.layout.written_by(layer)
            self._wrote(slice(rows.start, rows.stop - 1), self.scale * writes)
            return z

        return edit

    def _mlp_in(self, layer: int, site: str) -> Edit:
        def edit(value: Tensor) -> Tensor:
            column = self.layout.read_by_mlp(layer)
            stream = self._inputs(self.streams[site], slice(column, column + 1))[0]
            return norm(self.model, layer, "mlp")(stream).to(value.dtype)

        return edit

    def _mlp_out(self, layer: int) -> Edit:
        def edit(out: Tensor) -> Tensor:
            rows = self.layout.written_by(layer)
            self._wrote(slice(rows.stop - 1, rows.stop), self.scale * mlp_write(self.model, layer, out)[None])
            return out

        return edit

    def _wrote(self, rows: slice, value: Tensor) -> None:
        torch.sub(self.other[rows], value, out=self.difference[rows])

    def _inputs(self, stream: Tensor, columns: slice) -> Tensor:
        """What some destinations read, [destinations, batch, pos, d_model], where the stream is ``stream``."""
        before = int(self.layout.reach[columns].max())
        self.others = self.others + self.other[self.counted : before].sum(0)
        self.counted = before  # destinations come in order, so this only grows
        inside = self.circuit[..., :before, columns]
        if inside.ndim == 3:
            return stream + torch.einsum("bsv,sbpm->vbpm", (~inside).to(self.difference), self.difference[:before])
        # Reading what sources wrote is most of the work: of those inside and those outside, the fewer are read. Where
        # others carry constants it is those inside: a stream from which all is taken again leaves rounding errors, and
        # norms blow up what is nearly 0.
        rows_in, rows_out = inside.any(1), (~inside).any(1)
        if self.other.shape[1] == 1 or int(rows_in.sum()) < int(rows_out.sum()):
            return self.others - self._weighted(inside, rows_in)
        return stream + self._weighted(~inside, rows_out)

    def _weighted(self, chosen: Tensor, rows: Tensor) -> Tensor:
        difference = self.difference[: len(rows)]
        if not rows.all():
            chosen, difference = chosen[rows], difference[rows]
        return (chosen.to(difference).T @ difference.flatten(1)).unflatten(1, difference.shape[1:])
