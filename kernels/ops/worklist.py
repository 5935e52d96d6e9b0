"""Consecutive entries of many groups cut into pieces, so that one program never gets more than its share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..features import starts


@dataclass(frozen=True, eq=False)
class Worklist:
    """Pieces of G groups of entries, group by group; a group without entries has one empty piece.

    There are as many as there can be at most, since counting those needed would stop for the device: what is left over
    is of group G and empty.

    Attributes:
        group: int64 [pieces], ascending.
        start: int64 [pieces], the first entry.
        end: int64 [pieces], one past the last.
        first: int64 [G + 1], pieces of group g stand at ``first[g]:first[g + 1]``.
    """

    group: Tensor
    start: Tensor
    end: Tensor
    first: Tensor


def worklist(indptr: Tensor, size: int, n_entries: int) -> Worklist:
    """Cut groups whose entries stand at ``indptr[g]:indptr[g + 1]`` into pieces of ``size``.

    Args:
        indptr: int64 [G + 1], ascending.
        size: entries of a piece; the last of a group may be smaller.
        n_entries: of all groups, ``indptr[-1]``.
    """
    n_groups = len(indptr) - 1
    pieces = indptr.diff().add_(size - 1).div_(size, rounding_mode="floor").clamp_(min=1)
    first = starts(pieces)
    each = torch.arange(n_entries // size + n_groups, device=indptr.device)
    group = torch.searchsorted(first[1:], each, right=True)
    start = indptr[group] + (each - first[group]) * size
    last = indptr[(group + 1).clamp_(max=n_groups)]
    return Worklist(group, torch.minimum(start, last), torch.minimum(start + size, last), first)
