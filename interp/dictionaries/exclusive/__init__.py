"""Which latents belong to one model only: decoder norms, latent scaling, stability over seeds, causal effect."""

from .difference import paired, reconciled
from .halfway import GapClosed, Halfway, halfway
from .moments import Moments, moments
from .norms import delta_norm, relative_norm
from .scaling import Scaling, latent_scaling, same_basis
from .stability import LatentStability, Stability, stability
from .verdict import Exclusives, LatentVerdict, exclusives

__all__ = [
    "Exclusives",
    "GapClosed",
    "Halfway",
    "LatentStability",
    "LatentVerdict",
    "Moments",
    "Scaling",
    "Stability",
    "delta_norm",
    "exclusives",
    "halfway",
    "latent_scaling",
    "moments",
    "paired",
    "reconciled",
    "relative_norm",
    "same_basis",
    "stability",
]
