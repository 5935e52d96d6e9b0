"""Values at hook points that are no sites: attention patterns, scores, rotations, the inside of MLPs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from heredity.interp.errors import ModelError
from heredity.interp.model import Model

_LEVEL = 1 << 30
"""Of hooks set here, so that they can be taken away without touching others."""


@contextmanager
def recording(model: Model, readers: Mapping[str, Callable[[Tensor], Any]]) -> Iterator[None]:
    """Call each reader with the value [...] at its hook point, for the one text of the forward inside.

    Raises:
        ModelError: there is no such hook point, or the forward did not pass it: a hook that sees nothing would go
            unnoticed otherwise.
    """
    hooks, passed = model.bridge.hook_dict, set()

    def hook(name: str, reader: Callable[[Tensor], Any]) -> Callable[..., None]:
        def read(tensor: Tensor, hook: object) -> None:
            passed.add(name)
            reader(tensor.detach()[0])

        return read

    if absent := [name for name in readers if name not in hooks]:
        raise _unseen(model, f"this {model.shape.architecture} has no {absent[0]}")
    try:
        for name, reader in readers.items():
            hooks[name].add_hook(hook(name, reader), level=_LEVEL)
        yield
    finally:
        for name in readers:
            hooks[name].remove_hooks(level=_LEVEL)
    if silent := [name for name in readers if name not in passed]:
        raise _unseen(model, f"the forward of this {model.shape.architecture} never passes {silent[0]}")


def keep(into: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    """A reader that puts what it sees into a dictionary."""

    def reader(value: Tensor) -> None:
        into[name] = value

    return reader


def _unseen(model: Model, what: str) -> ModelError:
    return ModelError(
        f"{what}, which must be held fixed",
        where=model.spec,
        remedy="Use an architecture with explicit attention patterns (attn_implementation='eager') and MLPs.",
    )
