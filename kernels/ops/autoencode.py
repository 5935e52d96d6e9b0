"""A differentiable sparse autoencoder or crosscoder: encode, decode, and their gradients, as one op for autograd.

Under ``torch.compile`` the op stays whole; how many latents are active is unknown until it runs, and the fake tensors
say so.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import check
from ..activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from ..features import FeatureCSR, starts
from .backward import run as backward
from .decode import run as decode
from .encode import fitting, refuse_nonfinite
from .encode import run as encode


class Autoencoded(NamedTuple):
    """What a dictionary makes of some tokens.

    Attributes:
        reconstruction: [T, D], or one per model.
        features: the active latents; gradients flow through their values.
        active: [T], active latents of each token. For JumpReLU its gradient reaches the threshold by the
            pseudo-derivative of the step (Rajamanoharan et al. 2024, equation 12); otherwise it has none.
    """

    reconstruction: Any
    features: FeatureCSR
    active: Tensor


def autoencode(
    x: Tensor | Sequence[Tensor],
    W_enc: Tensor | Sequence[Tensor],
    b_enc: Tensor | None,
    W_dec: Tensor | Sequence[Tensor],
    b_dec: Tensor | Sequence[Tensor] | None,
    activation: Activation,
    *,
    norm: Tensor | None = None,
    impl: str | None = None,
) -> Autoencoded:
    """Encode and decode, differentiable in all tensors but ``norm``.

    Latents that are not active get no gradient, also where TopK finds fewer than k above zero. Only a JumpReLU
    threshold given as a tensor gets one, from pre-activations within half a bandwidth of it. The encoder's gradient
    is laid out latent by latent; with ``W_enc`` the transpose of a contiguous [F, D] parameter it needs no copy.

    Args:
        x: [T, D], or one array per model.
        W_enc: [D, F], or one per model.
        b_enc: [F].
        W_dec: [F, D], or one per model.
        b_dec: [D], or one per model.
        activation: which pre-activations are kept.
        norm: [F], as in :func:`heredity.kernels.encode`.
        impl: ``cpu``, ``triton`` or ``reference``, also for the gradients; see :mod:`heredity.kernels.dispatch`.

    Raises:
        TypeError, ValueError: as :func:`heredity.kernels.encode` and :func:`heredity.kernels.decode`.
    """
    xs, weights, n_latents = fitting(x, W_enc, b_enc, activation, norm)
    check.activation(activation, n_latents)
    decoders = check.several(W_dec, "W_dec")
    biases = [] if b_dec is None else check.several(b_dec, "b_dec")
    check.matching("x", xs, "W_dec", decoders)
    if biases:
        check.matching("W_dec", decoders, "b_dec", biases)
    for m, decoder in enumerate(decoders):
        name = f"[{m}]" if len(decoders) > 1 else ""
        check.shaped(decoder, f"W_dec{name}", n_latents, xs[m].shape[1])
        if biases:
            check.shaped(biases[m], f"b_dec{name}", xs[m].shape[1])
        check.alike({"x": xs[m], f"W_dec{name}": decoder, f"b_dec{name}": biases[m] if biases else None})
    kind, k, number, bandwidth = _spelled(activation)
    threshold = None
    if isinstance(activation, JumpReLU):
        threshold = torch.as_tensor(activation.threshold, dtype=xs[0].dtype, device=xs[0].device).expand(n_latents)
    out = _forward(xs, weights, b_enc, decoders, biases, threshold, norm, kind, k, number, bandwidth, impl or "")
    reconstruction = out[7] if isinstance(x, Tensor) else list(out[7:])
    return Autoencoded(reconstruction, FeatureCSR(out[0], out[1], out[2], n_latents), out[3])


def _spelled(activation: Activation) -> tuple[str, int, float, float]:
    """The activation as values that an op's schema can hold: kind, k, one threshold, bandwidth."""
    match activation:
        case ReLU():
            return "relu", 0, 0.0, 0.0
        case TopK(k=k):
            return "top", k, 0.0, 0.0
        case JumpReLU(bandwidth=bandwidth):
            return "jump", 0, 0.0, bandwidth
        case BatchTopK(k=int(k)):
            return "batch", k, 0.0, 0.0
        case BatchTopK(threshold=number):
            return "batch", 0, float(number or 0.0), 0.0
    raise TypeError(f"no such activation: {activation!r}")


def _activation(kind: str, k: int, number: float, bandwidth: float, threshold: Tensor | None) -> Activation:
    if kind == "jump":
        assert threshold is not None
        return JumpReLU(threshold, bandwidth)
    if kind == "batch":
        return BatchTopK(k=k) if k else BatchTopK(threshold=number)
    return TopK(k) if kind == "top" else ReLU()


def _active(features: FeatureCSR, threshold: Tensor | None) -> Tensor:
    """Which stored entries are active, [N]."""
    above = features.values > 0
    return above if threshold is None else above & (features.values > threshold[features.indices])


@torch.library.custom_op("heredity::autoencode", mutates_args=())
def _forward(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    decoders: Sequence[Tensor],
    biases: Sequence[Tensor],
    threshold: Tensor | None,
    norm: Tensor | None,
    kind: str,
    k: int,
    number: float,
    bandwidth: float,
    impl: str,
) -> list[Tensor]:
    """Active latents (indptr, indices, values), how many each token has, the same three for what the pseudo-derivative
    needs besides (empty unless JumpReLU), then the reconstructions."""
    activation = _activation(kind, k, number, bandwidth, threshold)
    refuse_nonfinite(xs, weights, bias, activation, norm)
    stored = encode(list(xs), list(weights), bias, activation, norm, bandwidth / 2, impl=impl or None)
    features, on = stored, None
    if threshold is not None:
        on = _active(stored, threshold)
        counts = torch.zeros_like(stored.indptr[1:]).index_add_(0, stored.tokens, on.long())
        features = FeatureCSR(starts(counts), stored.indices[on], stored.values[on], stored.n_latents)
    offsets: list[Tensor | None] = [*biases] if biases else [None] * len(decoders)
    reconstructions, _ = decode(features, list(decoders), offsets, None, impl=impl or None)
    shown = [features.indptr, features.indices, features.values, features.indptr.diff().to(features.dtype)]
    kept = [stored.indptr, stored.indices, stored.values]
    return [*shown, *([each[:0].clone() for each in kept] if on is None else kept), *reconstructions]


@_forward.register_fake
def _(xs, weights, bias, decoders, biases, threshold, norm, kind, k, number, bandwidth, impl):
    x, ctx = xs[0], torch.library.get_ctx()
    rows = x.shape[0] + 1
    active, stored = ctx.new_dynamic_size(), 0 if threshold is None else ctx.new_dynamic_size()
    return [
        x.new_empty(rows, dtype=torch.int64),
        x.new_empty(active, dtype=torch.int32),
        x.new_empty(active),
        x.new_empty(x.shape[0]),
        x.new_empty(0 if threshold is None else rows, dtype=torch.int64),
        x.new_empty(stored, dtype=torch.int32),
        x.new_empty(stored),
        *[x.new_empty(x.shape[0], decoder.shape[1]) for decoder in decoders],
    ]


@torch.library.custom_op("heredity::autoencode_backward", mutates_args=())
def _backward(
    indptr: Tensor,
    indices: Tensor,
    values: Tensor,
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    decoders: Sequence[Tensor],
    threshold: Tensor | None,
    grads: Sequence[Tensor],
    extra: Tensor,
    of_active: Tensor,
    bandwidth: float,
    want_x: bool,
    impl: str,
) -> list[Tensor]:
    """Gradients of bias, threshold, then of decoders, weights and, where wanted, xs."""
    stored = FeatureCSR(indptr, indices, values, decoders[0].shape[0])
    on = _active(stored, threshold)
    if threshold is not None:
        extra = torch.zeros_like(values).masked_scatter_(on, extra)
    given = (stored, on, list(grads), list(xs), list(weights), list(decoders), extra, want_x)
    found = backward(*given, impl=impl or None)
    of_threshold = values.new_zeros(stored.n_latents)
    if threshold is not None:
        level = threshold[indices]
        near = ((values - level).abs() < bandwidth / 2).to(values.dtype)
        each = -near / bandwidth * (level * found.values + of_active[stored.tokens])
        of_threshold.index_add_(0, indices, each)
    return [found.bias, of_threshold, *found.decoders, *found.weights, *(found.xs or [])]


@_backward.register_fake
def _(indptr, indices, values, xs, weights, decoders, threshold, grads, extra, of_active, bandwidth, want_x, impl):
    n_latents = decoders[0].shape[0]
    # The encoder's gradient is made latent by latent.
    of_weights = [weight.new_empty(n_latents, weight.shape[0]).T for weight in weights]
    of_decoders = [torch.empty_like(decoder, memory_format=torch.contiguous_format) for decoder in decoders]
    of_xs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs] if want_x else []
    return [values.new_empty(n_latents), values.new_empty(n_latents), *of_decoders, *of_weights, *of_xs]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    xs, weights, bias, decoders, biases, threshold, _, _, _, _, bandwidth, impl = inputs
    indptr, indices, values = output[:3] if threshold is None else output[4:7]
    ctx.save_for_backward(indptr, indices, values, threshold, *xs, *weights, *decoders)
    ctx.models, ctx.biases, ctx.has_bias = len(xs), len(biases), bias is not None
    ctx.bandwidth, ctx.impl = bandwidth, impl
    ctx.mark_non_differentiable(*[output[i] for i in (0, 1, 4, 5, 6)])


def _gradients(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    indptr, indices, values, threshold, *rest = ctx.saved_tensors
    m = ctx.models
    xs, weights, decoders = rest[:m], rest[m : 2 * m], rest[2 * m :]
    extra, of_active = grads[2], grads[3]
    want_x = any(ctx.needs_input_grad[0])
    given = (indptr, indices, values, xs, weights, decoders, threshold, grads[7:], extra, of_active, ctx.bandwidth)
    out = _backward(*given, want_x, ctx.impl)
    return (
        out[2 + 2 * m :] if want_x else [None] * m,
        out[2 + m : 2 + 2 * m],
        out[0] if ctx.has_bias else None,
        out[2 : 2 + m],
        [g.sum(0) for g in grads[7:]] if ctx.biases else [],
        None if threshold is None else out[1],
        *[None] * 6,
    )


_forward.register_autograd(_gradients, setup_context=_keep)
