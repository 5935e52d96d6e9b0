"""Training from arrays in memory: every row once a pass, the places in step, named by content."""

import pytest
import torch

from heredity.interp.dictionaries.record import Port
from heredity.interp.dictionaries.training.rows import Rows
from heredity.interp.dictionaries.training.sources import Source

PORTS = (Port("mlp_out@1", 0), Port("mlp_out@1", 1))


def rows(scale: float = 1.0, ports: tuple[Port, ...] = PORTS) -> Rows:
    one = torch.arange(60.0)[:, None] * torch.ones(3)
    return Rows(((one[:40], scale * 100 + one[:40]), (one[40:], scale * 100 + one[40:])), ports)


def test_every_row_once_and_both_places_in_step() -> None:
    source = rows()
    assert isinstance(source, Source) and source.widths == (3, 3) and source.n_tokens == 60
    batches = source.batches(batch=10, seed=1)
    seen = [next(batches) for _ in range(6)]
    assert sorted(torch.cat([a[:, 0] for a, _ in seen]).tolist()) == list(range(60))
    assert all(torch.equal(b, a + 100) for a, b in seen)
    skipped = next(source.batches(batch=10, seed=1, skip=4))
    assert torch.equal(skipped[0], seen[4][0])


def test_another_content_or_place_is_another_source() -> None:
    assert rows().digest == rows().digest != rows(2.0).digest
    assert rows().digest != rows(ports=(Port("mlp_out@2", 0), Port("mlp_out@1", 1))).digest


def test_each_part_needs_every_place() -> None:
    with pytest.raises(ValueError, match="an array for each of 2 places"):
        Rows(((torch.zeros(3, 2),),), PORTS)
