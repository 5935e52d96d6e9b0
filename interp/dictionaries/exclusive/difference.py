"""A dictionary of what differs, read as a crosscoder: so that its latents can be judged like any other's.

A sparse autoencoder of successor − parent spends nothing on what both models share, and finds small differences that a
crosscoder has no latents left for. But its latents say *that* the models differ along a direction, not whose the
concept is: a weaker, a turned and a new concept all leave a difference (diff-SAEs in Minder et al. 2504.02922,
appendix). With each model's own response to a latent as its decoder rows, Δnorm, ν and twins mean what they mean for
crosscoders.

F latents, T tokens, D the width of both models.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from heredity.kernels import decode

from ..record import Dictionary, Port
from .moments import transposed
from .scaling import unit
from .verdict import TWIN, Exclusives, LatentVerdict


@torch.no_grad()
def paired(difference: Dictionary, batches: Iterable[Sequence[Tensor]]) -> Dictionary:
    """A difference's SAE as a crosscoder: same latents, the slopes of each model's activations on them for rows.

    Args:
        difference: an SAE trained on successor minus parent.
        batches: (parent [T, D], successor [T, D]), row by row the same token; read once.

    Raises:
        ValueError: no tokens; or not an SAE, or one that rescales each token (then it is not linear in the two models).
    """
    if difference.kind != "sae" or difference.scaling != "none":
        raise ValueError(f"only an SAE without scaling of its tokens can be read as a crosscoder, not {difference!r}")
    n, width = difference.W_dec[0].shape
    tokens, total, square = 0, torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    sums = [torch.zeros(n, width, dtype=torch.float64) for _ in range(2)]
    means = [torch.zeros(width, dtype=torch.float64) for _ in range(2)]
    for parent, successor in batches:
        features = difference.encode(successor - parent)
        tokens += features.n_tokens
        total.index_add_(0, features.indices.long(), features.values.double())
        square.index_add_(0, features.indices.long(), features.values.double().square())
        for m, part in enumerate(decode(transposed(features), [parent, successor])):
            sums[m] += part
            means[m] += (parent, successor)[m].sum(0, dtype=torch.float64)
    if not tokens:
        raise ValueError("no tokens: what the models do when a latent is active cannot be known")
    variance = square - total.square() / tokens
    variance = torch.where(variance > 0, variance, torch.inf)
    rows = [(s - torch.outer(total, m / tokens)) / variance[:, None] for s, m in zip(sums, means, strict=True)]
    dtype, W_enc = difference.b_enc.dtype, difference.W_enc[0]
    ports = (Port(difference.reads[0].site, 0), Port(difference.reads[0].site, 1))
    bias = [m / tokens - total / tokens @ row for m, row in zip(means, rows, strict=True)]
    return Dictionary(
        kind="crosscoder",
        reads=ports,
        writes=ports,
        W_enc=(-W_enc, W_enc),
        b_enc=difference.b_enc,
        W_dec=(rows[0].to(dtype), rows[1].to(dtype)),
        b_dec=(bias[0].to(dtype), bias[1].to(dtype)),
        activation=difference.activation,
        norm=difference.norm,
        provenance=dict(difference.provenance) | {"paired": True, "rms": None},
    )


def reconciled(difference: Dictionary, found: Exclusives, crosscoder: Dictionary, known: Exclusives) -> Exclusives:
    """The verdicts on a difference's latents where a crosscoder of the same pair may speak against them.

    What the crosscoder has found in both models is shared, whatever the difference makes of it: the difference sees
    only where the models part.

    Args:
        difference: what :func:`paired` made.
        found: the verdicts on it.
        crosscoder: of the same two models at the same place.
        known: the verdicts on it.

    Raises:
        ValueError: the dictionaries are of other widths.
    """
    if difference.widths != crosscoder.widths:
        raise ValueError(f"dictionaries of different widths: {difference.widths} and {crosscoder.widths}")
    shared = torch.tensor([each.latent for each in known.latents if each.verdict == "shared"], dtype=torch.int64)
    theirs = [unit(decoder[shared].double()) for decoder in crosscoder.W_dec]

    def reconcile(each: LatentVerdict) -> LatentVerdict:
        if not each.verdict.endswith("-only") or not len(shared):
            return each
        m = int(each.model == "successor")
        cosine, at = (theirs[m] @ unit(difference.W_dec[m][each.latent, None].double())[0]).max(0)
        if float(cosine) <= TWIN:
            return each
        return replace(
            each, verdict="shared", reason=f"latent {int(shared[at])} of the crosscoder is it, and is shared"
        )

    return replace(found, latents=tuple(map(reconcile, found.latents)))
