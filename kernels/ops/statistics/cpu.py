"""Statistics on the CPU: one sort, which brings each latent together with its largest values first."""

import torch

from ...features import FeatureCSR
from .order import bins, ranked
from .record import N_BINS, Statistics


def statistics(features: FeatureCSR, first_token: int, top: int) -> Statistics:
    """See :func:`heredity.kernels.statistics`."""
    n_latents = features.n_latents
    by_value = ranked(features, first_token)
    latents, values = by_value.latents, by_value.values
    precise = values.double()
    top_values, top_tokens = by_value.top(top)
    histogram = torch.bincount(latents * N_BINS + bins(values), minlength=n_latents * N_BINS)
    return Statistics(
        count=by_value.count,
        sum=precise.new_zeros(n_latents).index_add_(0, latents, precise),
        sum_of_squares=precise.new_zeros(n_latents).index_add_(0, latents, precise.square()),
        # The first of each latent; a copy, or the whole array of top values would live on in it.
        max=top_values[:, 0].clone(),
        histogram=histogram.view(n_latents, N_BINS),
        top_values=top_values,
        top_tokens=top_tokens,
        n_tokens=features.n_tokens,
    )
