"""Sparse dictionaries (SAE, transcoder, crosscoder): read everyone's, train our own, look at their latents.

All names are imported on first use; importing this package costs nothing and leaves torch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .describing import describe, logit_effects
    from .exclusive import (
        Exclusives,
        Halfway,
        LatentVerdict,
        Scaling,
        Stability,
        delta_norm,
        exclusives,
        halfway,
        latent_scaling,
        paired,
        relative_norm,
        stability,
    )
    from .formats import load_dictionary, save_dictionary
    from .notes import LatentNotes, load_notes, with_notes
    from .record import Dictionary, DictionarySet, Port

_HOME = {
    "Dictionary": "record",
    "DictionarySet": "record",
    "Exclusives": "exclusive",
    "Halfway": "exclusive",
    "LatentNotes": "notes",
    "LatentVerdict": "exclusive",
    "Port": "record",
    "Scaling": "exclusive",
    "Stability": "exclusive",
    "delta_norm": "exclusive",
    "describe": "describing",
    "exclusives": "exclusive",
    "halfway": "exclusive",
    "latent_scaling": "exclusive",
    "load_dictionary": "formats",
    "load_notes": "notes",
    "logit_effects": "describing",
    "paired": "exclusive",
    "relative_norm": "exclusive",
    "save_dictionary": "formats",
    "stability": "exclusive",
    "with_notes": "notes",
}

__all__ = [
    "Dictionary",
    "DictionarySet",
    "Exclusives",
    "Halfway",
    "LatentNotes",
    "LatentVerdict",
    "Port",
    "Scaling",
    "Stability",
    "delta_norm",
    "describe",
    "exclusives",
    "halfway",
    "latent_scaling",
    "load_dictionary",
    "load_notes",
    "logit_effects",
    "paired",
    "relative_norm",
    "save_dictionary",
    "stability",
    "with_notes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
