"""How much of a graph's targets flows from each node, and which nodes and edges carry most of it.

With Â the rows of |A| divided by their sums and w the weights of the targets,

    influence = w Â + w Â² + …
    replacement score = influence of tokens / ( influence of tokens + influence of errors )
    completeness score = Σ_t (influence_t + w_t) ( 1 − Σ_errors Â[t, ·] ) / Σ_t (influence_t + w_t)

over all nodes t (Ameisen et al. 2025, "Circuit tracing", sections "Evaluating" and "Graph pruning"; as computed by
decoderesearch/circuit-tracer). Influence is a flow of absolute values: it says how well the dictionaries cover the
computation, and is no share of a causal effect.

Arrays: ``weights`` A is [rows, columns]; rows are targets, the n latents first, then the logits; columns are sources,
the same n latents first, then errors, then tokens. ``layers`` int64 [n] are those of the latents: a latent has effects
on later layers only, so one pass from the last layer to the first sums the whole series.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = 1e-10
"""Below which a row's sum counts as this, as in the source."""
_COPIED = 1 << 22  # numbers at once: the whole matrix may fill most of the memory there is


def influence(
    latents: Tensor, logits: Tensor, layers: Tensor, logit_weights: Tensor, columns: Tensor | None = None
) -> Tensor:
    """Influence of every column on the logits, float64 [columns].

    Args:
        latents: the rows of latents, [rows, columns].
        logits: those of logits, [logits, columns].
        layers: of the latents, in the order of rows.
        logit_weights: [logits].
        columns: the column of each row's latent; the first ones if None.
    """
    at = torch.arange(len(layers), device=layers.device) if columns is None else columns
    found = (logit_weights.to(logits.dtype) @ _shares(logits)).double()
    for layer in layers.unique().flip(0).tolist():
        own = (layers == layer).nonzero()[:, 0]
        mass = found[at[own]]
        own, mass = own[mass > 0], mass[mass > 0]
        for some, of in zip(own.split(_rows(latents)), mass.split(_rows(latents)), strict=True):
            found += (of.to(latents.dtype) @ _shares(latents[some])).double()
    return found


@dataclass(frozen=True)
class Scores:
    """Both scores of the source, 0 to 1."""

    replacement: float
    completeness: float


def scores(weights: Tensor, layers: Tensor, logit_weights: Tensor, n_errors: int) -> Scores:
    """Replacement and completeness score of a graph with ``n_errors`` error nodes."""
    n = len(layers)
    found = influence(weights[:n], weights[n:], layers, logit_weights)
    errors = slice(n, n + n_errors)
    tokens = float(found[n + n_errors :].sum())
    mass = torch.cat([found[:n], logit_weights.double()])
    sums = torch.cat([part.abs().sum(1, dtype=torch.float64) for part in weights.split(_rows(weights))])
    from_errors = weights[:, errors].abs().sum(1, dtype=torch.float64) / sums.clamp_min(LEAST)
    # Errors and tokens have no sources, so all of their mass counts as explained.
    total = float(mass.sum() + found[n:].sum())
    through = total - float((mass * from_errors).sum())
    into = tokens + float(found[errors].sum())
    return Scores(tokens / into if into else 0.0, through / total if total else 0.0)


@dataclass(frozen=True, eq=False)
class Pruned:
    """What :func:`prune` keeps.

    Attributes:
        sources: bool [columns].
        edges: bool [rows, columns].
        entered: float64 [columns], the share of all influence that is reached once a source is taken in, most
            influential first (the ``influence`` of graph files).
    """

    sources: Tensor
    edges: Tensor
    entered: Tensor


def prune(
    weights: Tensor,
    layers: Tensor,
    logit_weights: Tensor,
    n_tokens: int,
    *,
    nodes: float = 0.8,
    edges: float = 0.98,
) -> Pruned:
    """The most influential nodes that reach the share ``nodes`` of all influence, then the edges among them that reach
    the share ``edges``; tokens and logits are always kept, other nodes only while an edge connects them.

    Raises:
        ValueError: a share is not between 0 and 1.
    """
    if not (0 <= nodes <= 1 and 0 <= edges <= 1):
        raise ValueError(f"shares must lie between 0 and 1, not {nodes} and {edges}")
    n, columns = len(layers), weights.shape[1]
    free = slice(0, columns - n_tokens)
    found = influence(weights[:n], weights[n:], layers, logit_weights)
    # Logits are nodes without influence of their own and take part in no threshold.
    kept = found >= _threshold(found, nodes)
    kept[columns - n_tokens :] = True
    rows = torch.cat([kept[:n], kept.new_ones(len(weights) - n)])
    left, inside = weights[rows][:, kept], int(kept[:n].sum())
    own = kept[:n].nonzero()[:, 0]
    found_left = influence(left[:inside], left[inside:], layers[own], logit_weights)
    share = _shares(left) * torch.cat([found_left[:inside], logit_weights.double()]).to(left.dtype)[:, None]
    chosen = torch.zeros(weights.shape, dtype=torch.bool, device=weights.device)
    strong = (share >= _threshold(share[share > 0].double(), edges)) & (share > 0)
    at = strong.nonzero()
    chosen[rows.nonzero()[at[:, 0], 0], kept.nonzero()[at[:, 1], 0]] = True
    while True:
        before = int(kept.sum())
        kept[free] &= chosen[:, free].any(0)
        kept[:n] &= chosen[:n].any(1)
        if int(kept.sum()) == before:
            break
        chosen[:, ~kept] = False
        chosen[:n][~kept[:n]] = False
    order = found.argsort(descending=True, stable=True)
    entered = torch.empty_like(found)
    entered[order] = found[order].cumsum(0) / found.sum().clamp_min(1e-300)
    return Pruned(kept, chosen, entered)


def _rows(weights: Tensor) -> int:
    """How many rows are copied at once."""
    return max(1, _COPIED // weights.shape[1])


def _shares(weights: Tensor) -> Tensor:
    """Rows of |A| over their sums."""
    size = weights.abs()
    return size / size.sum(1, keepdim=True, dtype=torch.float64).clamp_min(LEAST).to(size.dtype)


def _threshold(values: Tensor, share: float) -> float:
    """The smallest of the largest values that together reach ``share`` of the sum; 0 of no values."""
    if not len(values):
        return 0.0
    ordered = values.sort(descending=True).values
    reached = ordered.cumsum(0) / ordered.sum().clamp_min(1e-300)
    at = min(int(torch.searchsorted(reached, share)), len(ordered) - 1)
    return float(ordered[at])
