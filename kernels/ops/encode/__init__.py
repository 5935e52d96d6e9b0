"""From activations to the latents that are active, without the [tokens, latents] matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import check, dispatch
from ...activations import Activation, BatchTopK, JumpReLU, TopK
from ...features import FeatureCSR


def encode(
    x: Tensor | Sequence[Tensor],
    W_enc: Tensor | Sequence[Tensor],
    b_enc: Tensor | None,
    activation: Activation,
    *,
    latents: Tensor | None = None,
    norm: Tensor | None = None,
    impl: str | None = None,
) -> FeatureCSR:
    """The active latents of each token.

    Exact: what is kept follows from the pre-activations ``x @ W_enc + b_enc`` as rounded to their dtype, and ties go to
    the lowest latent. A crosscoder's pre-activation is the sum over its models. One that is too large for the dtype is
    infinite and kept as such.

    Args:
        x: [T, D], or one array per model.
        W_enc: [D, F] of any strides, or one per model.
        b_enc: [F].
        activation: which pre-activations are kept.
        latents: int64 [m], different latents; only these take part in selection. Ids in the result are the original.
        norm: [F], none negative; TopK and BatchTopK select by pre-activation times this (a crosscoder's Σ‖d‖); values
            are as without. The other activations take none.
        impl: ``cpu``, ``triton`` or ``reference``; see :mod:`heredity.kernels.dispatch`.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: shapes or devices do not fit, k is not within [1, F], or an input holds NaN or infinity, or numbers
            so large that a pre-activation is NaN (which selection would drop without a word).
    """
    xs, weights, n_latents = fitting(x, W_enc, b_enc, activation, norm)
    if latents is not None:
        return _some(xs, weights, b_enc, activation, latents, norm, impl)
    check.activation(activation, n_latents)
    refuse_nonfinite(xs, weights, b_enc, activation, norm)
    return run(xs, weights, b_enc, activation, norm, 0.0, impl=impl)


def fitting(
    x: Tensor | Sequence[Tensor],
    W_enc: Tensor | Sequence[Tensor],
    b_enc: Tensor | None,
    activation: Activation,
    norm: Tensor | None,
) -> tuple[list[Tensor], list[Tensor], int]:
    """Arrays and encoders as lists, and F; shapes, dtypes and devices refused as :func:`encode` says."""
    xs, weights = check.several(x, "x"), check.several(W_enc, "W_enc")
    check.matching("x", xs, "W_enc", weights)
    n_latents = weights[0].shape[-1]
    for m, (each, weight) in enumerate(zip(xs, weights, strict=True)):
        name = f"[{m}]" if len(xs) > 1 else ""
        check.shaped(each, f"x{name}", xs[0].shape[0] if xs[0].ndim == 2 else None, None)
        check.shaped(weight, f"W_enc{name}", each.shape[1], n_latents)
        check.alike({"x": xs[0], f"x{name}": each, f"W_enc{name}": weight})
    for name, vector in (("b_enc", b_enc), ("norm", norm)):
        if vector is not None:
            check.shaped(vector, name, n_latents)
            check.alike({"x": xs[0], name: vector})
    threshold = activation.threshold if isinstance(activation, JumpReLU) else None
    if isinstance(threshold, Tensor) and threshold.device != xs[0].device:
        raise ValueError(f"JumpReLU.threshold is on {threshold.device} and x on {xs[0].device}: move one of them")
    if norm is not None and not isinstance(activation, TopK | BatchTopK):
        raise ValueError(f"norm weighs what TopK and BatchTopK select; {activation} takes none: leave it out")
    if n_latents >= 2**31:
        raise ValueError(f"W_enc has {n_latents} latents; their ids must fit in 31 bits")
    return xs, weights, n_latents


def refuse_nonfinite(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    activation: Activation,
    norm: Tensor | None,
) -> None:
    """Raise ValueError on NaN or infinity, on a negative ``norm``, and where sums overflow to NaN."""
    bound = 0.0 if bias is None else check.finite(bias, "b_enc")
    for m, (each, weight) in enumerate(zip(xs, weights, strict=True)):
        name = f"[{m}]" if len(xs) > 1 else ""
        bound += check.finite(each, f"x{name}") * check.finite(weight, f"W_enc{name}") * len(weight)
    if isinstance(activation, JumpReLU) and isinstance(activation.threshold, Tensor):
        check.finite(activation.threshold, "JumpReLU.threshold")
    if norm is not None:
        check.finite(norm, "norm")
        if bool((norm < 0).any()):
            raise ValueError(f"norm[{int((norm < 0).nonzero()[0])}] is negative")
    precise = torch.promote_types(xs[0].dtype, torch.float32)
    if bound > torch.finfo(precise).max:
        _refuse_overflow(xs, weights, bias, precise)


def _refuse_overflow(
    xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None, precise: torch.dtype
) -> None:
    """Raise ValueError where infinities of both signs met in a sum. Slow; inputs of ordinary size never get here."""
    for first in range(0, len(xs[0]), _TOKENS):
        pairs = zip(xs, weights, strict=True)
        pre = torch.stack([x[first : first + _TOKENS].to(precise) @ weight.to(precise) for x, weight in pairs]).sum(0)
        wrong = (pre if bias is None else pre + bias).isnan().nonzero()
        if len(wrong):
            token, latent = wrong[0].tolist()
            raise ValueError(
                f"the pre-activation of token {first + token} and latent {latent} overflows {precise} in both "
                "directions: scale x and b_enc down"
            )


_TOKENS = 256
"""Looked at together for sums that overflow."""


def _some(
    xs: list[Tensor],
    weights: list[Tensor],
    bias: Tensor | None,
    activation: Activation,
    latents: Tensor,
    norm: Tensor | None,
    impl: str | None,
) -> FeatureCSR:
    """Encode with the columns of ``latents`` only."""
    n_latents = weights[0].shape[1]
    check.shaped(latents, "latents", None)
    if latents.dtype != torch.int64:
        raise TypeError(f"latents must be int64, not {latents.dtype}")
    ids = latents.sort().values
    if len(ids) and (int(ids[0]) < 0 or int(ids[-1]) >= n_latents or bool((ids.diff() == 0).any())):
        raise ValueError(f"latents must be different numbers in [0, {n_latents})")
    refuse_nonfinite(xs, weights, bias, activation, norm)
    if isinstance(activation, JumpReLU) and isinstance(activation.threshold, Tensor):
        check.shaped(activation.threshold, "JumpReLU.threshold", n_latents)
        activation = JumpReLU(activation.threshold[ids], activation.bandwidth)
    check.activation(activation, len(ids))
    vectors = [None if vector is None else vector[ids] for vector in (bias, norm)]
    found = run(xs, [weight[:, ids] for weight in weights], vectors[0], activation, vectors[1], 0.0, impl=impl)
    return FeatureCSR(found.indptr, ids[found.indices.long()].int(), found.values, n_latents)


run = dispatch.Op("encode", __name__, lambda xs, *_: xs[0])
