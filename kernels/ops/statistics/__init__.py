"""How often, how strongly and where each latent is active, from sparse activations alone."""

from ... import dispatch
from ...features import FeatureCSR
from .record import N_BINS, Statistics

__all__ = ["N_BINS", "Statistics", "run", "statistics"]

run = dispatch.Op("statistics", __name__, lambda features, *_: features.values)


def statistics(features: FeatureCSR, *, first_token: int = 0, top: int = 16, impl: str | None = None) -> Statistics:
    """Count, sums, largest value, histogram and strongest tokens of each latent.

    Long streams are done in parts, joined by :meth:`Statistics.merge`.

    Args:
        features: T tokens on F latents. Every stored activation counts, also one that is zero.
        first_token: id of the first token of ``features``; the others count up from it.
        top: how many of the largest activations of a latent are kept, with their tokens.
        impl: ``cpu``, ``triton`` or ``reference``; see :mod:`heredity.kernels.dispatch`.

    Raises:
        ValueError: ``top`` is below 1 or ``first_token`` below 0.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, not {top}")
    if first_token < 0:
        raise ValueError(f"first_token must be at least 0, not {first_token}")
    return run(features.with_values(features.values.detach()), first_token, top, impl=impl)
