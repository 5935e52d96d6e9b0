"""Sparse dictionaries (SAE, transcoder, crosscoder): read everyone's, train our own, look at their latents.

All names are imported on first use; importing this package costs nothing and leaves torch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .record import Dictionary, DictionarySet, Port

_HOME = {
    "Dictionary": "record",
    "DictionarySet": "record",
    "Port": "record",
}

__all__ = ["Dictionary", "DictionarySet", "Port"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
