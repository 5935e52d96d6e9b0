"""Automatic circuit discovery: edges removed one by one for as long as the behaviour stays (Conmy et al. 2304.14997).

Destinations are visited from the logits back, their sources from the last to the first. An edge is exchanged for its
counterfactual value; if the metric falls by less than a threshold it stays exchanged, else it is put back. The result
depends on the order. It costs a forward per edge and pair and threshold; all thresholds go through the model together.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from heredity.interp.model import Model

from .edge_patching import GROUP_TOKENS, run_circuit, written
from .layout import NodeLayout
from .pairs import Metric, Pairs


@torch.no_grad()
def prune(
    model: Model,
    layout: NodeLayout,
    pairs: Pairs,
    metric: Metric,
    thresholds: Sequence[float],
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The circuits that are left, bool [thresholds, sources, destinations].

    Args:
        model, layout, pairs: as elsewhere.
        metric: falls as the behaviour is lost; −KL from the model's own predictions in the paper.
        thresholds: smallest fall of its mean over pairs at which an edge is kept, in its units.
        progress: called with edges done and in all.
    """
    limits = torch.tensor(thresholds, dtype=torch.float64)
    circuits = layout.edges.repeat(len(limits), 1, 1)
    groups = [(rows, pairs.of(rows)) for rows in pairs.groups(GROUP_TOKENS)]
    others = [written(model, layout, group.corrupt).repeat(1, len(limits), 1, 1) for _, group in groups]

    def values() -> Tensor:
        total = torch.zeros(len(limits), dtype=torch.float64)
        for (rows, group), other in zip(groups, others, strict=True):
            each = circuits.repeat_interleave(len(rows), 0)
            logits = run_circuit(model, layout, group.clean.repeat(len(limits), 1), each, other)
            total += metric(logits, rows.repeat(len(limits))).double().unflatten(0, (-1, len(rows))).sum(1)
        return total / len(pairs)

    now, done = values(), 0
    for column in reversed(range(len(layout.destinations))):
        for row in reversed(range(int(layout.reach[column]))):
            circuits[:, row, column] = False
            without = values()
            kept = now - without >= limits
            circuits[:, row, column] = kept
            now = torch.where(kept, now, without)
            done += 1
            if progress is not None:
                progress(done, layout.n_edges)
    return circuits


def prune_scores(circuits: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The largest of the thresholds at which each edge is kept, 0 if none, float64 [sources, destinations]."""
    limits = torch.tensor(thresholds, dtype=torch.float64)
    return (circuits * limits[:, None, None]).amax(0)
