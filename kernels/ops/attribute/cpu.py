"""Attribute on the CPU: one small product per position, of its gradients with its active decoder rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...features import FeatureCSR


def attribute(gradients: Sequence[Tensor], features: FeatureCSR, decoders: Sequence[Tensor]) -> Tensor:
    """See :func:`heredity.kernels.attribute`."""
    precise = torch.promote_types(gradients[0].dtype, torch.float32)
    out = torch.empty(features.nnz, gradients[0].shape[0], dtype=precise)
    ends, latents = features.indptr.tolist(), features.indices.long()
    for position in range(features.n_tokens):
        first, last = ends[position], ends[position + 1]
        if first == last:
            continue
        for layer, (gradient, decoder) in enumerate(zip(gradients, decoders, strict=True)):
            rows, columns = decoder[latents[first:last]].to(precise), gradient[:, position].to(precise).T
            torch.addmm(out[first:last], rows, columns, beta=1.0 if layer else 0.0, out=out[first:last])
    return out.T.to(gradients[0].dtype)
