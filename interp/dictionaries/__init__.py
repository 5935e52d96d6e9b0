"""Sparse dictionaries (SAE, transcoder, crosscoder): read everyone's, train our own, look at their latents.

All names are imported on first use; importing this package costs nothing and leaves torch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
        relative_norm,
        stability,
    )
    from .formats import load_dictionary, save_dictionary
    from .record import Dictionary, DictionarySet, Port

_HOME = {
    "Dictionary": "record",
    "DictionarySet": "record",
    "Exclusives": "exclusive",
    "Halfway": "exclusive",
    "LatentVerdict": "exclusive",
    "Port": "record",
    "Scaling": "exclusive",
    "Stability": "exclusive",
    "delta_norm": "exclusive",
    "exclusives": "exclusive",
    "halfway": "exclusive",
    "latent_scaling": "exclusive",
    "load_dictionary": "formats",
    "relative_norm": "exclusive",
    "save_dictionary": "formats",
    "stability": "exclusive",
}

__all__ = [
    "Dictionary",
    "DictionarySet",
    "Exclusives",
    "Halfway",
    "LatentVerdict",
    "Port",
    "Scaling",
    "Stability",
    "delta_norm",
    "exclusives",
    "halfway",
    "latent_scaling",
    "load_dictionary",
    "relative_norm",
    "save_dictionary",
    "stability",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
