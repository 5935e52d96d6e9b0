"""What rules explain of random directions, and how much more they explain of a latent.

A random direction of a model is a function of its tokens, so a rule explains part of it, rightly: it lists the tokens
that point along it. Where a few tokens say nearly everything, that part is a quarter; in ordinary text it is near 0.
Labels moved along the texts cannot show it, since moving cuts the tie between tokens and activity. So q stays what it
is, the share that rules explain, and :func:`beyond` says how far it goes beyond random directions at the same site,
active as often: 0 for what is no better explained than those, 1 for what is explained entirely.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from heredity.kernels import FeatureCSR

FEWEST = 19
"""Random directions to compare with: of twenty alike, one is above all others in a twentieth of the cases."""


def random_directions(activations: Tensor, *, n_active: int, directions: int = FEWEST, seed: int) -> FeatureCSR:
    """Random directions as features: each is active at the ``n_active`` tokens that lie farthest along it.

    Args:
        activations: [T, D], of the site that the latents read.
        n_active: tokens at which each is active, such as a latent's own ``n_active``.
        directions: how many.
        seed: decides them.

    Raises:
        ValueError: not fewer active tokens than tokens, or none.
    """
    if not 0 < n_active < len(activations):
        raise ValueError(f"{n_active} active of {len(activations)} tokens: choose at least 1 and fewer than all")
    draws = torch.Generator().manual_seed(seed)
    drawn = torch.randn(activations.shape[1], directions, generator=draws, dtype=torch.float64)
    along = activations.detach().cpu().double() @ drawn
    highest, tokens = along.topk(n_active + 1, dim=0)
    # Above the first token that is not active; equal values count as active by the least that is more than 0.
    above = (highest[:-1] - highest[-1]).clamp_min(torch.finfo(torch.float32).tiny)
    return FeatureCSR.from_dense(torch.zeros_like(along).scatter_(0, tokens[:-1], above).float())


def beyond(q: float, random: Sequence[float]) -> float:
    """How far ``q`` goes beyond random directions, from 0 (not) to 1: max(0, (q − u) / (1 − u)).

    Args:
        q: of a latent.
        random: q of random directions at the same site, active as often, on the same texts; u is their 95 % quantile.

    Raises:
        ValueError: there are fewer than :data:`FEWEST`.
    """
    if len(random) < FEWEST:
        raise ValueError(f"{len(random)} random directions give no 95 % quantile: take at least {FEWEST}")
    bar = float(np.quantile(np.asarray(random), 0.95, method="higher"))
    return max(0.0, (q - bar) / (1 - bar)) if bar < 1 else 0.0
