"""Latent scaling: does the other model hold what a latent writes, after all? In closed form, in one pass.

A crosscoder can call a latent exclusive for two wrong reasons. *Complete shrinkage*: the sparsity penalty drove a small
decoder row of the other model to zero, and its reconstruction error still holds the concept. *Latent decoupling*: the
other model writes the same concept through other latents. Both show when the latent's activation, times its direction,
is fitted to the other model (Minder et al. 2504.02922, §2.2):

    β_m = argmin Σ_x ‖Y_m(x) − β f(x) v_m‖² = ⟨Σ f·Y_m, v_m⟩ / (Σ f² · ‖v_m‖²)

with Y the model's error plus the latent's own contribution (ν^ε), or its reconstruction (ν^r). The latter is fitted
with an intercept, unlike in the paper: what the reconstruction holds at every token is no sign of the latent. ν is β of
the other model over β of the one that owns the latent, so that exchanging parent and successor changes no ν.

Error and reconstruction can deceive together. Where many latents write a little of everything (tied rows under a low
price), the reconstruction of *either* model holds some of every concept, and its error takes back what is too much: a
weak concept then has ν^ε 0 and hardly more ν^r than one that is not there. Their sum is Y = the activations themselves
(ν^x, with an intercept), of which a dictionary can be wrong in no way.

**Directions.** In the owner, v is its decoder row d. In the other, of the same length in units of each model's
activations: the other model's ``own`` decoder row where it is long enough to point anywhere; else the ``same``
direction where both models have one basis; else the direction of the model's ``response``, the slope of its activations
on f. (A linear map fitted between the models would do for a rotation. Where more concepts than dimensions are packed
differently, none exists: each direction is carried to a mixture. The latent's activation tells its concept from those
it overlaps.)

F latents, D_m the width of model m (0 parent, 1 successor).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..record import Dictionary
from .moments import Moments, moments
from .norms import norms

WAYS = ("own", "same", "response")
NEGLIGIBLE = 0.25
"""A decoder row below this share of the owner's is not trusted to point anywhere: training leaves rows of noise."""


@dataclass(frozen=True, eq=False)
class Scaling:
    """Latent scaling of all F latents.

    Attributes:
        owner: int64 [F], the model with the larger decoder row (0 parent, 1 successor).
        nu_error: ν^ε [F], 0 where the other model holds nothing of the latent, about 1 where it is shared; NaN where
            the latent is never active.
        nu_reconstruction: ν^r [F].
        nu_activation: ν^x [F], of the activations: what their error and reconstruction come to together.
        trace: [F], what the other model holds of the latent in whatever direction: the length of the mean of what ν^ε
            is a projection of, less what chance makes of it, in the units of ν^ε. Needs no direction, but takes every
            imperfection of the dictionary for a trace.
        way: int64 [F], index into :data:`WAYS`: where the direction in the other model came from.
        direction: per model [F, D_m], the directions used, of length 1 (0 where the latent writes nothing).
        carried: [F], the length of the response, 1 for a shared concept; near 0 its direction is chance. 1 where the
            direction is not the response's.
        unit: [F], what one unit of ν^ε is in the other model: Σ f² · ‖v‖ · β of the owner.
        unit_activation: [F], what one unit of ν^x is in the other model's :func:`response`: ‖v‖ · β of the owner.
        sums: what it was computed from.
    """

    owner: Tensor
    nu_error: Tensor
    nu_reconstruction: Tensor
    nu_activation: Tensor
    trace: Tensor
    way: Tensor
    direction: tuple[Tensor, Tensor]
    carried: Tensor
    unit: Tensor
    unit_activation: Tensor
    sums: Moments


def latent_scaling(dictionary: Dictionary, batches: Iterable[Sequence[Tensor]]) -> Scaling:
    """ν^ε, ν^r and ν^x of every latent.

    Args:
        dictionary: a crosscoder of a parent and a successor.
        batches: (parent [T, D_0], successor [T, D_1]), row by row the same token. Read once; not the tokens the
            dictionary was trained on, if ν is to be of use on others.

    Raises:
        ValueError: no tokens, or the dictionary is not of two models.
    """
    sums = moments(dictionary, batches)
    length = norms(dictionary, sums.scales)
    owner = (length[1] >= length[0]).long()
    direction, way, carried = _directions(dictionary, sums, owner, length)
    size = length.amax(0)
    betas = [_betas(dictionary, sums, m, direction[m], size * sums.scales[m]) for m in range(2)]
    error, written, activation = (torch.stack([model[i] for model in betas]) for i in range(3))
    of_other, of_owner = (1 - owner)[None], owner[None]
    at_owner = error.gather(0, of_owner)[0]
    scales = torch.tensor(sums.scales, dtype=torch.float64, device=size.device)
    there = size * scales[1 - owner]
    one, one_activation = sums.square * there * at_owner, there * activation.gather(0, of_owner)[0]
    every = torch.arange(len(owner), device=owner.device)
    mean = torch.stack([held(dictionary, sums, m, every).square().sum(1) - sums.error_energy[m] for m in range(2)])
    return Scaling(
        owner=owner,
        nu_error=error.gather(0, of_other)[0] / at_owner,
        nu_reconstruction=written.gather(0, of_other)[0] / written.gather(0, of_owner)[0],
        nu_activation=activation.gather(0, of_other)[0] / activation.gather(0, of_owner)[0],
        trace=mean.gather(0, of_other)[0].clamp_min(0).sqrt() / one,
        way=way,
        direction=direction,
        carried=carried,
        unit=one,
        unit_activation=one_activation,
        sums=sums,
    )


def held(dictionary: Dictionary, sums: Moments, model: int, latents: Tensor) -> Tensor:
    """Σ f·(error + own contribution) of some latents [n] in one model, [n, D]: what ν^ε is a projection of."""
    return sums.error[model][latents] + sums.square[latents, None] * dictionary.W_dec[model][latents].double()


def _betas(
    dictionary: Dictionary, sums: Moments, model: int, direction: Tensor, length: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """β of error, reconstruction and activations [F], for directions of the given ``length`` [F]."""
    own = (dictionary.W_dec[model].double() * direction).sum(1) * sums.square
    energy = sums.square * length
    error = ((sums.error[model] * direction).sum(1) + own) / energy
    along = (sums.written[model] * direction).sum(1) - sums.total * (direction @ sums.written_mean[model])
    whole = (response(dictionary, sums, model) * direction).sum(1) / length
    return error, along / (sums.variance * length), whole


def same_basis(dictionary: Dictionary) -> bool:
    """Whether directions of one model mean the same in the other.

    Models of one width are taken to share their basis (a fine-tuned model does), unless the dictionary shows otherwise:
    the mean cosine of the two decoder rows of latents that write to both, at least 30 of them, is below ½.
    """
    parent, successor = (decoder.double() for decoder in dictionary.W_dec)
    if parent.shape != successor.shape:
        return False
    length = norms(dictionary)
    both = length.amin(0) >= NEGLIGIBLE * length.amax(0)
    cosines = (unit(parent) * unit(successor)).sum(1)[both & (length.amax(0) > 0)]
    return len(cosines) < 30 or bool(cosines.mean() > 0.5)


def _directions(
    dictionary: Dictionary, sums: Moments, owner: Tensor, length: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Unit directions per model, the way to the other model's, and the length of the response there."""
    rows = [unit(decoder.double()) for decoder in dictionary.W_dec]
    trusted = length.amin(0) >= NEGLIGIBLE * length.amax(0)
    in_step = same_basis(dictionary)
    out, carried = [], torch.ones_like(length[0])
    for m in range(2):
        slope = response(dictionary, sums, m)
        elsewhere = rows[1 - m] if in_step else unit(slope)
        out.append(torch.where(((owner == m) | trusted)[:, None], rows[m], elsewhere))
        if not in_step:
            reach = slope.norm(dim=1) / (length.amax(0) * sums.scales[m])
            carried = torch.where((owner == m) | trusted, carried, reach)
    way = torch.where(trusted, WAYS.index("own"), WAYS.index("same" if in_step else "response"))
    return (out[0], out[1]), way, carried


def response(dictionary: Dictionary, sums: Moments, model: int, latents: slice | Tensor = slice(None)) -> Tensor:
    """Slope of a model's activations on some latents' [n], [n, D]: what ν^x is a projection of."""
    offset = dictionary.b_dec[model].double() - sums.mean[model]
    covariance = sums.error[model][latents] + sums.written[model][latents] + torch.outer(sums.total[latents], offset)
    variance = sums.variance[latents]
    return covariance / torch.where(variance > 0, variance, torch.ones_like(variance))[:, None]


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays."""
    length = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(length > 0, length, torch.ones_like(length))
