"""What training reads: batches in an order that depends on the seed alone, of which any part can be skipped.

A source consists of *pieces* (a shard, a few texts) whose number of rows is known beforehand. Pieces are drawn in
random order into a buffer, whose rows are drawn in random order. What is skipped is not read, so that a training that
was killed goes on at once where it was.

Row i of every place is the same token; models with other tokenizers are aligned (:func:`heredity.interp.align.align`).
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ...errors import TrainingError
from ..record import Port

BUFFER = 65_536
"""Tokens that are shuffled together, unless memory is short."""


@runtime_checkable
class Source(Protocol):
    """Activations to train on."""

    @property
    def ports(self) -> tuple[Port, ...]:
        """The places, in the order of the arrays."""
        ...

    @property
    def widths(self) -> tuple[int, ...]:
        """D of each place."""
        ...

    @property
    def n_tokens(self) -> int:
        """Rows in one pass."""
        ...

    @property
    def digest(self) -> str:
        """Names the content: two sources of one digest give the same batches."""
        ...

    def batches(self, *, batch: int, seed: int, skip: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Batches without end, float32 [batch, D] of each place, from the one after ``skip`` on."""
        ...


class Pieces(ABC):
    """What sources made of pieces share: the order of their rows.

    Attributes:
        buffer: tokens shuffled together.
        sizes: rows of each piece.
    """

    buffer: int

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """Rows of each piece."""

    @abstractmethod
    def load(self, piece: int) -> tuple[Tensor, ...]:
        """The rows of a piece at each place, [rows, D], in any floating dtype."""

    @property
    def n_tokens(self) -> int:
        """Rows in one pass."""
        return sum(self.sizes)

    def batches(self, *, batch: int, seed: int, skip: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """See :class:`Source`. What does not fill a batch at the end of a buffer is left out in that pass.

        Raises:
            TrainingError: there are fewer rows than one batch.
        """
        if self.n_tokens < batch:
            what = f"{self.n_tokens} tokens do not fill one batch of {batch}"
            raise TrainingError(what, where="batch", remedy="Lower batch, or give more text.")
        for number in count():
            generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
            order = torch.randperm(len(self.sizes), generator=generator).tolist()
            for group in self._groups(order, batch):
                rows = sum(self.sizes[piece] for piece in group)
                shuffled = torch.randperm(rows, generator=generator)
                whole = rows // batch
                first, skip = min(skip, whole), max(0, skip - whole)
                if first < whole:
                    yield from self._shuffled(group, shuffled[: whole * batch].split(batch)[first:])

    def _shuffled(self, group: Sequence[int], chosen: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        loaded = [self.load(piece) for piece in group]
        columns = [torch.cat(parts) for parts in zip(*loaded, strict=True)]
        del loaded
        for rows in chosen:
            yield tuple(column[rows].float() for column in columns)

    def _groups(self, order: Sequence[int], batch: int) -> Iterator[list[int]]:
        """Consecutive pieces of about ``buffer`` rows, at least a batch; all groups about the same size."""
        groups = max(1, round(self.n_tokens / max(self.buffer, batch)))
        each = -(-self.n_tokens // groups)
        group: list[int] = []
        rows = 0
        for piece in order:
            group.append(piece)
            rows += self.sizes[piece]
            if rows >= each:
                yield group
                group, rows = [], 0
        if group:
            yield group


def flat(site: str, shape: Sequence[int], where: str) -> int:
    """The width of a site of this shape.

    Raises:
        TrainingError: it has a row per head.
    """
    if len(shape) != 1:
        what = f"{site} has a row per head ({' x '.join(map(str, shape))})"
        raise TrainingError(what, where=where, remedy="Choose a site of one vector per token, such as attn_out@3.")
    return shape[0]


def digest(*parts: str) -> str:
    """One name for all of ``parts``."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
