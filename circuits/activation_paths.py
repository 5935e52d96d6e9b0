"""Edge scores by integrated gradients along each source's own change instead of the embedding's.

For a source u (the embedding; a head, with all heads of its layer; an MLP) the prompt stays the clean one and what the
source writes is moved on a straight line from its value on x′ to its value on x:

    score(u→v) = mean over pairs of Σ_positions ( a_u(x) − a_u(x′) ) · ∫ ∂m/∂in_v dα
    with a_u ← a_u(x′) + α (a_u(x) − a_u(x′)), α from 0 to 1

("EAP-IG-activations", Hanna et al. 2403.17806 and Mueller et al. 2504.13151). Only the runs in which u's own group is
moved count for u, so the scores of a group's edges add up to m(x) − m(x with the group exchanged). A widely used
implementation averages over all groups' runs instead.

It costs 2 · layers + 1 times what :mod:`.edges` costs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from heredity.interp.model import Edit, Model

from .edges import GROUP_TOKENS, PASS_TOKENS, EdgeScores, _Ends, _Slopes, path
from .layout import NodeLayout, layout_of
from .pairs import Metric, Pairs
from .reads import check_reads
from .writes import check_additive, stream_scale, write_site


@dataclass(frozen=True)
class _Group:
    """Sources that move together."""

    rows: slice
    site: str | None
    """Where what they write can be changed; None for the embedding."""


def attribute_edges_by_activations(
    model: Model,
    pairs: Pairs,
    metric: Metric,
    *,
    steps: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> EdgeScores:
    """Scores of all edges of ``model`` on ``pairs``, with the sign of :mod:`.edges`.

    Args:
        model, pairs, metric: as there.
        steps: gradients per pair and group, at the points of :func:`.edges.path`.
        progress: called with groups done and in all.

    Raises:
        ModelError: the architecture's edges cannot be told apart.
    """
    layout = layout_of(model)
    check_additive(model)
    check_reads(model, layout.parallel)
    points = path("eap-ig", steps)
    scores = torch.zeros(len(layout.sources), len(layout.destinations), dtype=torch.float64)
    clean, corrupt, cut = (torch.zeros(len(pairs), dtype=torch.float64) for _ in range(3))
    batches, groups = list(pairs.groups(GROUP_TOKENS)), _groups(model, layout)
    for batch, rows in enumerate(batches):
        some = pairs.of(rows)
        ends = _Ends(model, layout, some)
        clean[rows], corrupt[rows] = (metric(logits, rows).double() for logits in ends.logits)
        per_pass = max(1, PASS_TOKENS // some.clean.numel())
        for done, group in enumerate(groups):
            change = ends.change[group.rows]
            for first in range(0, len(points), per_pass):
                chunk = points[first : first + per_pass]
                # What is changed at a site is multiplied on its way to the stream.
                whole = change.sum(0) / stream_scale(model)
                at, moved = (chunk, {}) if group.site is None else _moved(group.site, whole, chunk)
                slopes = _Slopes(model, layout, some, ends, metric, rows, at, moved)
                for columns, gradient in slopes.by_destination():
                    scores[group.rows, columns] += (change.flatten(1) @ gradient.flatten(1).T).double()
                    if group.site is None:
                        cut[rows] += torch.einsum("bpm,vbpm->b", change[0], gradient).double()
            if progress is not None:
                progress(batch * len(groups) + done + 1, len(batches) * len(groups))
    scores = scores.masked_fill(~layout.edges, 0) / len(pairs)
    return EdgeScores(layout, scores, clean, corrupt, "eap-ig-activations", steps, cut)


def _groups(model: Model, layout: NodeLayout) -> list[_Group]:
    groups = [_Group(slice(0, 1), None)]
    for layer in range(layout.n_layers):
        rows = layout.written_by(layer)
        groups.append(_Group(slice(rows.start, rows.stop - 1), write_site(model, layer, "head")))
        groups.append(_Group(slice(rows.stop - 1, rows.stop), write_site(model, layer, "mlp")))
    return groups


def _moved(
    site: str, change: Tensor, points: list[tuple[float, float]]
) -> tuple[list[tuple[float, float]], dict[str, Edit]]:
    """Points at the clean prompt with the same weights, and the edit that moves a group back by 1 − α at each."""
    back = torch.cat([(alpha - 1) * change for alpha, _ in points])
    return [(1.0, weight) for _, weight in points], {site: lambda value: value + back}
