"""Training dictionaries from activation stores or from running models.

All names are imported on first use; importing this package costs nothing and leaves torch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .history import Row, read_history
    from .loop import Trained, train
    from .memory import within
    from .plots import figure
    from .recipe import Recipe
    from .running import Running
    from .sources import Source
    from .stores import Stores

_HOME = {
    "Recipe": "recipe",
    "Row": "history",
    "Running": "running",
    "Source": "sources",
    "Stores": "stores",
    "Trained": "loop",
    "figure": "plots",
    "read_history": "history",
    "train": "loop",
    "within": "memory",
}

__all__ = ["Recipe", "Row", "Running", "Source", "Stores", "Trained", "figure", "read_history", "train", "within"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
