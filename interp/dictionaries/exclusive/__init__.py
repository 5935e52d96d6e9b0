"""Which latents belong to one model only: decoder norms, latent scaling, stability over seeds, causal effect."""

from .halfway import GapClosed, Halfway, halfway
from .moments import Moments, moments
from .norms import delta_norm, relative_norm
from .scaling import Scaling, latent_scaling
from .stability import LatentStability, Stability, stability
from .stitch import same_basis, stitch
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
    "relative_norm",
    "same_basis",
    "stability",
    "stitch",
]
