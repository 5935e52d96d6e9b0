"""Latent scaling: does the other model hold what a latent writes, after all? In closed form, in one pass.

A crosscoder can call a latent exclusive for two wrong reasons. *Complete shrinkage*: the sparsity penalty drove a small
decoder row of the other model to zero, and its reconstruction error still holds the concept. *Latent decoupling*: the
other model writes the same concept through other latents. Both show when the latent's activation, times its direction,
is fitted to the other model (Minder et al. 2504.02922, §2.2):

    β_m = argmin Σ_x ‖Y_m(x) − β f(x) v_m‖² = ⟨Σ f·Y_m, v_m⟩ / (Σ f² · ‖v_m‖²)

with Y the model's error plus the latent's own contribution (ν^ε), or its reconstruction from latents (ν^r, without the
bias: what every token shares is no latent's work). ν is β of the other model over β of the one that owns the latent,
so that exchanging parent and successor changes no ν.

**Directions.** In the owner, v is its decoder row d. In the other, of the same length in units of each model's
activations: ``same`` direction where both models have one basis; else the other model's ``own`` decoder row where it
has one, else d carried over by a linear map (``stitched``).

F latents, D_m the width of model m (0 parent, 1 successor).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..record import Dictionary
from .moments import Moments, moments
from .norms import norms
from .stitch import same_basis, stitch

WAYS = ("same", "own", "stitched")
NEGLIGIBLE = 0.1
"""A decoder row below this share of the owner's is not trusted to point anywhere."""


@dataclass(frozen=True, eq=False)
class Scaling:
    """Latent scaling of all F latents.

    Attributes:
        owner: int64 [F], the model with the larger decoder row (0 parent, 1 successor).
        nu_error: ν^ε [F], 0 where the other model holds nothing of the latent, about 1 where it is shared; NaN where
            the latent is never active.
        nu_reconstruction: ν^r [F].
        way: int64 [F], index into :data:`WAYS`: where the direction in the other model came from.
        direction: per model [F, D_m], the directions used, of length 1 (0 where the latent writes nothing).
        carried: [F], length at which a unit of the owner's direction arrives in the other model, each in its own units:
            near 0, a stitched direction is chance; 1 where it was not stitched.
        unit: [F], what one unit of ν^ε is in the other model: Σ f² · ‖v‖ · β of the owner.
        sums: what it was computed from.
    """

    owner: Tensor
    nu_error: Tensor
    nu_reconstruction: Tensor
    way: Tensor
    direction: tuple[Tensor, Tensor]
    carried: Tensor
    unit: Tensor
    sums: Moments


def latent_scaling(dictionary: Dictionary, batches: Iterable[Sequence[Tensor]]) -> Scaling:
    """ν^ε and ν^r of every latent.

    Args:
        dictionary: a crosscoder of a parent and a successor.
        batches: (parent [T, D_0], successor [T, D_1]), row by row the same token. Read once; not the tokens the
            dictionary was trained on, if ν is to be of use on others.

    Raises:
        ValueError: no tokens, or the dictionary is not of two models.
    """
    in_step = same_basis(dictionary)
    sums = moments(dictionary, batches, products=not in_step)
    length = norms(dictionary, sums.scales)
    owner = (length[1] >= length[0]).long()
    direction, way, carried = _directions(dictionary, sums, owner, length, in_step)
    size = length.amax(0)
    betas = [_betas(dictionary, sums, m, direction[m], size * sums.scales[m]) for m in range(2)]
    error, written = (torch.stack([model[i] for model in betas]) for i in range(2))
    of_other, of_owner = (1 - owner)[None], owner[None]
    at_owner = error.gather(0, of_owner)[0]
    scales = torch.tensor(sums.scales, dtype=torch.float64, device=size.device)
    return Scaling(
        owner=owner,
        nu_error=error.gather(0, of_other)[0] / at_owner,
        nu_reconstruction=written.gather(0, of_other)[0] / written.gather(0, of_owner)[0],
        way=way,
        direction=direction,
        carried=carried,
        unit=sums.square * size * scales[1 - owner] * at_owner,
        sums=sums,
    )


def held(dictionary: Dictionary, sums: Moments, model: int, latents: Tensor) -> Tensor:
    """Σ f·(error + own contribution) of some latents [n] in one model, [n, D]: what ν^ε is a projection of."""
    return sums.error[model][latents] + sums.square[latents, None] * dictionary.W_dec[model][latents].double()


def _betas(
    dictionary: Dictionary, sums: Moments, model: int, direction: Tensor, length: Tensor
) -> tuple[Tensor, Tensor]:
    """β of the error and of the reconstruction [F], for directions of the given ``length`` [F]."""
    own = (dictionary.W_dec[model].double() * direction).sum(1) * sums.square
    energy = sums.square * length
    error = ((sums.error[model] * direction).sum(1) + own) / energy
    return error, (sums.written[model] * direction).sum(1) / energy


def _directions(
    dictionary: Dictionary, sums: Moments, owner: Tensor, length: Tensor, in_step: bool
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Unit directions per model, the way to the other model's, and the length at which they arrive there."""
    rows = [unit(decoder.double()) for decoder in dictionary.W_dec]
    trusted = length.amin(0) >= NEGLIGIBLE * length.amax(0)
    out, carried = [], torch.ones_like(length[0])
    for m in range(2):
        elsewhere = rows[1 - m] if in_step else rows[1 - m] @ stitch(sums, 1 - m)
        keep = owner == m if in_step else (owner == m) | trusted
        out.append(torch.where(keep[:, None], rows[m], unit(elsewhere)))
        arrives = elsewhere.norm(dim=1) * sums.scales[1 - m] / sums.scales[m]
        carried = torch.where(keep | (owner == m), carried, arrives)
    way = torch.zeros_like(owner) if in_step else torch.where(trusted, 1, 2)
    return (out[0], out[1]), way, torch.ones_like(carried) if in_step else carried


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays."""
    length = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(length > 0, length, torch.ones_like(length))
