"""Edge scores by position: which part of the prompt an edge works at, and from where to where attention carries it.

Prompts are cut into spans (subject, verb, …) that correspond between prompts of different lengths; a node of the graph
is then a component at a span, and there are two kinds of edges (position-aware edge attribution patching, Haklay et
al. 2502.04577):

* within a span, from source u to destination v: the score of :mod:`.edges`, summed over the span's positions only;
* across, from span S to span T through a head: the effect, at T, of exchanging the head's values or its keys at the
  positions of S, one at a time. A key is taken exactly through the softmax (:mod:`.attention_changes`).

Signs are those of :mod:`.edges`. What is within a span adds up over spans to the edge's score.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heredity.interp.model import Edit, Model

from .attention_changes import Attention, each_exchanged, record_attention
from .edges import GROUP_TOKENS, PASS_TOKENS, _Ends, _Slopes, path
from .layout import NodeLayout, layout_of
from .pairs import Metric, Pairs
from .reads import check_reads
from .writes import check_additive

ACROSS = ("value", "key")


@dataclass(frozen=True)
class SpanScores:
    """Scores of all edges of the graph over spans.

    Attributes:
        layout: names of sources and destinations.
        spans: names of the S spans.
        within: float64 [sources, destinations, S], mean over pairs, in units of the metric.
        across: float64 [layers, heads, 2, S, S], through values and through keys (:data:`ACROSS`), from the span
            attended to, to the span that attends; the diagonal is attention inside a span.
    """

    layout: NodeLayout
    spans: tuple[str, ...]
    within: Tensor
    across: Tensor


def attribute_spans(
    model: Model,
    pairs: Pairs,
    metric: Metric,
    spans: Tensor,
    names: Sequence[str],
    *,
    steps: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> SpanScores:
    """Scores of all edges of ``model`` on ``pairs``, by span.

    Args:
        model, pairs, metric: as in :mod:`.edges`.
        spans: number of the span of each token of each pair, int64 [N, pos]; −1 for tokens that count nowhere.
        names: of the spans.
        steps: gradients per pair: one at the clean prompt, or integrated over the line from the counterfactual.
        progress: called with groups of pairs done and in all.

    Raises:
        ValueError: ``spans`` is of another shape than the prompts or numbers spans without a name.
        ModelError: the architecture's edges cannot be told apart.
    """
    if spans.shape != pairs.clean.shape or not -1 <= int(spans.min()) <= int(spans.max()) < len(names):
        raise ValueError(
            f"spans need a number from -1 to {len(names) - 1} for each of {list(pairs.clean.shape)} tokens, not "
            f"{list(spans.shape)} from {int(spans.min())} to {int(spans.max())}"
        )
    layout = layout_of(model)
    check_additive(model)
    check_reads(model, layout.parallel)
    points = path("eap" if steps == 1 else "eap-ig", steps)
    shape = len(layout.sources), len(layout.destinations), len(names)
    within = torch.zeros(shape, dtype=torch.float64)
    across = torch.zeros(layout.n_layers, layout.n_heads, 2, len(names), len(names), dtype=torch.float64)
    groups = list(pairs.groups(GROUP_TOKENS))
    for done, rows in enumerate(groups):
        group = pairs.of(rows)
        member = torch.stack([spans[rows, : group.clean.shape[1]] == i for i in range(len(names))])  # [S, pairs, pos]
        ends = _Ends(model, layout, group)
        attention = list(zip(record_attention(model, group.clean), record_attention(model, group.corrupt), strict=True))
        per_pass = max(1, PASS_TOKENS // group.clean.numel())
        for first in range(0, len(points), per_pass):
            chunk = points[first : first + per_pass]
            probes = _Probes(layout)
            slopes = _Slopes(model, layout, group, ends, metric, rows, chunk, probes.edits)
            for columns, gradient in slopes.by_destination():
                before = int(layout.reach[columns].max())
                change = ends.change[:before].flatten(1)
                for i, mask in enumerate(member):
                    own = (gradient * mask[..., None]).flatten(1)
                    within[:before, columns, i] += (change @ own.T).double()
            for layer, (clean, corrupt) in enumerate(attention):
                gradient = probes.mean(layer, [weight for _, weight in chunk])
                across[layer] += _between(clean, corrupt, gradient, member)
        if progress is not None:
            progress(done + 1, len(groups))
    within = within.masked_fill(~layout.edges[..., None], 0)
    return SpanScores(layout, tuple(names), within / len(pairs), across / len(pairs))


def _between(clean: Attention, corrupt: Attention, gradient: Tensor, member: Tensor) -> Tensor:
    """Effects through a layer's values and keys, summed over pairs, [heads, 2, from, to]."""
    difference = clean.grouped(clean.v - corrupt.v)
    values = clean.pattern * torch.einsum("bqhd,bkhd->bhqk", gradient, difference)
    keys = each_exchanged(clean.scores, clean.scores_of(clean.q, corrupt.k), clean.slope(gradient))
    inside = member.to(values)
    found = [torch.einsum("bhqk,sbk,tbq->hst", effect, inside, inside) for effect in (values, keys)]
    return torch.stack(found, 1).double()


class _Probes:
    """Gradients at head values."""

    def __init__(self, layout: NodeLayout) -> None:
        self.added: dict[int, Tensor] = {}
        self.edits: dict[str, Edit] = {f"attn_z@{layer}": self._probe(layer) for layer in range(layout.n_layers)}

    def mean(self, layer: int, weights: list[float]) -> Tensor:
        """[pairs, pos, head, d_head], weighted over the points of a pass."""
        gradient = self.added[layer].grad
        if gradient is None:
            return torch.zeros_like(self.added[layer]).unflatten(0, (len(weights), -1))[0]
        by_point = gradient.unflatten(0, (len(weights), -1))
        return torch.einsum("k,kbphd->bphd", torch.tensor(weights).to(by_point), by_point)

    def _probe(self, layer: int) -> Edit:
        def edit(value: Tensor) -> Tensor:
            self.added[layer] = torch.zeros_like(value).requires_grad_()
            return value + self.added[layer]

        return edit
