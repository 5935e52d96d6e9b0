"""Activations ordered by latent, then value, by one sort: the largest of each latent stand first."""

from typing import NamedTuple

import torch
from torch import Tensor

from ...features import FeatureCSR
from .record import HIGHEST, LOWEST, N_BINS


class Ranked(NamedTuple):
    """Activations by ascending latent, within one by descending value (NaN first), within equal ones by token.

    Attributes:
        latents: int64 [N].
        values: float32 [N].
        tokens: int64 [N], global ids.
        starts: int64 [F + 1], where each latent begins.
    """

    latents: Tensor
    values: Tensor
    tokens: Tensor
    starts: Tensor

    @property
    def count(self) -> Tensor:
        """Activations of each latent, int64 [F]."""
        return self.starts.diff()

    def top(self, n: int) -> tuple[Tensor, Tensor]:
        """The first ``n`` of each latent: values [F, n] and tokens [F, n], -inf and -1 where there are fewer."""
        n_latents = len(self.starts) - 1
        rank = torch.arange(len(self.latents), device=self.latents.device) - self.starts[self.latents]
        kept = rank < n
        place = self.latents[kept] * n + rank[kept]
        values = self.values.new_full((n_latents * n,), -torch.inf).index_copy_(0, place, self.values[kept])
        tokens = self.tokens.new_full((n_latents * n,), -1).index_copy_(0, place, self.tokens[kept])
        return values.view(n_latents, n), tokens.view(n_latents, n)


def ranked(features: FeatureCSR, first_token: int) -> Ranked:
    """All activations of ``features``, ranked."""
    latents, values = features.indices.long(), features.values.float()
    # Rows come in the order of their tokens, and the sort is stable.
    key, order = torch.sort(latents << 32 | _descending(values), stable=True)
    starts = torch.nn.functional.pad(torch.bincount(latents, minlength=features.n_latents).cumsum(0), (1, 0))
    return Ranked(key >> 32, values[order], features.tokens[order] + first_token, starts)


def _descending(values: Tensor) -> Tensor:
    """Numbers in [0, 2**32), int64, in the reverse order of float32 ``values``, the smallest for any NaN."""
    # Adding zero makes -0.0, which is no smaller than 0.0, into it. All NaN become the one with the largest bits.
    bits = torch.where(values.isnan(), 0x7FFFFFFF, (values + 0.0).view(torch.int32))
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return 0x7FFFFFFF - ascending


def bins(values: Tensor) -> Tensor:
    """Bin of the histogram each float32 value falls in, int64, from its sign and exponent."""
    exponent = (values.view(torch.int32) >> 23) - 127
    return torch.where(values.isnan(), N_BINS - 1, (exponent - LOWEST + 1).clamp(0, HIGHEST - LOWEST + 1)).long()
