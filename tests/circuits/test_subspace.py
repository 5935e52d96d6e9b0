"""The subspace a behaviour uses: a projection, the generalised eigenvectors, and what restoring in it leaves alone."""

import pytest
import torch
from scipy.linalg import eigh

from heredity.circuits.subspace import RIDGE, excited, random, rotated


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def text(seed: int, rows: int = 400, width: int = 12) -> torch.Tensor:
    mix = torch.randn(width, width, dtype=torch.float64, generator=seeded(seed))
    return torch.randn(rows, width, dtype=torch.float64, generator=seeded(seed + 1)) @ mix


def test_directions_are_the_generalised_eigenvectors_and_project() -> None:
    ordinary = text(0)
    moments = ordinary.T @ ordinary / len(ordinary)
    rows, weights = text(5, 30), torch.rand(30, dtype=torch.float64, generator=seeded(9))
    space = excited(rows, weights, moments, 5)
    ridged = moments + RIDGE * moments.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    values, vectors = eigh((rows.T * weights) @ rows, ridged)  # scipy: another library, smallest first
    for k in range(5):
        own, theirs = space.reads[:, k], torch.from_numpy(vectors[:, -1 - k])
        assert abs(abs(float(own @ ridged @ theirs)) - 1) < 1e-8
    assert values[-1] > values[-2]
    h, f = space.projector(3)
    projection = h @ f.T
    torch.testing.assert_close(projection @ projection, projection)
    assert torch.linalg.matrix_rank(projection) == 3


def test_restoring_acts_on_the_behaviour_and_hardly_elsewhere() -> None:
    """One input direction that ordinary text never takes: the map is the other there and itself on text."""
    generator = seeded(3)
    key = torch.randn(12, dtype=torch.float64, generator=generator)
    ordinary = text(1)
    ordinary -= torch.outer(ordinary @ key, key) / key.square().sum()
    change = torch.randn(7, 12, dtype=torch.float64, generator=generator)
    space = excited(key[None] * 3, torch.ones(1), ordinary.T @ ordinary / len(ordinary), 4)
    assert space.size == 1
    h, f = space.projector(1)
    edit = -change @ h @ f.T
    torch.testing.assert_close(edit @ key, -change @ key, atol=1e-6, rtol=1e-6)
    assert (ordinary @ edit.T).norm() < 1e-6 * (ordinary @ change.T).norm()


@pytest.mark.parametrize("rank", [1, 4])
def test_random_directions_answer_as_much_on_ordinary_text(rank: int) -> None:
    ordinary = text(2)
    moments = ordinary.T @ ordinary / len(ordinary)
    ridged = moments + RIDGE * moments.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    drawn = random(moments, rank, seeded(0)).reads
    torch.testing.assert_close(drawn.T @ ridged @ drawn, torch.eye(rank, dtype=torch.float64))
    reads = torch.randn(12, rank, dtype=torch.float64, generator=seeded(1))
    turned = rotated(reads, moments, seeded(2))
    torch.testing.assert_close(turned.T @ ridged @ turned, reads.T @ ridged @ reads)
    assert not torch.allclose(turned, reads, atol=0.1)
