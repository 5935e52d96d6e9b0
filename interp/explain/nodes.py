"""Heads and neurons in the form of latents, so that the same rules explain them.

A latent is exactly 0 where it is inactive; a neuron or a head writes something at every token. Here it counts as
active at the ``share`` of tokens where its value is largest in absolute value, a twentieth if nothing else is said.
What such an explanation covers is that part of its activity and no more.
"""

import torch
from torch import Tensor

from heredity.kernels import FeatureCSR

SHARE = 0.05


def neuron_features(activations: Tensor, *, share: float = SHARE) -> FeatureCSR:
    """Neurons as latents: of each, the values that are largest in absolute value, with their sign.

    Args:
        activations: [T, neurons], floating point.
        share: of the tokens; at least one is kept, the first of several equal ones, and no zero.

    Raises:
        ValueError: ``share`` is not in (0, 1], or values are not finite.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], not {share}")
    if not bool(torch.isfinite(activations).all()):
        raise ValueError("activations hold NaN or infinity")
    n_tokens, n = activations.shape
    count = max(1, round(share * n_tokens)) if n_tokens else 0
    order = activations.detach().abs().argsort(dim=0, descending=True, stable=True)[:count]
    values = activations.detach().gather(0, order)
    latents = torch.arange(n, device=activations.device).expand_as(order)
    kept = values != 0
    return FeatureCSR.from_coo(order[kept], latents[kept], values[kept], (n_tokens, n))


def head_features(writes: Tensor, *, along: str = "norm", share: float = SHARE) -> FeatureCSR:
    """Heads as latents, by how much each writes.

    Args:
        writes: [T, heads, D], what each head adds to the residual stream (site ``attn_head@L.H``).
        along: ``norm``: the norm of the write; ``direction``: its projection on the head's first principal direction,
            the mean write taken off, with the sign that makes the largest projection positive.
        share: as of :func:`neuron_features`.

    Raises:
        ValueError: ``along`` is neither, or as :func:`neuron_features`.
    """
    if along not in ("norm", "direction"):
        raise ValueError(f"along must be 'norm' or 'direction', not {along!r}")
    if along == "norm":
        return neuron_features(writes.norm(dim=-1), share=share)
    return neuron_features(torch.stack([_along(head) for head in writes.unbind(1)], dim=1), share=share)


def principal(write: Tensor) -> tuple[Tensor, Tensor]:
    """Mean write and first principal direction of writes [T, D], each [D]; the direction is a unit vector with the sign
    that makes the largest projection of write − mean positive."""
    mean = write.double().mean(0)
    centred = write.double() - mean
    direction = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    along = centred @ direction
    return mean.to(write.dtype), (direction * along[along.abs().argmax()].sign()).to(write.dtype)


def _along(write: Tensor) -> Tensor:
    """Projection [T] of a head's writes [T, D] on their first principal direction."""
    mean, direction = principal(write)
    return (write - mean) @ direction
