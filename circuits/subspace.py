"""The inputs of a linear map that a behaviour uses and ordinary text does not: in which of them it is put back.

With K = Σ wₜ·xₜ·xₜᵀ over the behaviour's tokens (weighted by how much the map's change matters there) and C = E[x·xᵀ]
over ordinary text, the generalised eigenvectors K f = λ C f, largest λ first, are the directions that the behaviour
excites most for what they answer elsewhere. With h = C f they are dual (fᵢᵀhⱼ = δᵢⱼ), so Π = Σ h fᵀ over the first r of
them is a projection, and W ← W − ΔW·Π makes the map the parent's on that subspace of its input and leaves it elsewhere.

It is the metric of rank-one model editing (Meng et al. 2202.05262, eq. 2: keys read through C⁻¹), applied to the
difference of two models instead of to a new fact.

Shapes: D the map's input, T tokens, r directions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-3
"""Of the mean eigenvalue of C: fewer positions than dimensions leave it singular."""


@dataclass(frozen=True)
class Subspace:
    """Directions f (``reads`` [D, r]) and their duals h (``carries`` [D, r]), strongest first, float64."""

    reads: Tensor
    carries: Tensor

    def projector(self, rank: int) -> tuple[Tensor, Tensor]:
        """The factors (h, f) of Π for the first ``rank`` directions."""
        return self.carries[:, :rank], self.reads[:, :rank]

    @property
    def size(self) -> int:
        """Directions held."""
        return self.reads.shape[1]


def excited(rows: Tensor, weights: Tensor, ordinary: Tensor, most: int) -> Subspace:
    """The ``most`` directions that ``rows`` [T, D], weighted by ``weights`` [T], excite most against ``ordinary`` text
    (C [D, D])."""
    factor = _factor(ordinary)
    scaled = rows.double() * weights.double().clamp_min(0).sqrt()[:, None]
    # Left singular vectors of L⁻¹X are eigenvectors of L⁻¹KL⁻ᵀ.
    u, s, _ = torch.linalg.svd(torch.linalg.solve_triangular(factor, scaled.T, upper=False), full_matrices=False)
    kept = int((s > s[:1] * 1e-6).sum()) if len(s) and s[0] > 0 else 0
    return _of(factor, u[:, : min(most, kept)])


def random(ordinary: Tensor, count: int, generator: torch.Generator) -> Subspace:
    """``count`` directions drawn uniformly where ``ordinary`` is white."""
    drawn = torch.randn(len(ordinary), count, dtype=torch.float64, generator=generator)
    return _of(_factor(ordinary), torch.linalg.qr(drawn)[0])


def rotated(reads: Tensor, ordinary: Tensor, generator: torch.Generator) -> Tensor:
    """``reads`` [D, r] turned at random where ``ordinary`` is white, so that they answer as much there."""
    factor = _factor(ordinary)
    turn = torch.linalg.qr(torch.randn(len(ordinary), len(ordinary), dtype=torch.float64, generator=generator))[0]
    return torch.linalg.solve_triangular(factor.T, turn @ (factor.T @ reads.double()), upper=True)


def _factor(ordinary: Tensor) -> Tensor:
    c = ordinary.double()
    ridge = RIDGE * c.diagonal().mean().clamp_min(1e-30)
    return torch.linalg.cholesky(c + ridge * torch.eye(len(c), dtype=c.dtype))


def _of(factor: Tensor, vectors: Tensor) -> Subspace:
    return Subspace(torch.linalg.solve_triangular(factor.T, vectors, upper=True), factor @ vectors)
