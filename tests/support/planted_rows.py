"""Activations of planted concepts as a source to train on, and a recipe for them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heredity.interp.dictionaries import Port
from heredity.interp.dictionaries.training import Recipe

CONCEPTS, TOKENS = 48, 8192


def concepts(*widths: int, scales: tuple[float, ...] = (), seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Activations of sparse concepts in models of these widths, and their directions, with a mean far from zero."""
    draws = torch.Generator().manual_seed(seed)
    present = torch.rand(TOKENS, CONCEPTS, generator=draws) < 0.06
    z = present * (0.5 + torch.rand(TOKENS, CONCEPTS, generator=draws))
    directions = [
        torch.nn.functional.normalize(torch.randn(CONCEPTS, width, generator=draws), dim=1) for width in widths
    ]
    offset = [3 * torch.randn(width, generator=draws) for width in widths]
    scales = scales or (1.0,) * len(widths)
    x = [scale * (z @ rows + mean) for rows, mean, scale in zip(directions, offset, scales, strict=True)]
    return x, directions


@dataclass
class Rows:
    """Rows in memory as a source, drawn at random."""

    x: list[Tensor]
    ports: tuple[Port, ...] = ()
    digest: str = "made up"
    drawn: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ports = self.ports or tuple(Port("resid_post@1", m) for m in range(len(self.x)))

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(x.shape[1] for x in self.x)

    @property
    def n_tokens(self) -> int:
        return len(self.x[0])

    def batches(self, *, batch: int, seed: int, skip: int = 0) -> Iterator[tuple[Tensor, ...]]:
        number = skip
        while True:
            self.drawn.append(number)
            draws = torch.Generator().manual_seed(1000 * seed + number)
            rows = torch.randint(self.n_tokens, (batch,), generator=draws)
            yield tuple(x[rows] for x in self.x)
            number += 1


def recipe(kind: str = "sae", **changes: Any) -> Recipe:
    given = {"kind": kind, "latents": 64, "k": 3, "batch": 256, "tokens": 256 * 100, "rate": 0.02, "seed": 1}
    return Recipe(**{**given, **changes})
