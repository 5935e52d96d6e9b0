"""Successors with nothing new: the parent with a meaningless change of the same size as the real one.

Rows and columns of every tensor's change are shuffled and given random signs, which keeps its entries, rank and
singular values and loses only which directions it connects. (Between different architectures, where no change can be
formed, it is Gaussian noise in proportion to each tensor.) The change is then scaled until the 95th percentile of the
per-token KL on ordinary text equals the pair's. Equal norms do not make equal sizes: a scrambled full fine-tune was
seen to damage a small model far more than training had moved it, and a scrambled low-rank adapter hardly to act at
all. The percentile is set by the bulk of the text, so a new behaviour on less than a twentieth of it does not inflate
its own null; matching the median instead was tried and breaks whole skills of small models, which is damage, not drift.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from heredity.interp.model import Model

from .weights import parameters

STEPS = 8
"""Bisection steps on the logarithm of the scale, which is then known to 3 %."""

PERCENTILE = 95


def scrambled(change: Tensor, generator: torch.Generator) -> Tensor:
    """``change`` with every axis permuted and randomly signed."""
    out = change
    for axis in range(change.ndim):
        size = change.shape[axis]
        out = out.index_select(axis, torch.randperm(size, generator=generator))
        signs = torch.randint(0, 2, (size,), generator=generator).to(change.dtype) * 2 - 1
        out = out * signs.reshape([-1 if a == axis else 1 for a in range(change.ndim)])
    return out


class NullSuccessors:
    """Null successors of ``parent``, made one at a time in the weights of ``body`` (same parameters as the parent).

    ``body`` is the real successor, whose difference is scrambled, or (``noise``) a second copy of the parent, which
    gets noise. Its own weights come back after each use; only changed tensors are copied.
    """

    def __init__(self, parent: Model, body: Model, *, noise: bool = False) -> None:
        self.parent, self.body, self.noise = parent, body, noise

    @contextmanager
    def draw(self, seed: int, scale: float) -> Iterator[Model]:
        """Null successor number ``seed`` with its change multiplied by ``scale``."""
        generator = torch.Generator().manual_seed(seed)
        saved: list[tuple[Tensor, Tensor]] = []
        try:
            with torch.no_grad():
                for p, s in self._parameters():
                    if self.noise:
                        change = torch.randn(p.shape, generator=generator) * p.square().mean().sqrt()
                    elif (change := s - p).any():
                        change = scrambled(change, generator)
                    else:
                        continue
                    saved.append((s, s.clone()))
                    s.copy_(p + scale * change)
            yield self.body
        finally:
            with torch.no_grad():
                # Backwards, so that what shares memory with another comes back to its first value.
                for parameter, value in reversed(saved):
                    parameter.copy_(value)

    def matching_scale(self, size: Callable[[Model], float], target: float, seed: int) -> float:
        """The scale at which null successor ``seed`` has the size ``target`` (within 1/64 to 64)."""
        low, high = -6.0, 6.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            with self.draw(seed, 2.0**middle) as model:
                if size(model) < target:
                    low = middle
                else:
                    high = middle
        return 2.0 ** ((low + high) / 2)

    def _parameters(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(parameters(self.parent).values(), parameters(self.body).values(), strict=True)
