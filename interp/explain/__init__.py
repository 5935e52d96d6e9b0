"""Explanations: readable, executable rules that predict where something is active, scored on held-out text.

All names are imported on first use; importing this package costs nothing and leaves torch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .contexts import Contexts
    from .measure import explain
    from .record import Example, Explanation
    from .rules import Rule

_HOME = {
    "Contexts": "contexts",
    "Example": "record",
    "Explanation": "record",
    "Rule": "rules",
    "explain": "measure",
}

__all__ = ["Contexts", "Example", "Explanation", "Rule", "explain"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
