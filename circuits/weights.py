"""The weight difference of two models of one architecture: its leading directions read through the vocabulary.

Sources: WeightWatch (arXiv 2508.00161) for the SVD of the change of matrices that write to the residual stream;
Millidge & Black 2022 for reading singular vectors through embedding and unembedding.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from heredity.interp.model import Model
from heredity.interp.readout import embedding, nearest_tokens, unembedding

TOKENS = 8
"""Tokens listed per direction."""


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of both models as y = x·W, [d_in, d_out]."""

    name: str
    parent: Tensor
    successor: Tensor
    reads: bool
    """Its input is the residual stream."""
    writes: bool
    """Its output is added to the residual stream."""


@dataclass(frozen=True)
class Direction:
    """A leading singular direction of one matrix's change."""

    tensor: str
    rank: int
    singular_value: float
    share: float
    relative_change: float
    reads: tuple[str, ...]
    writes: tuple[str, ...]


_PARTS = {"qkv": "q", "gate_up_proj": "gate"}


def parameters(model: Model) -> dict[str, Tensor]:
    """Every parameter the forward uses, once.

    The wrapper splits joint matrices into parts and keeps the whole beside them, on the same memory or unused: of
    these only the parts are listed.
    """
    named = cast(nn.Module, model.bridge.original_model).named_parameters()
    found = {name.replace("._original_component", ""): value.detach() for name, value in named}
    modules = {name.rpartition(".")[0] for name in found}

    def split(name: str) -> bool:
        holder, _, last = name.rpartition(".")[0].rpartition(".")
        return last in _PARTS and f"{holder}.{_PARTS[last]}" in modules

    return {name: value for name, value in found.items() if not split(name)}


def comparable(parent: Model, successor: Model) -> bool:
    """Whether the two models have the same parameters, name by name and shape by shape."""
    shapes = [{name: value.shape for name, value in parameters(model).items()} for model in (parent, successor)]
    return shapes[0] == shapes[1]


def relative_distance(parent: Model, successor: Model) -> float:
    """‖θ_S − θ_P‖ / ‖θ_P‖ over all parameters."""
    change = size = 0.0
    for p, s in zip(parameters(parent).values(), parameters(successor).values(), strict=True):
        change += float((s - p).double().square().sum())
        size += float(p.double().square().sum())
    return (change / size) ** 0.5


def directions(parent: Model, successor: Model, *, count: int, per_matrix: int = 1) -> list[Direction]:
    """The ``count`` leading directions of change over all matrices, largest singular value first."""
    found = []
    for matrix in _matrices(parent, successor):
        change = matrix.successor - matrix.parent
        norm = float(change.norm())
        if norm == 0:
            continue
        rank = min(per_matrix, *change.shape)
        # Randomised SVD: two power iterations suffice for the leading directions (Halko et al. 2011).
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(change, q=min(rank + 4, *change.shape), niter=2)
        for k in range(rank):
            found.append((float(s[k]), matrix, u[:, k], v[:, k], k, norm))
    found.sort(key=lambda item: (-item[0], item[1].name))
    read_matrix, write_matrix = embedding(parent), unembedding(parent)
    out = []
    for value, matrix, u, v, k, norm in found[:count]:
        reads = _oriented(parent, read_matrix @ u) if matrix.reads else ()
        writes = _oriented(parent, write_matrix @ v) if matrix.writes else ()
        relative = norm / float(matrix.parent.norm())
        out.append(Direction(matrix.name, k, value, value**2 / norm**2, relative, reads, writes))
    return out


def _oriented(model: Model, scores: Tensor) -> tuple[str, ...]:
    """Tokens of a direction whose sign is arbitrary: the side with the larger extreme."""
    return nearest_tokens(model, scores if scores.max() >= -scores.min() else -scores, TOKENS)


def _matrices(parent: Model, successor: Model) -> Iterator[Matrix]:
    for layer in range(parent.shape.n_layers):
        blocks = [model.bridge.blocks[layer] for model in (parent, successor)]
        for path, reads, writes in (
            ("attn.q", True, False),
            ("attn.k", True, False),
            ("attn.v", True, False),
            ("attn.qkv", True, False),
            ("attn.o", False, True),
            ("mlp.gate", True, False),
            ("mlp.in", True, False),
            ("mlp.out", False, True),
        ):
            parts = [_linear(block, path) for block in blocks]
            if path == "attn.qkv" and _linear(blocks[0], "attn.q") is not None:
                continue  # its parts have been listed
            if parts[0] is not None and parts[1] is not None:
                yield Matrix(f"blocks.{layer}.{path}", parts[0], parts[1], reads, writes)


def _linear(block: nn.Module, path: str) -> Tensor | None:
    """The weight of a block's submodule as [d_in, d_out], or None where the architecture has none of that name."""
    module: nn.Module | None = block
    for name in path.split("."):
        module = getattr(module, "_modules", {}).get(name)
        if module is None:
            return None
    component = getattr(module, "original_component", module)
    weight = getattr(component, "weight", None)
    if weight is None or weight.ndim != 2:
        return None
    return weight.detach() if type(component).__name__ == "Conv1D" else weight.detach().T
