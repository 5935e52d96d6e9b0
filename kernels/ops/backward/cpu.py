"""Backward on the CPU: one reordering by latent, then sums of rows by ``embedding_bag``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...features import FeatureCSR
from ..decode.cpu import mostly_active, rows
from . import reference
from .gradients import Gradients


def backward(
    features: FeatureCSR,
    active: Tensor | None,
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    decoders: Sequence[Tensor],
    extra: Tensor | None,
    want_x: bool,
) -> Gradients:
    """See :mod:`heredity.kernels.ops.backward.reference`, which defines it."""
    if mostly_active(features, decoders):
        return reference.backward(features, active, grads, xs, weights, decoders, extra, want_x)
    on = features.values > 0 if active is None else active
    precise = torch.promote_types(features.dtype, torch.float32)
    da = sum(products(features, g, decoder) for g, decoder in zip(grads, decoders, strict=True))
    assert isinstance(da, Tensor)
    if extra is not None:
        da = da + extra
    values, pre = torch.where(on, features.values, 0).to(precise), torch.where(on, da, 0)
    view = features.by_latent
    tokens, starts = view.tokens, view.indptr
    return Gradients(
        decoders=[rows(starts, tokens, values[view.order], g) for g in grads],
        values=da.to(features.dtype),
        weights=[rows(starts, tokens, pre[view.order], x).T for x in xs],
        bias=torch.zeros(features.n_latents, dtype=precise).index_add_(0, features.indices, pre).to(features.dtype),
        xs=[rows(features.indptr, features.indices, pre, weight.T) for weight in weights] if want_x else None,
    )


def products(features: FeatureCSR, left: Tensor, right: Tensor) -> Tensor:
    """``left[token] · right[latent]`` of every activation, [N], in at least float32, from [T, D] and [F, D]."""
    precise = torch.promote_types(left.dtype, torch.float32)
    # The gradient of `embedding_bag` with respect to its weights is this very product. Nothing public is it alone.
    product = torch.ops.aten._embedding_bag_per_sample_weights_backward
    offsets = features.indptr[:-1]
    return product(left.to(precise), right.to(precise), features.indices.long(), offsets, features.tokens, 0)
