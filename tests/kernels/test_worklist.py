"""Pieces of groups of entries."""

import pytest
import torch

from heredity.kernels.ops.worklist import starts, worklist


@pytest.mark.parametrize("size", [1, 3, 4, 100])
@pytest.mark.parametrize("counts", [[], [0], [5], [0, 4, 0, 0, 1, 9, 8, 0], [12] * 5, [0] * 7, [1] * 6])
def test_every_entry_is_in_one_piece_of_its_group(counts: list[int], size: int) -> None:
    indptr = starts(torch.tensor(counts, dtype=torch.int64))
    total = sum(counts)
    work = worklist(indptr, size, total)
    entries = []
    for group, start, end in zip(work.group.tolist(), work.start.tolist(), work.end.tolist(), strict=True):
        assert end - start <= size
        if group == len(counts):
            assert start == end
        else:
            assert indptr[group] <= start <= end <= indptr[group + 1]
        entries += range(start, end)
    assert entries == list(range(total))
    # No group is without a piece, and only the pieces left over are of none.
    needed = [max(1, -(-count // size)) for count in counts]
    assert work.group.tolist()[: sum(needed)] == [group for group, n in enumerate(needed) for _ in range(n)]
    assert set(work.group.tolist()[sum(needed) :]) <= {len(counts)}
    assert work.first.tolist() == starts(torch.tensor(needed, dtype=torch.int64)).tolist()
