"""Dictionaries trained for one audit: sparse autoencoders of what attention and MLPs write, in both models at once.

Between a parent and its successor a unit has to explain what a site carries in either, so each is trained on the
activations of both. They are small and the text is short: what they fail to reconstruct counts as unexplained.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from heredity.interp.dictionaries.record import Dictionary, Port
from heredity.interp.dictionaries.training.loop import train
from heredity.interp.dictionaries.training.recipe import Recipe
from heredity.interp.dictionaries.training.rows import Rows
from heredity.kernels import BatchTopK

BATCH = 512
K = 8
"""Active latents per token."""


def site_sae(values: Sequence[Tensor], site: str, *, latents: int, steps: int, seed: int) -> Dictionary:
    """An SAE of one site.

    Args:
        values: [T, D] of each model.
        site: which.
        latents: how many.
        steps: of training, 512 tokens each.
        seed: of the start and the order.
    """
    rows = Rows(tuple((each,) for each in values), (Port(site),))
    batch = min(BATCH, rows.n_tokens)
    # First tokens of texts are as much part of a behaviour's contexts as others.
    recipe = Recipe(
        kind="sae", latents=latents, k=min(K, latents), batch=batch, tokens=batch * steps, massive=None, seed=seed
    )
    return train(recipe, rows).dictionary


def packed(d: Dictionary) -> dict[str, Tensor]:
    """The arrays of a BatchTopK SAE, to keep."""
    assert isinstance(d.activation, BatchTopK) and d.activation.threshold is not None and d.norm is not None
    threshold = torch.tensor(float(d.activation.threshold), dtype=torch.float64)
    return {
        "W_enc": d.W_enc[0],
        "b_enc": d.b_enc,
        "W_dec": d.W_dec[0],
        "b_dec": d.b_dec[0],
        "norm": d.norm,
        "threshold": threshold,
    }


def unpacked(arrays: Mapping[str, Tensor], site: str) -> Dictionary:
    """The SAE that :func:`packed` took apart."""
    port = (Port(site),)
    return Dictionary(
        "sae",
        port,
        port,
        (arrays["W_enc"],),
        arrays["b_enc"],
        (arrays["W_dec"],),
        (arrays["b_dec"],),
        BatchTopK(threshold=float(arrays["threshold"])),
        norm=arrays["norm"],
    )
