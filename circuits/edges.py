"""How much of a behaviour each edge carries, by gradients: edge attribution patching and its integrated form.

For clean prompts x, counterfactual prompts x′ and a metric m, an edge from source u to destination v carries

    score(u→v) = mean over pairs of Σ_positions ( a_u(x) − a_u(x′) ) · ∂m/∂in_v

**Sign.** Positive means that the edge supports the behaviour: exchanging what it carries for what it carries on x′ is
expected to lower m by that much. Over all edges out of the embedding the scores of integrated gradients add up to
m(x) − m(x′) (completeness, Sundararajan et al. 1703.01365); how far they miss is reported, and the number of steps is
doubled until they miss by less than a tolerance.

Where the gradient is taken: at x (EAP, Syed et al. 2310.10348), at both ends ("clean-corrupted"), or averaged over
embeddings on the straight line between x′ and x (EAP-IG, Hanna et al. 2403.17806). The line is integrated by Gauss's
rule, which needs fewer points than sums of equal steps.

What makes it quick: the gradient at a head's input is computed from that at its query, key or value, which is small;
all steps of a batch go through the model in one forward; differences are contracted with the steps' mean gradient.
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
from .reads import KINDS, check_reads, norm, projection, read_sites, through_norm
from .writes import ENTRY, both, check_additive, head_writes, mlp_write

Method = Literal["eap", "clean-corrupted", "eap-ig"]
PASS_TOKENS = 512
"""Padded tokens in one forward and backward."""
GROUP_TOKENS = 128
"""Tokens of pairs whose differences are held at once; memory for them is sources · tokens · d_model floats."""


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
    """

    layout: NodeLayout
    scores: Tensor
    clean: Tensor
    corrupt: Tensor
    method: str
    steps: int
    input_cut: Tensor

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
    progress: Callable[[int, int], None] | None = None,
) -> EdgeScores:
    """Scores of all edges of ``model`` on ``pairs``.

    Args:
        model: the model.
        pairs: N prompts with their counterfactuals.
        metric: what is attributed.
        method: where gradients are taken.
        steps: gradients per pair for ``eap-ig``; doubled from 5 until completeness is within ``tolerance`` if None.
        tolerance: largest miss of the input cut, as a share of m(x) − m(x′).
        progress: called with groups of pairs done and in all, per number of steps tried.

    Raises:
        ModelError: the architecture's edges cannot be told apart.
    """
    layout = layout_of(model)
    check_additive(model)
    check_reads(model, layout.parallel)
    if method != "eap-ig" or steps is not None:
        return _run(model, layout, pairs, metric, method, steps or 1, progress)
    tried = 5
    while True:
        found = _run(model, layout, pairs, metric, method, tried, progress)
        if found.completeness <= tolerance or tried >= 160:
            return found
        tried *= 2


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
        return [((a + 1) / 2, w / 2) for a, w in zip(at.tolist(), weights.tolist(), strict=True)]
    raise ValueError(f"no such method: {method!r}")


def _run(
    model: Model,
    layout: NodeLayout,
    pairs: Pairs,
    metric: Metric,
    method: Method,
    steps: int,
    progress: Callable[[int, int], None] | None,
) -> EdgeScores:
    points = path(method, steps)
    scores = torch.zeros(len(layout.sources), len(layout.destinations), dtype=torch.float64)
    clean, corrupt, cut = (torch.zeros(len(pairs), dtype=torch.float64) for _ in range(3))
    groups = list(pairs.groups(GROUP_TOKENS))
    for done, rows in enumerate(groups):
        group = pairs.of(rows)
        ends = _Ends(model, layout, group)
        clean[rows], corrupt[rows] = (metric(logits, rows).double() for logits in ends.logits)
        per_pass = max(1, PASS_TOKENS // group.clean.numel())
        for first in range(0, len(points), per_pass):
            slopes = _Slopes(model, layout, group, ends, metric, rows, points[first : first + per_pass])
            for columns, gradient in slopes.by_destination():
                before = int(layout.reach[columns].max())
                # [sources, pairs · pos · d_model] times the same of the destinations.
                scores[:before, columns] += (ends.change[:before].flatten(1) @ gradient.flatten(1).T).double()
                cut[rows] += torch.einsum("bpm,vbpm->b", ends.change[0], gradient).double()
        if progress is not None:
            progress(done + 1, len(groups))
    scores = scores.masked_fill(~layout.edges, 0) / len(pairs)
    return EdgeScores(layout, scores, clean, corrupt, method, len(points), cut)


class _Ends:
    """Both ends of the path for a group of pairs: what sources write on x and on x′."""

    def __init__(self, model: Model, layout: NodeLayout, group: Pairs) -> None:
        n, layers = len(group), range(layout.n_layers)
        sites = [ENTRY, *(f"{kind}@{layer}" for layer in layers for kind in ("attn_z", "mlp_out"))]
        with torch.inference_mode():
            logits, seen = model.logits_and_capture(torch.cat([group.clean, group.corrupt]), sites)
            self.logits = logits[:n], logits[n:]
            self.entry = seen[ENTRY][:n].clone(), seen[ENTRY][n:].clone()
            change = seen[ENTRY].new_empty(len(layout.sources), *seen[ENTRY][:n].shape)
            change[0] = seen[ENTRY][:n] - seen[ENTRY][n:]
            for layer in layers:
                heads = head_writes(model, layer, seen[f"attn_z@{layer}"], range(layout.n_heads))
                mlp = mlp_write(model, layer, seen[f"mlp_out@{layer}"])
                written = change[layout.written_by(layer)]
                written[:-1] = (heads[:n] - heads[n:]).permute(2, 0, 1, 3)
                written[-1] = mlp[:n] - mlp[n:]
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
            metric(model.logits(tokens, edits=edits), rows.repeat(len(points))).sum().backward()

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
