"""Every edge's real effect, one exchange at a time: the reference that estimates are held against."""

import torch

from heredity.interp.model import Model

from .edge_patching import patch_edges
from .edges import EdgeScores
from .layout import layout_of
from .pairs import Metric, Pairs
from .reads import check_reads
from .writes import check_additive


def exchange_edges(model: Model, pairs: Pairs, metric: Metric) -> EdgeScores:
    """m(x) − m(x with the edge carrying what it carries on x′) for all edges, as scores.

    A row of a forward per edge and pair: for small models.

    Raises:
        ModelError: the architecture's edges cannot be told apart.
    """
    layout = layout_of(model)
    check_additive(model)
    check_reads(model, layout.parallel)
    where = layout.edges.nonzero()
    effects = patch_edges(model, layout, pairs, metric, [(int(s), int(v)) for s, v in where])
    scores = torch.zeros(layout.edges.shape, dtype=torch.float64)
    scores[where[:, 0], where[:, 1]] = effects.mean(1)
    with torch.inference_mode():
        rows = torch.arange(len(pairs))
        clean, corrupt = (metric(model.logits(tokens), rows).double() for tokens in (pairs.clean, pairs.corrupt))
    cut = effects[where[:, 0] == 0].sum(0)
    return EdgeScores(layout, scores, clean, corrupt, "exact", 0, cut)
