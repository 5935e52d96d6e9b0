"""From active latents back to activations."""

from collections.abc import Sequence
from typing import overload

from torch import Tensor

from ... import check, dispatch
from ...features import FeatureCSR

run = dispatch.Op("decode", __name__, lambda features, *_: features.values)


@overload
def decode(features: FeatureCSR, W_dec: Tensor, b_dec: Tensor | None = None, *, impl: str | None = None) -> Tensor: ...
@overload
def decode(
    features: FeatureCSR, W_dec: Sequence[Tensor], b_dec: Sequence[Tensor] | None = None, *, impl: str | None = None
) -> list[Tensor]: ...
def decode(
    features: FeatureCSR,
    W_dec: Tensor | Sequence[Tensor],
    b_dec: Tensor | Sequence[Tensor] | None = None,
    *,
    impl: str | None = None,
) -> Tensor | list[Tensor]:
    """Each token's sum of decoder rows times activations, plus a bias.

    NaN and infinity are not looked for: they reach every output that depends on them, and, where the dense product is
    chosen, others too.

    Args:
        features: T tokens on F latents.
        W_dec: [F, D], or one per model of a crosscoder; the result is then a list too.
        b_dec: [D], or one per model.
        impl: ``cpu``, ``triton`` or ``reference``; see :mod:`heredity.kernels.dispatch`.

    Returns:
        [T, D]

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: shapes or devices do not fit.
    """
    decoders, biases = _checked(features, W_dec, b_dec)
    out, _ = run(features, decoders, biases, None, impl=impl)
    return out[0] if isinstance(W_dec, Tensor) else out


@overload
def residual(
    features: FeatureCSR, W_dec: Tensor, b_dec: Tensor | None, target: Tensor, *, impl: str | None = None
) -> tuple[Tensor, Tensor]: ...
@overload
def residual(
    features: FeatureCSR,
    W_dec: Sequence[Tensor],
    b_dec: Sequence[Tensor] | None,
    target: Sequence[Tensor],
    *,
    impl: str | None = None,
) -> tuple[list[Tensor], list[Tensor]]: ...
def residual(
    features: FeatureCSR,
    W_dec: Tensor | Sequence[Tensor],
    b_dec: Tensor | Sequence[Tensor] | None,
    target: Tensor | Sequence[Tensor],
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor] | tuple[list[Tensor], list[Tensor]]:
    """What the latents leave unexplained: ``target - decode(features, W_dec, b_dec)``, and its squared norm.

    Args:
        features, W_dec, b_dec, impl: as in :func:`decode`.
        target: [T, D], or one per model.

    Returns:
        (residual [T, D], squared norm [T] in at least float32), or lists of them.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: shapes or devices do not fit.
    """
    decoders, biases = _checked(features, W_dec, b_dec)
    targets = check.several(target, "target")
    check.matching("W_dec", decoders, "target", targets)
    for each, decoder in zip(targets, decoders, strict=True):
        check.shaped(each, "target", features.n_tokens, decoder.shape[1])
        check.alike({"W_dec": decoder, "target": each})
    out, errors = run(features, decoders, biases, targets, impl=impl)
    return (out[0], errors[0]) if isinstance(W_dec, Tensor) else (out, errors)


def _checked(
    features: FeatureCSR, W_dec: Tensor | Sequence[Tensor], b_dec: Tensor | Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    decoders = check.several(W_dec, "W_dec")
    biases: list[Tensor | None] = [None] * len(decoders) if b_dec is None else [*check.several(b_dec, "b_dec")]
    check.matching("W_dec", decoders, "b_dec", biases)
    for m, (decoder, bias) in enumerate(zip(decoders, biases, strict=True)):
        name = f"[{m}]" if len(decoders) > 1 else ""
        check.shaped(decoder, f"W_dec{name}", features.n_latents, None)
        check.alike({"features.values": features.values, f"W_dec{name}": decoder, f"b_dec{name}": bias})
        if bias is not None:
            check.shaped(bias, f"b_dec{name}", decoder.shape[1])
    return decoders, biases
