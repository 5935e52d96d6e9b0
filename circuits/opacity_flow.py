"""Opacity as a share of flow in an attribution graph: a secondary figure, for comparison with others' scores.

**It is no causal share.** Flow of absolute values, as in published replacement scores, says how much of the computation
the dictionaries cover on average, and changes with how a latent is written down; ``benchmarks/opacity.py`` holds it
beside the interventional share. Use :func:`.opacity.opacity` for a claim about a behaviour.

Every latent passes on the share q of what flows through it; the share 1 − q stops there, as at an error node. Absolute
values are taken before anything is merged: two latents of weights +3 and −3 are 6, not nothing. The signed form starts
from the exact decomposition of a target into roots (:meth:`.attribution_graph_record.AttributionGraph.roots`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .attribution_graph_record import AttributionGraph
from .influence import scores

LEAST_KEPT = 0.1
"""Below which share of |terms| a signed sum is too much the rest of what cancels for shares of it to mean anything."""


@dataclass(frozen=True)
class FlowOpacity:
    """Shares of flow; secondary figures."""

    absolute: float
    """1 − replacement score with unexplained shares of latents counted as errors."""
    signed: tuple[float | None, ...]
    """Of each target: (errors + unexplained latents) / (tokens + errors + unexplained latents), signed; None where
    ``kept`` is below a tenth."""
    kept: tuple[float, ...]
    """|Σ terms| / Σ |terms| over the roots of each target: how much is left after cancelling."""


def flow_opacity(graph: AttributionGraph, q: Tensor) -> FlowOpacity:
    """Flow opacity of a graph of one prompt.

    Args:
        graph: the graph.
        q: how well each of its latents is explained, [n].

    Raises:
        ValueError: not one q in [0, 1] for each latent.
    """
    n, n_errors = graph.n_latents, len(graph.errors)
    if tuple(q.shape) != (n,) or not bool(((q >= 0) & (q <= 1)).all()):
        raise ValueError(f"a graph of {n} latents needs one q in [0, 1] for each, not {list(q.shape)}")
    weights, q = graph.weights.double(), q.double()
    stopped = (weights[:, :n].abs() * (1 - q)).sum(1, keepdim=True)
    split = torch.cat([weights[:, :n] * q, weights[:, n : n + n_errors], stopped, weights[:, n + n_errors :]], 1)
    found = scores(split, graph.latents[:, 0], graph.logit_weights, n_errors + 1)
    signed, kept = [], []
    flow, opaque, dropped = _roots(graph, q)
    for target in range(len(graph.logits)):
        terms = torch.cat([flow[target, n:], opaque[target], dropped[target : target + 1]])
        total, size = float(terms.sum()), float(terms.abs().sum())
        kept.append(abs(total) / size if size else 0.0)
        tokens = float(flow[target, n + n_errors :].sum())
        signed.append(1 - tokens / total if kept[-1] >= LEAST_KEPT else None)
    return FlowOpacity(1 - found.replacement, tuple(signed), tuple(kept))


def _roots(graph: AttributionGraph, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Targets as sums over columns that are roots, [logits, columns] (latents' own used up), over what stops at latents
    [logits, n], and over latents that are no nodes [logits]."""
    n = graph.n_latents
    flow, dropped = graph.weights[n:].double().clone(), graph.dropped[n:, 0].double().clone()
    stopped = torch.zeros(len(flow), n, dtype=torch.float64)
    read = graph.read[:n].double()
    for layer in graph.latents[:, 0].unique().flip(0).tolist():
        own = (graph.latents[:, 0] == layer).nonzero()[:, 0]
        stopped[:, own] = flow[:, own] * (1 - q[own])
        share = flow[:, own] * q[own] / read[own]
        flow[:, own] = 0
        flow += share @ graph.weights[own].double()
        dropped += share @ graph.dropped[own, 0].double()
    return flow, stopped, dropped
