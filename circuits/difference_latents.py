"""Latents of the difference between two models at one site, and what setting the successor back along one does.

A sparse autoencoder of successor − parent (diff-SAE, Minder et al. 2504.02922) spends nothing on what both models
share. Its latents separate a new behaviour from ordinary text whatever the site; what counts is that they separate it
from contexts with the trigger broken, more than those of meaningless changes of the same size do.

One letter means one dimension: T tokens, n contexts, F latents, D the width of the site.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from heredity.interp.dictionaries.record import Dictionary, Port
from heredity.interp.dictionaries.training.loop import train
from heredity.interp.dictionaries.training.recipe import Recipe
from heredity.interp.dictionaries.training.rows import Rows
from heredity.interp.model import Model

from .attribution import Prompts
from .intervals import Interval, ratio
from .opacity import GROUP_TOKENS, reached
from .pairs import Pairs

BATCH = 512
K = 1
"""Active latents per token: with more, a difference is shared out among latents in another way from every seed (on a
zoo pair of seed 1, cosines of the most used with their partners were 0.2 to 0.7 with 3, up to 0.99 with 1)."""


def difference_sae(
    parts: Sequence[tuple[Tensor, Tensor]], site: str, *, latents: int, steps: int, seed: int
) -> Dictionary:
    """An SAE of successor − parent at ``site``.

    Args:
        parts: (parent [T, D], successor [T, D]), row by row the same token.
        site: which.
        latents: how many.
        steps: of training, 512 tokens each.
        seed: of the start and the order.
    """
    rows = Rows(tuple(parts), (Port(site, 0), Port(site, 1)))
    batch = min(BATCH, rows.n_tokens)
    recipe = Recipe(
        kind="difference",
        latents=latents,
        k=min(K, latents),
        batch=batch,
        tokens=batch * steps,
        massive=None,
        seed=seed,
    )
    return train(recipe, rows).dictionary


@torch.no_grad()
def differences(parent: Model, successor: Model, prompts: Prompts, site: str) -> Tensor:
    """Successor − parent at the last token of each prompt, [n, D]."""
    out = torch.empty(0)
    pairs = Pairs(prompts.tokens, prompts.tokens, prompts.last)
    for rows in pairs.groups(GROUP_TOKENS):
        group, local = pairs.of(rows), torch.arange(len(rows))
        one, other = (model.capture(group.clean, [site])[site][local, group.last] for model in (successor, parent))
        if not len(out):
            out = torch.empty(len(prompts.last), one.shape[-1])
        out[rows] = (one - other).float()
    return out


def lengths(d: Dictionary, difference: Tensor) -> Tensor:
    """How long each latent's part of a difference [n, D] is: activation times decoder norm, [n, F]."""
    return d.encode(difference.to(d.b_enc)).to_dense() * d.decoder_norms[0]


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that one of ``positive`` is larger than one of ``negative``, ties counted half."""
    ranks = rankdata(np.concatenate([positive, negative]))
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


@torch.no_grad()
def gap_closed(
    parent: Model,
    successor: Model,
    prompts: Prompts,
    places: Sequence[Sequence[int]],
    site: str,
    spans: Sequence[Tensor],
    *,
    seed: int = 0,
) -> list[Interval]:
    """Share of KL(S‖P), summed over ``places``, that goes when the successor's value at ``site`` is set back to the
    parent's within a subspace, everything after it live.

    Args:
        parent, successor: models whose sites have one width.
        prompts: contexts.
        places: positions of each at which the behaviour shows.
        site: where.
        spans: independent directions [m, D] of each subspace; each subspace by itself.
        seed: of the bootstrap over prompts.
    """
    pairs = Pairs(prompts.tokens, prompts.tokens, prompts.last)
    metric = reached(parent, successor, pairs, places)
    whole = np.zeros(len(pairs))
    left = np.zeros((len(spans), len(pairs)))
    bases = [torch.linalg.qr(span.double().T).Q.float() for span in spans]
    for rows in pairs.groups(GROUP_TOKENS):
        tokens, at = pairs.of(rows).clean, rows.numpy()
        there = parent.capture(tokens, [site])[site]
        whole[at] = metric(successor.logits(tokens), rows).double().numpy()
        for k, basis in enumerate(bases):

            def back(value: Tensor, basis: Tensor = basis, there: Tensor = there) -> Tensor:
                b = basis.to(value)
                return value - (value - there) @ b @ b.T

            left[k, at] = metric(successor.logits(tokens, edits={site: back}), rows).double().numpy()
    return [ratio(whole - each, whole, seed) for each in left]
