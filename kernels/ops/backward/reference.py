"""The definition of backward: dense matrices."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...features import FeatureCSR
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
    """Gradients of a dictionary that encodes ``xs`` into ``features`` and decodes these.

    Args:
        features: what is stored; latents that are not active may be among it, for the pseudo-derivative of JumpReLU.
        active: bool [N], which of it is active; None for all above zero.
        grads: gradients [T, D] with respect to the reconstructions, one per model.
        xs, weights, decoders: [T, D], [D, F] and [F, D], one of each per model.
        extra: [N], further gradients with respect to the values.
        want_x: whether ``xs`` need gradients.
    """
    rows, columns = features.tokens, features.indices.long()
    on = features.values > 0 if active is None else active
    of_latents = sum(g @ decoder.T for g, decoder in zip(grads, decoders, strict=True))
    assert isinstance(of_latents, Tensor)
    da = of_latents[rows, columns]
    if extra is not None:
        da = da + extra
    values = features.with_values(torch.where(on, features.values, 0)).to_dense()
    pre = features.with_values(torch.where(on, da, 0)).to_dense()
    return Gradients(
        decoders=[values.T @ g for g in grads],
        values=da,
        weights=[(pre.T @ x).T for x in xs],
        bias=pre.sum(0),
        xs=[pre @ weight.T for weight in weights] if want_x else None,
    )
