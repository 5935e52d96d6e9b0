"""The definition of decode: a dense product."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...features import FeatureCSR


def decode(
    features: FeatureCSR,
    decoders: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    targets: Sequence[Tensor] | None,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """See :func:`heredity.kernels.decode` and, with ``targets``, :func:`heredity.kernels.residual`."""
    dense = features.to_dense()
    out = [
        dense @ decoder if bias is None else dense @ decoder + bias
        for decoder, bias in zip(decoders, biases, strict=True)
    ]
    if targets is None:
        return out, None
    residuals = [target - each for target, each in zip(targets, out, strict=True)]
    precise = torch.promote_types(dense.dtype, torch.float32)
    return residuals, [each.to(precise).square().sum(1) for each in residuals]
