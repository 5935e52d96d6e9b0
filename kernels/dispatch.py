"""Which implementation of an op serves a call: the first that can, or the one that was asked for.

Whoever can't serve a call has a reason, so that a surprise (a GPU that is not used) can be looked up with
:meth:`Op.explain`. Asking by argument goes before asking by :func:`use`, and that before the environment:
``HEREDITY_KERNELS=cpu``, or for single ops ``HEREDITY_KERNELS=decode:reference,encode:triton``.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

VARIABLE = "HEREDITY_KERNELS"

OPS = ("encode", "decode", "backward", "attribute", "statistics")

_asked: ContextVar[str | None] = ContextVar("asked", default=None)


@dataclass(frozen=True)
class Op:
    """An op of this package: one function in three modules, the most wanted first.

    Attributes:
        name: of the op, and of the function in each module.
        package: that holds the modules ``cpu``, ``gpu`` (for the implementation ``triton``) and ``reference``.
        tensor: for a call's arguments, a tensor whose device and dtype decide who can serve it.
    """

    name: str
    package: str
    tensor: Callable[..., Tensor]

    def __call__(self, *args: Any, impl: str | None = None) -> Any:
        """Run the op, recording no gradients.

        Raises:
            ValueError: the implementation asked for does not exist or can't serve this call, or one was asked for an
                op that does not exist.
        """
        wanted = impl or _named(self.name, _asked.get()) or _named(self.name, os.environ.get(VARIABLE))
        reasons = self.explain(*args)
        chosen = wanted or next(name for name, reason in reasons.items() if reason is None)
        if chosen not in reasons:
            raise ValueError(f"{self.name} has no implementation {chosen!r}; there are {', '.join(reasons)}")
        if reason := reasons[chosen]:
            raise ValueError(f"{self.name}: implementation {chosen!r} can't serve this call: {reason}")
        function = getattr(import_module(f".{_MODULES[chosen]}", self.package), self.name)
        device = self.tensor(*args).device
        # Triton launches on the current device, wherever its tensors are.
        with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return function(*args)

    def explain(self, *args: Any) -> dict[str, str | None]:
        """Per implementation, why it can't serve this call, or None."""
        tensor = self.tensor(*args)
        return {"cpu": _no_cpu(tensor), "triton": _no_triton(tensor), "reference": None}


_MODULES = {"cpu": "cpu", "triton": "gpu", "reference": "reference"}


def _no_cpu(tensor: Tensor) -> str | None:
    return None if tensor.device.type == "cpu" else f"the tensors are on {tensor.device}"


def _no_triton(tensor: Tensor) -> str | None:
    if tensor.dtype == torch.float64:
        return "float64 is left to the reference"
    if reason := no_driver():
        return reason
    if tensor.device.type != "cuda" and not _interpreted():
        return f"the tensors are on {tensor.device}"
    return None


@contextmanager
def use(asked: str) -> Iterator[None]:
    """Within the block, ask for implementations, spelled as in the environment variable."""
    token = _asked.set(asked)
    try:
        yield
    finally:
        _asked.reset(token)


def _named(op: str, asked: str | None) -> str | None:
    """The implementation of ``op`` that ``asked`` names."""
    found = None
    for part in filter(None, map(str.strip, (asked or "").split(","))):
        name, _, implementation = part.rpartition(":")
        if name not in ("", *OPS):
            raise ValueError(f"{VARIABLE} or use(…) asks for {part!r}; the ops are {', '.join(OPS)}")
        if name in ("", op):
            found = found or implementation
    return found


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def no_driver() -> str | None:
    """Why Triton kernels can't run here, or None. Keyed on an active driver: that triton imports says nothing."""
    if _interpreted():
        return None
    try:
        from triton.runtime import driver

        target: Any = driver.active.get_current_target()
    except ImportError:
        return "triton is not installed"
    except RuntimeError as error:
        return f"triton has no active driver ({error})"
    if target.backend != "cuda" or target.arch < 80:
        return f"needs compute capability 8.0 or later, here {target.backend} {target.arch}"
    return None
