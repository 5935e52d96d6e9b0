"""Where a direction of one model would lie in the other: a linear map fitted on paired activations.

Where two models share no basis (other widths, or a rotation between them), a direction of the successor means nothing
in the parent as it stands. The map that predicts the parent's activations from the successor's carries it over
(ridge regression, as in model stitching; Bansal et al. 2021).
"""

import torch
from torch import Tensor

from ..record import Dictionary
from .moments import Moments

RIDGE = 1e-3
"""Penalty, relative to the mean variance of the activations mapped from."""


def same_basis(dictionary: Dictionary) -> bool:
    """Whether directions of one model mean the same in the other: equal widths, and decoder rows that point alike.

    They do when the norm-weighted mean cosine of the two rows of all latents is above ½ (a fine-tuned model stays
    close to 1, a rotation brings it to 0), or no latent writes to both.
    """
    parent, successor = dictionary.W_dec
    if parent.shape != successor.shape:
        return False
    alike = (parent.double() * successor.double()).sum()
    possible = (parent.double().norm(dim=1) * successor.double().norm(dim=1)).sum()
    return bool(possible == 0) or bool(alike / possible > 0.5)


def stitch(sums: Moments, source: int) -> Tensor:
    """The map [D_source, D_target] from model ``source`` to the other, fitted with an intercept.

    Raises:
        ValueError: the moments hold no products.
    """
    if sums.products is None:
        raise ValueError("a stitch needs moments(…, products=True)")
    parent, between, successor = sums.products
    own, across = (parent, between) if source == 0 else (successor, between.T)
    here, there = sums.mean[source], sums.mean[1 - source]
    covariance = own / sums.n_tokens - torch.outer(here, here)
    across = across / sums.n_tokens - torch.outer(here, there)
    ridge = RIDGE * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    eye = torch.eye(len(here), dtype=torch.float64, device=here.device)
    return torch.linalg.solve(covariance + ridge * eye, across)
