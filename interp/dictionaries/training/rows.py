"""Training from activations that are already in memory."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..record import Port
from .sources import BUFFER, Pieces, digest


@dataclass(frozen=True, eq=False)
class Rows(Pieces):
    """Arrays as a :class:`.sources.Source`; a piece is one of ``parts``.

    Attributes:
        parts: for each piece, one [rows, D] per place.
        ports: site and model of each place.
        buffer: tokens shuffled together; part of the order.

    Raises:
        ValueError: no parts, or not one array for each place.
    """

    parts: tuple[tuple[Tensor, ...], ...]
    ports: tuple[Port, ...]
    buffer: int = BUFFER

    def __post_init__(self) -> None:
        if not self.parts or any(len(part) != len(self.ports) for part in self.parts):
            raise ValueError(f"each part needs an array for each of {len(self.ports)} places")

    @property
    def widths(self) -> tuple[int, ...]:
        """D of each place."""
        return tuple(column.shape[1] for column in self.parts[0])

    @property
    def digest(self) -> str:
        """Of the values, the places and the order."""
        seen = hashlib.sha256()
        for part in self.parts:
            for column in part:
                seen.update(column.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest(seen.hexdigest(), repr(self.ports), str(self.buffer))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each part."""
        return tuple(len(part[0]) for part in self.parts)

    def load(self, piece: int) -> tuple[Tensor, ...]:
        """The rows of a part."""
        return self.parts[piece]
