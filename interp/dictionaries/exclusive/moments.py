"""The sums over tokens that every statistic of exclusive latents is made of, gathered in one pass.

F latents, T tokens of a batch, D_m the width of model m (0 parent, 1 successor).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heredity.kernels import FeatureCSR, decode

from ..record import Dictionary
from .norms import check_pair


@dataclass(frozen=True, eq=False)
class Moments:
    """What a dictionary did on a stream of paired activations, summed in float64.

    Attributes:
        n_tokens: how many tokens.
        count: int64 [F], tokens on which each latent is active.
        total, square: [F], Σ f and Σ f².
        error: per model [F, D_m], Σ f·(x − x̂): what the model still holds, beyond the reconstruction, when the latent
            is active.
        error_energy: per model [F], Σ f²·‖x − x̂‖²: what chance alone makes of ‖error‖².
        written: per model [F, D_m], Σ f·(x̂ − b): what all latents together write then.
        mean, written_mean: per model [D_m], of x and of x̂ − b.
        spread: per model, Σ ‖x‖².
    """

    n_tokens: int
    count: Tensor
    total: Tensor
    square: Tensor
    error: tuple[Tensor, Tensor]
    error_energy: tuple[Tensor, Tensor]
    written: tuple[Tensor, Tensor]
    mean: tuple[Tensor, Tensor]
    written_mean: tuple[Tensor, Tensor]
    spread: tuple[float, float]

    @property
    def variance(self) -> Tensor:
        """Σ (f − mean f)², [F]."""
        return self.square - self.total.square() / self.n_tokens

    @property
    def rate(self) -> Tensor:
        """Share of tokens on which each latent is active, [F]."""
        return self.count / self.n_tokens

    @property
    def scales(self) -> tuple[float, float]:
        """Root of the mean squared distance of each model's activations from their mean."""
        each = [s / self.n_tokens - float(m.square().sum()) for s, m in zip(self.spread, self.mean, strict=True)]
        return max(each[0], 0.0) ** 0.5, max(each[1], 0.0) ** 0.5


@torch.no_grad()
def moments(dictionary: Dictionary, batches: Iterable[Sequence[Tensor]]) -> Moments:
    """One pass over ``batches``.

    Memory: the dictionary's decoders twice over in float64, and a few arrays of the size of a batch; no array has both
    a token's and a latent's dimension.

    Args:
        dictionary: a crosscoder of a parent and a successor.
        batches: (parent [T, D_0], successor [T, D_1]), row by row the same token; at least one.

    Raises:
        ValueError: no tokens, or the dictionary is not of two models.
    """
    check_pair(dictionary)
    n, widths, device = dictionary.n_latents, dictionary.widths, dictionary.b_enc.device

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    tokens, count = 0, torch.zeros(n, dtype=torch.int64, device=device)
    total, square = zeros(n), zeros(n)
    energy = [zeros(n), zeros(n)]
    error, written = [zeros(n, w) for w in widths], [zeros(n, w) for w in widths]
    mean, written_mean, spread = [zeros(w) for w in widths], [zeros(w) for w in widths], [0.0, 0.0]
    for batch in batches:
        features = dictionary.encode(*batch)
        tokens += features.n_tokens
        latents = features.indices.long()
        count += torch.bincount(latents, minlength=n)
        total.index_add_(0, latents, features.values.double())
        squares = features.values.double().square()
        square.index_add_(0, latents, squares)
        latent_part = decode(features, list(dictionary.W_dec))
        targets = [x - out - b for x, out, b in zip(batch, latent_part, dictionary.b_dec, strict=True)]
        sums = decode(transposed(features), [*targets, *latent_part])
        for m in range(2):
            error[m] += sums[m]
            energy[m].index_add_(0, latents, squares * targets[m].double().square().sum(1)[features.tokens])
            written[m] += sums[2 + m]
            mean[m] += batch[m].sum(0, dtype=torch.float64)
            written_mean[m] += latent_part[m].sum(0, dtype=torch.float64)
            spread[m] += float(batch[m].double().square().sum())
    if not tokens:
        raise ValueError("no tokens: latents can only be compared on activations")
    return Moments(
        n_tokens=tokens,
        count=count,
        total=total,
        square=square,
        error=(error[0], error[1]),
        error_energy=(energy[0], energy[1]),
        written=(written[0], written[1]),
        mean=(mean[0] / tokens, mean[1] / tokens),
        written_mean=(written_mean[0] / tokens, written_mean[1] / tokens),
        spread=(spread[0], spread[1]),
    )


def transposed(features: FeatureCSR) -> FeatureCSR:
    """Latents as rows, tokens as columns, so that ``decode`` with activations for rows sums f·x over tokens."""
    view = features.by_latent
    return FeatureCSR(view.indptr, view.tokens.int(), features.values[view.order], features.n_tokens)
