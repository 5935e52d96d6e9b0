"""Decode on the CPU: sums of decoder rows by ``embedding_bag``, or a dense product where most latents are active.

The idea of decoding by ``embedding_bag`` is from SAELens issue 428 and sparsify's ``eager_decode``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...features import FeatureCSR
from . import reference

DENSE_FROM, DENSE_FROM_CACHED = 0.11, 0.2
"""Share of active latents from which the dense product is faster, for decoders larger than ``CACHED`` and for others;
``benchmarks/kernels.py --crossover`` measures it."""

CACHED = 24 * 2**20
"""Bytes of a decoder whose rows come from the cache however they are chosen."""


def decode(
    features: FeatureCSR,
    decoders: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    targets: Sequence[Tensor] | None,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """See :func:`heredity.kernels.decode` and, with ``targets``, :func:`heredity.kernels.residual`."""
    if mostly_active(features, decoders):
        return reference.decode(features, decoders, biases, targets)
    out, errors = [], []
    for m, (decoder, bias) in enumerate(zip(decoders, biases, strict=True)):
        total = rows(features.indptr, features.indices, features.values, decoder)
        if bias is not None:
            total += bias
        if targets is not None:
            total = torch.sub(targets[m], total, out=total)
            precise = total.to(torch.promote_types(total.dtype, torch.float32))
            errors.append(torch.linalg.vecdot(precise, precise))
        out.append(total)
    return out, errors if targets is not None else None


def mostly_active(features: FeatureCSR, decoders: Sequence[Tensor]) -> bool:
    """Whether so many latents are active that dense products are faster."""
    n_bytes = max(decoder.numel() * max(decoder.itemsize, 4) for decoder in decoders)
    return features.mean_active > (DENSE_FROM if n_bytes > CACHED else DENSE_FROM_CACHED) * features.n_latents


def rows(indptr: Tensor, indices: Tensor, values: Tensor, table: Tensor) -> Tensor:
    """For each bag ``indptr[i]:indptr[i + 1]``, the sum of ``table`` [F, D] rows ``indices`` times ``values``."""
    if len(indices) == 0:
        return table.new_zeros(len(indptr) - 1, table.shape[1])
    precise = torch.promote_types(table.dtype, torch.float32)
    total = torch.nn.functional.embedding_bag(
        indices.long(),
        table.to(precise),
        indptr,
        mode="sum",
        per_sample_weights=values.to(precise),
        include_last_offset=True,
    )
    return total.to(table.dtype)
