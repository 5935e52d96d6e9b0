"""How the norm of a latent's decoder row compares between parent and successor.

Two conventions are in use and one tool prints the mirror image of its own paper, so the sign is pinned here: **1 is
the successor's alone, 0 the parent's alone, ½ both** (Minder et al. 2504.02922, §2.1; Lindsey et al. 2024 for the
relative norm). Norms of two models compare only in units of each model's own activations: a successor whose
activations are twice as large would otherwise seem to own everything.

F latents, D the width of a model; model 0 is the parent, 1 the successor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..record import Dictionary

PARENT, SUCCESSOR = 0, 1


def delta_norm(
    dictionary: Dictionary, *, scales: Sequence[float] | None = None, latents: slice = slice(None)
) -> Tensor:
    """Δnorm of each latent: ½·[(‖d_S‖ − ‖d_P‖) / max(‖d_S‖, ‖d_P‖) + 1] (Minder et al. 2504.02922).

    Args:
        dictionary: a crosscoder of a parent and a successor, in this order.
        scales: the size of each model's activations, such as ``Moments.scales``; norms are divided by it. Without it,
            the ``rms`` that the training noted in the dictionary's provenance, times √D; without that, norms are
            compared as they are.
        latents: of which.

    Returns:
        [F] in [0, 1]: 1 successor only, 0 parent only, ½ shared; NaN where both rows are zero.

    Raises:
        ValueError: the dictionary is not of two models.
    """
    parent, successor = norms(dictionary, scales, latents)
    return ((successor - parent) / torch.maximum(successor, parent) + 1) / 2


def relative_norm(dictionary: Dictionary, *, scales: Sequence[float] | None = None) -> Tensor:
    """‖d_S‖ / (‖d_P‖ + ‖d_S‖) of each latent (Lindsey et al. 2024), arguments and ends as of :func:`delta_norm`."""
    parent, successor = norms(dictionary, scales)
    return successor / (successor + parent)


def norms(dictionary: Dictionary, scales: Sequence[float] | None = None, latents: slice = slice(None)) -> Tensor:
    """Decoder norms in units of each model's activations, [2, F]; arguments as of :func:`delta_norm`."""
    check_pair(dictionary)
    rows = torch.stack([decoder[latents].double().norm(dim=1) for decoder in dictionary.W_dec])
    units = _scales(dictionary, scales)
    return rows / torch.tensor(units, dtype=torch.float64, device=rows.device)[:, None]


def check_pair(dictionary: Dictionary) -> None:
    """Refuse what is not a crosscoder of exactly two models.

    Raises:
        ValueError: it is not.
    """
    if dictionary.kind != "crosscoder" or len(dictionary.W_dec) != 2:
        raise ValueError(f"only a crosscoder of a parent and a successor has exclusive latents, not {dictionary!r}")


def _scales(dictionary: Dictionary, scales: Sequence[float] | None) -> Sequence[float]:
    if scales is None:
        rms = dictionary.provenance.get("rms")
        if not rms:
            return [1.0] * 2
        scales = [float(each) * width**0.5 for each, width in zip(rms, dictionary.widths, strict=True)]
    if len(scales) != 2 or not all(scale > 0 for scale in scales):
        raise ValueError(f"scales must be two positive numbers, not {list(scales)}")
    return scales
