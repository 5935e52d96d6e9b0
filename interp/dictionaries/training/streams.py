"""What a dictionary is trained to turn into what, in units in which all places weigh alike.

Units: each place's mean is taken off and what is left divided by its root mean square, both estimated on the first
batches. Without it a model with larger activations would own a crosscoder. Both are folded into the finished
dictionary, which acts on activations as they are.

T tokens, D the width of a place.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .recipe import Kind

Batch = Sequence[Tensor]


@dataclass(frozen=True)
class Streams:
    """What is read and written, places side by side in columns.

    Attributes:
        x: [T, Σ D read].
        y: [T, Σ D written]; ``x`` itself, unless it is a transcoder's.
    """

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Units:
    """What was taken off and divided by.

    Attributes:
        reads, writes: widths of the places read and written.
        x_mean, y_mean: [Σ D].
        x_rms, y_rms: of each place, [places].
    """

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    x_mean: Tensor
    y_mean: Tensor
    x_rms: Tensor
    y_rms: Tensor

    def apply(self, raw: Streams) -> Streams:
        """``raw`` in these units."""
        x = (raw.x - self.x_mean) / spread(self.x_rms, self.reads)
        return Streams(x, x if raw.y is raw.x else (raw.y - self.y_mean) / spread(self.y_rms, self.writes))


def spread(each: Tensor, widths: Sequence[int]) -> Tensor:
    """A number per place as one per column."""
    return each.repeat_interleave(torch.tensor(widths, device=each.device))


def streams(kind: Kind, batch: Batch, *, massive: float | None) -> Streams:
    """What a dictionary of this kind makes of activations [T, D] at each place, without massive tokens."""
    if massive is not None:
        kept = ordinary(batch, massive)
        batch = [x[kept] for x in batch]
    if kind == "transcoder":
        return Streams(batch[0], batch[1])
    x = batch[1] - batch[0] if kind == "difference" else torch.cat(list(batch), 1)
    return Streams(x, x)


def joined(parts: Sequence[Streams]) -> Streams:
    """The tokens of all parts."""
    x = torch.cat([part.x for part in parts])
    return Streams(x, x if parts[0].y is parts[0].x else torch.cat([part.y for part in parts]))


def ordinary(batch: Batch, massive: float) -> Tensor:
    """Which tokens, bool [T], have at every place a norm of at most ``massive`` medians of the batch."""
    kept = torch.ones(len(batch[0]), dtype=torch.bool, device=batch[0].device)
    for x in batch:
        norms = x.norm(dim=1)
        kept &= norms <= massive * norms.median()
    return kept


def estimate(kind: Kind, widths: Sequence[int], batches: Sequence[Streams]) -> Units:
    """The units of these batches, in their dtype."""
    reads, writes = places(kind, widths)
    x_mean, x_rms = _moments([each.x for each in batches], reads)
    y_mean, y_rms = (x_mean, x_rms) if kind != "transcoder" else _moments([each.y for each in batches], writes)
    return Units(reads, writes, x_mean, y_mean, x_rms, y_rms)


def places(kind: Kind, widths: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths of what is read and of what is written."""
    if kind == "transcoder":
        return (widths[0],), (widths[1],)
    if kind == "difference":
        return (widths[0],), (widths[0],)
    return tuple(widths), tuple(widths)


def _moments(parts: Sequence[Tensor], widths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean of each column, and root mean square about it of each place; 1 where that is 0 (a model against itself)."""
    rows = sum(len(part) for part in parts)
    mean = sum(part.double().sum(0) for part in parts) / rows
    square = sum((part.double() - mean).square().sum(0) for part in parts) / rows
    rms = torch.stack([part.mean().sqrt() for part in square.split(list(widths))])  # pyright: ignore[reportAttributeAccessIssue]
    return mean.to(parts[0].dtype), torch.where(rms > 0, rms, 1.0).to(parts[0].dtype)  # pyright: ignore[reportAttributeAccessIssue]
