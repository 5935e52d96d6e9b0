"""The definition of statistics: one latent after the other."""

import math

import torch

from ...features import FeatureCSR
from .record import HIGHEST, LOWEST, N_BINS, Statistics


def statistics(features: FeatureCSR, first_token: int, top: int) -> Statistics:
    """See :func:`heredity.kernels.statistics`."""
    n_latents, device = features.n_latents, features.device
    values, tokens = features.values.float(), features.tokens + first_token
    count = torch.zeros(n_latents, dtype=torch.int64, device=device)
    total, squares = torch.zeros(2, n_latents, dtype=torch.float64, device=device)
    largest = torch.full((n_latents,), -torch.inf, device=device)
    histogram = torch.zeros(n_latents, N_BINS, dtype=torch.int64, device=device)
    top_values = torch.full((n_latents, top), -torch.inf, device=device)
    top_tokens = torch.full((n_latents, top), -1, dtype=torch.int64, device=device)
    for latent in features.indices.unique().tolist():
        here = features.indices == latent
        its = values[here]
        count[latent] = len(its)
        total[latent] = its.double().sum()
        squares[latent] = its.double().square().sum()
        largest[latent] = its.max()
        for value in its.tolist():
            histogram[latent, bin_of(value)] += 1
        # Stable, so equal values stay in the order of their tokens; NaN sorts as the largest.
        ordered, order = its.sort(descending=True, stable=True)
        n = min(top, len(its))
        top_values[latent, :n] = ordered[:n]
        top_tokens[latent, :n] = tokens[here][order[:n]]
    return Statistics(count, total, squares, largest, histogram, top_values, top_tokens, features.n_tokens)


def bin_of(value: float) -> int:
    """Which bin of the histogram a value falls in."""
    if math.isnan(value) or value >= 2.0**HIGHEST:
        return N_BINS - 1
    return sum(value >= 2.0**power for power in range(LOWEST, HIGHEST + 1))
