"""Attribute on the CPU: products of gradients with active decoder rows, a few positions at a time."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...features import FeatureCSR

POSITIONS = 16
"""Multiplied together at most: their decoder rows stay in cache."""


def attribute(gradients: Sequence[Tensor], features: FeatureCSR, decoders: Sequence[Tensor]) -> Tensor:
    """See :func:`heredity.kernels.attribute`."""
    precise = torch.promote_types(gradients[0].dtype, torch.float32)
    out = torch.empty(features.nnz, gradients[0].shape[0], dtype=precise)
    ends, latents = features.indptr.tolist(), features.indices.long()
    for first, last in _blocks(ends):
        begin, most = ends[first], max(b - a for a, b in zip(ends[first:last], ends[first + 1 : last + 1], strict=True))
        # Shorter positions are filled up with whatever stands behind them.
        place = features.indptr[first:last, None] + torch.arange(most)
        rows = latents[place.clamp_(max=features.nnz - 1)].flatten()
        scores = torch.zeros(last - first, most, out.shape[1], dtype=precise)
        for gradient, decoder in zip(gradients, decoders, strict=True):
            directions = decoder.index_select(0, rows).view(last - first, most, -1).to(precise)
            scores.baddbmm_(directions, gradient[:, first:last].permute(1, 2, 0).to(precise))
        own = torch.arange(most) < features.indptr[first + 1 : last + 1, None] - features.indptr[first:last, None]
        out[begin : ends[last]] = scores[own]
    return out.T.to(gradients[0].dtype)


def _blocks(ends: list[int]) -> Iterator[tuple[int, int]]:
    """Runs of positions that hold something and of which no more than half would be filling."""
    todo = [(a, min(a + POSITIONS, len(ends) - 1)) for a in range(0, len(ends) - 1, POSITIONS)][::-1]
    while todo:
        first, last = todo.pop()
        counts = [ends[p + 1] - ends[p] for p in range(first, last)]
        if last - first > 1 and max(counts) * len(counts) > 2 * sum(counts):
            middle = (first + last) // 2
            todo += [(middle, last), (first, middle)]
        elif sum(counts):
            yield first, last
