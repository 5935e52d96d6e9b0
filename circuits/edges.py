"""How much of a behaviour each edge carries, by gradients: edge attribution patching and its integrated form.

For clean prompts x, counterfactual prompts x′ and a metric m, an edge from source u to destination v carries

    score(u→v) = mean over pairs of Σ_positions ( a_u(x) − a_u(x′) ) · ∂m/∂in_v

**Sign.** Positive means that the edge supports the behaviour: exchanging what it carries for what it carries on x′ is
expected to lower m by that much. Over all edges out of the embedding the scores of integrated gradients add up to
m(x) − m(x′) (completeness, Sundararajan et al. 1703.01365); how far they miss is reported, and the number of steps is
doubled until they miss by less than a tolerance.

Where the gradient is taken: at x (EAP, Syed et al. 2310.10348), at both ends ("clean-corrupted"), or averaged over
embeddings on the straight line between x′ and x (EAP-IG, Hanna et al. 2403.17806). Half-way the norm turns from one
token's direction to the other's, and there a gradient is many times what it is elsewhere: points are those of Gauss's
rule, moved towards the middle by a change of variable, and far fewer are needed than in equal steps.

What makes it quick: the gradient at a head's input is computed from that at its query, key or value, which is small;
all steps of a batch go through the model in one forward; differences are contracted with the steps' mean gradient;
nothing is computed for tokens that stand before the first in which a pair's prompts differ (:mod:`.prefix`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from heredity.interp.model import Edit, Model

from .layout import NodeLayout, layout_of
from .pairs import Metric, Pairs
from .prefix import Batch
from .reads import KINDS, check_reads, norm, projection, read_sites, through_norm
from .writes import ENTRY, both, check_additive, head_writes, mlp_write, stream_scale

Method = Literal["eap", "clean-corrupted", "eap-ig"]
PASS_TOKENS = 512
"""Padded tokens in one forward and backward."""
GROUP_TOKENS = 128
"""Tokens of pairs whose differences are held at once; memory for them is sources · tokens · d_model floats."""
STEPS = (5, 8, 12, 18, 27, 40, 60, 90, 135)
"""Numbers of gradients tried until completeness holds."""
PROBED = 4
"""Pairs on which they are tried first, at the input cut alone."""
PER_PAIR_BYTES = 2**30
"""Memory for scores that are kept by pair; pairs are added up into fewer groups where they need more."""
_MIDDLE = 0.35
"""Density of points half-way is 1 over this; 1 would be Gauss's rule."""


@dataclass(frozen=True)
class EdgeScores:
    """Scores of every edge, and how far they can be trusted.

    Attributes:
        layout: names of rows and columns.
        scores: float64 [sources, destinations], mean over pairs, in units of the metric; 0 where there is no edge.
        clean, corrupt: the metric at both ends, float64 [N].
        method: how the gradient was taken.
        steps: gradients per pair.
        input_cut: Σ of the scores out of the embedding, float64 [N].
        parts: sums of scores over groups of pairs, float32 [groups, sources, destinations], with as many groups as
            pairs where memory allows; None if not asked for.
        places: what each source carries at each position of the first pair, float64 [sources, pos].
    """

    layout: NodeLayout
    scores: Tensor
    clean: Tensor
    corrupt: Tensor
    method: str
    steps: int
    input_cut: Tensor
    parts: Tensor | None = None
    places: Tensor | None = None

    @property
    def completeness(self) -> float:
        """|Σ over the input cut − (m(x) − m(x′))| as a share of the latter, over all pairs; infinite if that is 0."""
        total = float((self.clean - self.corrupt).sum())
        return abs(float(self.input_cut.sum()) - total) / abs(total) if total else float("inf")

    def nodes(self) -> Tensor:
        """What each source carries over all its edges, float64 [sources]."""
        return self.scores.sum(1)


def attribute_edges(
    model: Model,
    pairs: Pairs,
    metric: Metric,
    *,
    method: Method = "eap-ig",
    steps: int | None = None,
    tolerance: float = 0.02,
    parts: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> EdgeScores:
    """Scores of all edges of ``model`` on ``pairs``.

    Args:
        model: the model.
        pairs: N prompts with their counterfactuals.
        metric: what is attributed.
        method: where gradients are taken.
        steps: gradients per pair for ``eap-ig``; as many as completeness within ``tolerance`` needs if None.
        tolerance: largest miss of the input cut, as a share of m(x) − m(x′).
        parts: keep scores by pair (for :mod:`.stability`).
        progress: called with groups of pairs done and in all, per number of steps tried.

    Raises:
        ModelError: the architecture's edges cannot be told apart.
    """
    layout = layout_of(model)
    check_additive(model)
    check_reads(model, layout.parallel)
    if method != "eap-ig" or steps is not None:
        return _run(model, layout, pairs, metric, path(method, steps or STEPS[0]), method, parts, progress)
    found = None
    for tried in STEPS:
        if tried != STEPS[-1] and not complete(model, pairs, metric, tried, tolerance):
            continue
        found = _run(model, layout, pairs, metric, path(method, tried), method, parts, progress)
        if found.completeness <= tolerance:
            break
    assert found is not None
    return found


def path(method: Method, steps: int) -> list[tuple[float, float]]:
    """(α, weight) of the gradients on the line x′ + α (x − x′); weights add up to 1.

    Raises:
        ValueError: no such method.
    """
    if method == "eap":
        return [(1.0, 1.0)]
    if method == "clean-corrupted":
        return [(0.0, 0.5), (1.0, 0.5)]
    if method == "eap-ig":
        at, weights = np.polynomial.legendre.leggauss(steps)
        moved = (1 - _MIDDLE) * at**3 + _MIDDLE * at
        weights = weights * (3 * (1 - _MIDDLE) * at**2 + _MIDDLE)
        # Exact for a constant whatever the number of points, as an average has to be.
        return list(zip(((moved + 1) / 2).tolist(), (weights / weights.sum()).tolist(), strict=True))
    raise ValueError(f"no such method: {method!r}")


def complete(model: Model, pairs: Pairs, metric: Metric, steps: int, tolerance: float) -> bool:
    """Whether ``steps`` gradients bring the input cut within ``tolerance`` of m(x) − m(x′) on a few pairs.

    Only gradients at the embedding are computed.
    """
    chosen = torch.linspace(0, len(pairs) - 1, min(PROBED, len(pairs))).round().long().unique()
    some = pairs.of(chosen)
    missed = total = 0.0
    for own in some.groups(PASS_TOKENS, share=True):
        batch = Batch(model, pairs, chosen[own])
        group, n = batch.pairs, len(own)
        with torch.inference_mode():
            values, seen = batch.value_and_capture(metric, torch.cat([group.clean, group.corrupt]), [ENTRY])
        clean, corrupt = seen[ENTRY][:n].clone(), seen[ENTRY][n:].clone()
        found = -(values[:n] - values[n:]).double()
        total += float(-found.sum())
        points = path("eap-ig", steps)
        per_pass = max(1, PASS_TOKENS // group.clean.numel())
        for first in range(0, steps, per_pass):
            here = points[first : first + per_pass]
            entry = torch.cat([corrupt + alpha * (clean - corrupt) for alpha, _ in here]).requires_grad_()
            with torch.enable_grad():
                metric_at = batch.value(metric, group.clean.repeat(len(here), 1), {ENTRY: lambda _, entry=entry: entry})
                (gradient,) = torch.autograd.grad(metric_at.sum(), entry)
            for (_, weight), own_gradient in zip(here, gradient.unflatten(0, (len(here), n)), strict=True):
                found += weight * ((clean - corrupt) * own_gradient).sum((1, 2)).double()
        missed += float(found.sum())
    return abs(missed) <= tolerance * abs(total)


def _run(
    model: Model,
    layout: NodeLayout,
    pairs: Pairs,
    metric: Metric,
    points: list[tuple[float, float]],
    method: str,
    keep_parts: bool,
    progress: Callable[[int, int], None] | None,
) -> EdgeScores:
    scores = torch.zeros(len(layout.sources), len(layout.destinations), dtype=torch.float64)
    clean, corrupt, cut = (torch.zeros(len(pairs), dtype=torch.float64) for _ in range(3))
    parts = torch.zeros(_parts(layout, len(pairs)), *scores.shape) if keep_parts else None
    places = torch.zeros(len(layout.sources), int(pairs.last[0]) + 1, dtype=torch.float64)
    groups = list(pairs.groups(GROUP_TOKENS, share=True))
    for done, rows in enumerate(groups):
        batch = Batch(model, pairs, rows)
        group = batch.pairs
        ends = _Ends(model, layout, group, batch, metric)
        clean[rows], corrupt[rows] = ends.values
        shown = (rows == 0).nonzero().flatten().tolist()
        per_pass = max(1, PASS_TOKENS // group.clean.numel())
        for first in range(0, len(points), per_pass):
            here = points[first : first + per_pass]
            slopes = _Slopes(model, layout, group, ends, metric, rows, here, batch=batch)
            for columns, gradient in slopes.by_destination():
                before = int(layout.reach[columns].max())
                change = ends.change[:before]
                if parts is None:
                    # [sources, pairs · pos · d_model] times the same of the destinations.
                    scores[:before, columns] += (change.flatten(1) @ gradient.flatten(1).T).double()
                else:
                    own = torch.bmm(change.flatten(2).transpose(0, 1), gradient.flatten(2).permute(1, 2, 0))
                    scores[:before, columns] += own.double().sum(0)
                    parts[:, :before, columns].index_add_(0, rows % len(parts), own)
                for i in shown:
                    end = int(group.last[i]) + 1
                    total = gradient[:, i, :end].sum(0)
                    places[:before, batch.start : batch.start + end] += (change[:, i, :end] * total).sum(-1).double()
                cut[rows] += torch.einsum("bpm,vbpm->b", ends.change[0], gradient).double()
        if progress is not None:
            progress(done + 1, len(groups))
    scores = scores.masked_fill(~layout.edges, 0) / len(pairs)
    return EdgeScores(layout, scores, clean, corrupt, method, len(points), cut, parts, places)


def _parts(layout: NodeLayout, pairs: int) -> int:
    """How many groups scores are kept in."""
    return max(1, min(pairs, PER_PAIR_BYTES // (4 * layout.edges.numel())))


class _Ends:
    """Both ends of the path for a group of pairs: what sources write on x and on x′."""

    def __init__(
        self,
        model: Model,
        layout: NodeLayout,
        group: Pairs,
        batch: Batch | None = None,
        metric: Metric | None = None,
    ) -> None:
        n, layers = len(group), range(layout.n_layers)
        sites = [ENTRY, *(f"{kind}@{layer}" for layer in layers for kind in ("attn_z", "mlp_out"))]
        tokens = torch.cat([group.clean, group.corrupt])
        scale = stream_scale(model)
        with torch.inference_mode():
            if batch is not None and metric is not None:
                values, seen = batch.value_and_capture(metric, tokens, sites)
                self.values = values[:n].double(), values[n:].double()
            else:
                logits, seen = model.logits_and_capture(tokens, sites)
                self.logits = logits[:n], logits[n:]
            self.entry = seen[ENTRY][:n], seen[ENTRY][n:]
            change = seen[ENTRY].new_empty(len(layout.sources), *seen[ENTRY][:n].shape)
            change[0] = seen[ENTRY][:n] - seen[ENTRY][n:]
            for layer in layers:
                heads = head_writes(model, layer, seen[f"attn_z@{layer}"], range(layout.n_heads))
                mlp = mlp_write(model, layer, seen[f"mlp_out@{layer}"])
                written = change[layout.written_by(layer)]
                written[:-1] = scale * (heads[:n] - heads[n:]).permute(2, 0, 1, 3)
                written[-1] = scale * (mlp[:n] - mlp[n:])
        # Outside inference mode, so that autograd may hold it.
        self.change = change.clone()
        self.entry = self.entry[0].clone(), self.entry[1].clone()


class _Slopes:
    """∂m/∂in_v at points of the path, weighted and summed over them."""

    def __init__(
        self,
        model: Model,
        layout: NodeLayout,
        group: Pairs,
        ends: _Ends,
        metric: Metric,
        rows: Tensor,
        points: list[tuple[float, float]],
        more: Mapping[str, Edit] | None = None,
        batch: Batch | None = None,
    ) -> None:
        """``more`` are further edits, made before the gradients at their sites are taken."""
        self.model, self.layout = model, layout
        self.shape = len(points), len(group)
        self.weights = torch.tensor([weight for _, weight in points])
        clean, corrupt = ends.entry
        entry = torch.cat([corrupt + alpha * (clean - corrupt) for alpha, _ in points])
        self.values: dict[str, Tensor] = {}
        self.added: dict[str, Tensor] = {}
        edits: dict[str, Edit] = {ENTRY: lambda value: entry, **(more or {})}
        self.streams = read_sites(model, layout.parallel)
        for site in dict.fromkeys(self.streams.values()):
            edits[site] = both(edits[site], self._watch(site)) if site in edits else self._watch(site)
        for layer in range(layout.n_layers):
            for site in (*(f"attn_{kind}@{layer}" for kind in KINDS), f"mlp_in@{layer}"):
                edits[site] = self._probe(site)
        edits["final"] = self._probe("final")
        tokens = group.clean.repeat(len(points), 1)
        with torch.enable_grad():
            if batch is None:
                value = metric(model.logits(tokens, edits=edits), rows.repeat(len(points)))
            else:
                value = batch.value(metric, tokens, edits)
            value.sum().backward()

    def by_destination(self):
        """(columns, weighted gradients [columns, pairs, pos, d_model]) of all destinations."""
        layout = self.layout
        for layer in range(layout.n_layers):
            parts = []
            for kind in KINDS:
                weight = projection(self.model, layer, kind).weight
                parts.append(torch.einsum("rphd,hmd->rphm", self._gradient(f"attn_{kind}@{layer}"), weight))
            yield layout.read_by_attention(layer), self._at_stream(f"attn@{layer}", layer, "attn", torch.cat(parts, 2))
            column = layout.read_by_mlp(layer)
            gradient = self._gradient(f"mlp_in@{layer}")[:, :, None]
            yield slice(column, column + 1), self._at_stream(f"mlp@{layer}", layer, "mlp", gradient)
        last = len(layout.destinations) - 1
        yield slice(last, last + 1), self._mean(self._gradient("final")[:, :, None])

    def _at_stream(self, name: str, layer: int, kind: str, gradient: Tensor) -> Tensor:
        stream = self.values[self.streams[name]]
        return self._mean(through_norm(norm(self.model, layer, kind), stream, gradient.detach()))

    def _mean(self, gradient: Tensor) -> Tensor:
        """[points · pairs, pos, v, d_model] → [v, pairs, pos, d_model]."""
        by_point = gradient.unflatten(0, self.shape)
        return torch.einsum("k,kbpvm->vbpm", self.weights.to(by_point), by_point)

    def _gradient(self, site: str) -> Tensor:
        gradient = self.added[site].grad
        return torch.zeros_like(self.added[site]) if gradient is None else gradient

    def _watch(self, site: str) -> Edit:
        def edit(value: Tensor) -> Tensor:
            self.values[site] = value.detach()
            return value

        return edit

    def _probe(self, site: str) -> Edit:
        def edit(value: Tensor) -> Tensor:
            # The gradient of something added to a value is the gradient at the value.
            self.added[site] = torch.zeros_like(value).requires_grad_()
            return value + self.added[site]

        return edit
