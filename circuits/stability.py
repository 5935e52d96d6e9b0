"""Whether the same edges would be chosen on other prompts of the same kind.

Pairs are drawn with replacement, scores averaged anew, the same number of edges chosen, and the choices compared: mean
Jaccard index over all pairs of draws (Méloux et al. 2510.00845, who ask for more than 0.8 at 100 draws or more).
Scores by pair are a by-product of attribution, so this costs no forward; it costs their memory
(:data:`.edges.PER_PAIR_BYTES` at most).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import NodeLayout


@dataclass(frozen=True)
class Stability:
    """Agreement between choices of edges.

    Attributes:
        draws: bootstrap draws.
        groups: groups of pairs that were drawn from (the pairs themselves where memory allowed).
        edges: edges chosen in each.
        jaccard: mean over all pairs of draws.
        with_all: mean Jaccard index of a draw's choice with the choice from all pairs.
    """

    draws: int
    groups: int
    edges: int
    jaccard: float
    with_all: float


def stability(parts: Tensor, layout: NodeLayout, edges: int, *, draws: int = 100, seed: int = 0) -> Stability:
    """The agreement of ``draws`` choices of the ``edges`` edges of largest absolute score.

    Args:
        parts: scores by pair, [groups, sources, destinations].
        layout: names of rows and columns.
        edges: how many are chosen.
        draws: at least 2.
        seed: of the draws.
    """
    flat = parts[:, layout.edges]  # [groups, edges]
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(draws, len(flat))
    chosen = torch.randint(len(flat), (draws, len(flat)), generator=generator)
    counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=counts.dtype))
    n = min(edges, flat.shape[1])
    sets = torch.zeros(draws, flat.shape[1])
    for draw, weights in enumerate(counts):
        sets[draw, (weights @ flat).abs().topk(n).indices] = 1
    whole = torch.zeros(flat.shape[1])
    whole[flat.sum(0).abs().topk(n).indices] = 1
    common = sets @ sets.T
    index = common / (2 * n - common)
    mean = float((index.sum() - draws) / (draws * (draws - 1)))
    shared = sets @ whole
    return Stability(draws, len(flat), n, mean, float((shared / (2 * n - shared)).mean()))
