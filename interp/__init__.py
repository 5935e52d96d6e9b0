"""One model seen from inside: load it, read values at named sites, edit them.

All but :func:`load` (whose module shares its name, so it must be bound first) are imported on first use; importing
this package costs nothing and leaves torch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .load import load

if TYPE_CHECKING:
    from .errors import (
        AdapterError,
        CorpusError,
        DictionaryError,
        GraphError,
        HeredityError,
        ModelError,
        OutputError,
        PolicyError,
        SiteError,
        StoreError,
        TokenizerError,
        TrainingError,
        WrapperError,
    )
    from .model import Encoded, Model
    from .spec import parse_spec

_HOME = {
    "AdapterError": "errors",
    "CorpusError": "errors",
    "DictionaryError": "errors",
    "Encoded": "model",
    "GraphError": "errors",
    "HeredityError": "errors",
    "Model": "model",
    "ModelError": "errors",
    "OutputError": "errors",
    "PolicyError": "errors",
    "SiteError": "errors",
    "StoreError": "errors",
    "TokenizerError": "errors",
    "TrainingError": "errors",
    "WrapperError": "errors",
    "parse_spec": "spec",
}

__all__ = [
    "AdapterError",
    "CorpusError",
    "DictionaryError",
    "Encoded",
    "GraphError",
    "HeredityError",
    "Model",
    "ModelError",
    "OutputError",
    "PolicyError",
    "SiteError",
    "StoreError",
    "TokenizerError",
    "TrainingError",
    "WrapperError",
    "load",
    "parse_spec",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
