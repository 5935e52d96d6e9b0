"""What a contestant is: per op, something to run, and how to read the result of it for the check.

Each file of this folder has a ``TASKS``: op → variant → function of the inputs that makes a :class:`Task`. What it does
before it returns (copying weights into a module, laying out activations the way the package holds them) is not timed.
``LACKS`` says why a package has no row for an op. Packages are imported inside functions, since the table is made in an
environment without them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Arrays = dict[str, Tensor]

FEW = 64
"""Tokens of the case in which fewer than k latents are above zero."""


class Task(NamedTuple):
    """One op of one contestant.

    Attributes:
        run: what is timed.
        read: turns its result into arrays with the names the check knows.
        gives: form of the result, for the table.
        parameters: their gradients are dropped before each run, as an optimiser does.
        grad: whether autograd is on.
    """

    run: Callable[[], Any]
    read: Callable[[Any], Arrays]
    gives: str
    parameters: Sequence[Tensor] = ()
    grad: bool = False


@dataclass(frozen=True)
class Inputs:
    """Arrays of ``workload.draw``, and k; ``acts`` are activations of the tokens, ``spot`` of a prompt's positions."""

    arrays: Arrays
    k: int

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    @property
    def shifted(self) -> Tensor:
        """Encoder bias for packages that subtract the decoder's bias from their input."""
        b_enc, b_dec, encoder = (self.arrays[name].double() for name in ("b_enc", "b_dec", "W_enc"))
        return (b_enc + b_dec @ encoder).float()

    def at(self, name: str) -> tuple[Tensor, Tensor]:
        """(token, latent) of each entry, int64 [N]."""
        indptr = self.arrays[f"{name}_indptr"]
        every = torch.arange(len(indptr) - 1, device=indptr.device)
        return torch.repeat_interleave(every, indptr.diff()), self.arrays[f"{name}_indices"].long()

    def values(self, name: str) -> Tensor:
        return self.arrays[f"{name}_values"]

    def dense(self, name: str) -> Tensor:
        """[tokens, F]"""
        out = self.values(name).new_zeros(len(self.arrays[f"{name}_indptr"]) - 1, len(self.arrays["W_dec"]))
        out[self.at(name)] = self.values(name)
        return out

    def coo(self, name: str) -> Tensor:
        """Sparse [tokens, F], coalesced, as it is already in order."""
        shape = (len(self.arrays[f"{name}_indptr"]) - 1, len(self.arrays["W_dec"]))
        return torch.sparse_coo_tensor(torch.stack(self.at(name)), self.values(name), shape, is_coalesced=True)


def read_dense(acts: Tensor) -> Arrays:
    """Active latents of a matrix [T, F]."""
    tokens, latents = acts.nonzero(as_tuple=True)
    return {"tokens": tokens, "latents": latents, "values": acts[tokens, latents]}


def read_top(values: Tensor, indices: Tensor) -> Arrays:
    """Active latents of values and latents [T, k] in any order."""
    order = indices.argsort(dim=1)
    values, latents = values.gather(1, order), indices.gather(1, order)
    tokens = torch.arange(len(values))[:, None].expand_as(latents)
    above = values > 0
    return {"tokens": tokens[above], "latents": latents[above], "values": values[above]}


def read_step(reconstruction: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> Arrays:
    """A training step: what came out, and the gradients of parameters [D, F], [F] and [F, D]."""
    return {"reconstruction": reconstruction.detach(), "W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec}


def unshifted(W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """The encoder's gradient, were the decoder's bias not subtracted from the input."""
    return W_enc + b_dec[:, None] * b_enc
