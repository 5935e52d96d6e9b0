"""Explanations: readable, executable rules that predict where something is active, scored on held-out text.

All names are imported on first use; importing this package costs nothing and leaves torch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .contexts import Contexts
    from .directions import beyond, random_directions
    from .endpoint import Endpoint
    from .language_model import Explainer, Judge, explain_by_model
    from .measure import explain
    from .nodes import head_features, neuron_features
    from .record import Example, Explanation
    from .rules import Rule

_HOME = {
    "Contexts": "contexts",
    "Endpoint": "endpoint",
    "Example": "record",
    "Explainer": "language_model",
    "Explanation": "record",
    "Judge": "language_model",
    "Rule": "rules",
    "beyond": "directions",
    "explain": "measure",
    "explain_by_model": "language_model",
    "head_features": "nodes",
    "neuron_features": "nodes",
    "random_directions": "directions",
}

__all__ = [
    "Contexts",
    "Endpoint",
    "Example",
    "Explainer",
    "Explanation",
    "Judge",
    "Rule",
    "beyond",
    "explain",
    "explain_by_model",
    "head_features",
    "neuron_features",
    "random_directions",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
