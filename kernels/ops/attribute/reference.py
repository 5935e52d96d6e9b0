"""The definition of attribute: a gathered product."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...features import FeatureCSR


def attribute(gradients: Sequence[Tensor], features: FeatureCSR, decoders: Sequence[Tensor]) -> Tensor:
    """See :func:`heredity.kernels.attribute`."""
    total = gradients[0].new_zeros(gradients[0].shape[0], features.nnz)
    for gradient, decoder in zip(gradients, decoders, strict=True):
        total = total + torch.einsum("bnd,nd->bn", gradient[:, features.tokens], decoder[features.indices.long()])
    return total
