"""How much active latents matter to many things downstream: gradients contracted with decoder rows.

The step of attribution graphs (Ameisen et al. 2025, "Circuit tracing") in which a batch of gradients at a site meets
every active latent that writes there. Only active latents are touched, and the gradients of a position are read once
for all of its latents rather than copied for each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import check, dispatch
from ...features import FeatureCSR

run = dispatch.Op("attribute", __name__, lambda gradients, *_: gradients[0])


def attribute(
    gradients: Tensor | Sequence[Tensor],
    features: FeatureCSR,
    W_dec: Tensor | Sequence[Tensor],
    *,
    impl: str | None = None,
) -> Tensor:
    """Gradient times decoder row of every active latent, summed over the layers it writes to.

    Multiply by ``features.values`` for the attribution itself. NaN and infinity reach the results they take part in.

    Args:
        gradients: [B, P, D], of B outputs with respect to a site at P positions; one per layer that a cross-layer
            dictionary writes to.
        features: the active latents; its rows are the P positions.
        W_dec: [F, D], or one per layer.
        impl: ``cpu``, ``triton`` or ``reference``; see :mod:`heredity.kernels.dispatch`.

    Returns:
        [B, N], in the order of ``features``.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: shapes or devices do not fit.
    """
    layers, decoders = check.several(gradients, "gradients"), check.several(W_dec, "W_dec")
    check.matching("gradients", layers, "W_dec", decoders)
    batch = layers[0].shape[0] if layers[0].ndim == 3 else None
    for m, (gradient, decoder) in enumerate(zip(layers, decoders, strict=True)):
        name = f"[{m}]" if len(layers) > 1 else ""
        check.shaped(decoder, f"W_dec{name}", features.n_latents, None)
        check.shaped(gradient, f"gradients{name}", batch, features.n_tokens, decoder.shape[1])
        check.alike({"gradients": layers[0], f"gradients{name}": gradient, f"W_dec{name}": decoder})
    if features.device != layers[0].device:
        raise ValueError(f"features are on {features.device} and gradients on {layers[0].device}: move one of them")
    return run(layers, features, decoders, impl=impl)


def attribute_errors(gradients: Tensor, errors: Tensor) -> Tensor:
    """Gradient times error node: what the dictionary leaves out at each position.

    Args:
        gradients: [B, P, D].
        errors: [P, D], activations minus their reconstruction.

    Returns:
        [B, P]

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: shapes or devices do not fit.
    """
    check.shaped(errors, "errors", None, None)
    check.shaped(gradients, "gradients", None, *errors.shape)
    check.alike({"gradients": gradients, "errors": errors})
    # One product per position, like the latents'.
    return torch.bmm(gradients.transpose(0, 1), errors.unsqueeze(2)).squeeze(2).T
