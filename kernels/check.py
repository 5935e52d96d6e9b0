"""Bad input is refused at the public edge, once, with the argument's name, its shape and what was expected."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .activations import Activation, BatchTopK, JumpReLU, ReLU, TopK

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def several(value: Tensor | Sequence[Tensor], name: str) -> list[Tensor]:
    """One array, or one per model, as a list.

    Raises:
        ValueError: the list is empty.
    """
    out = [value] if isinstance(value, Tensor) else list(value)
    if not out:
        raise ValueError(f"{name} is an empty list: give one array per model")
    return out


def matching(first: str, a: Sequence[object], second: str, b: Sequence[object]) -> None:
    """As many of one as of the other."""
    if len(a) != len(b):
        raise ValueError(f"{first} holds {len(a)} arrays and {second} {len(b)}: give one of each per model")


def shaped(tensor: Tensor, name: str, *shape: int | None) -> None:
    """``shape`` with None where any size will do."""
    sizes = tensor.shape
    if len(sizes) != len(shape) or any(want not in (None, got) for want, got in zip(shape, sizes, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], not {list(sizes)}")


def alike(tensors: Mapping[str, Tensor | None]) -> None:
    """One floating dtype and one device.

    Raises:
        TypeError: a dtype is not supported, or differs.
        ValueError: a device differs.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(given.items()))
    if first.dtype not in FLOATS:
        raise TypeError(f"{first_name} must be float32, bfloat16, float16 or float64, not {first.dtype}")
    for name, tensor in given.items():
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and {first_name} {first.dtype}: convert one of them")
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device} and {first_name} on {first.device}: move one of them")


def finite(tensor: Tensor, name: str) -> float:
    """The largest magnitude, once NaN and infinity are refused: comparisons with NaN are false, so selection would
    drop the row without a word.

    Raises:
        ValueError: an entry is not finite.
    """
    if not tensor.numel():
        return 0.0
    # The reduction is several times slower against the order of memory.
    along = tensor.T if tensor.ndim == 2 and tensor.stride(0) < tensor.stride(1) else tensor
    low, high = torch.stack(along.aminmax()).tolist()
    # Of NaN and a number, `max` returns whichever comes first.
    largest = math.nan if math.isnan(low) else max(-low, high)
    if math.isfinite(largest):
        return largest
    wrong = torch.isfinite(tensor).logical_not_().nonzero()
    place = ", ".join(map(str, wrong[0].tolist()))
    raise ValueError(f"{name}[{place}] is {tensor[tuple(wrong[0])].item()}; {len(wrong)} entries are not finite")


def activation(chosen: Activation, n_latents: int) -> None:
    """Numbers that make sense for F latents.

    Raises:
        TypeError: it is no activation, or k no whole number.
        ValueError: a number is out of range, or NaN, above which nothing would be.
    """
    match chosen:
        case TopK(k=k):
            _whole(k, n_latents, "TopK.k")
        case BatchTopK(k=k, threshold=threshold):
            if (k is None) == (threshold is None):
                raise ValueError("BatchTopK needs exactly one of k and threshold")
            if k is not None:
                _whole(k, n_latents, "BatchTopK.k")
            elif math.isnan(float(threshold or 0.0)):
                raise ValueError("BatchTopK.threshold is nan")
        case JumpReLU(threshold=threshold, bandwidth=bandwidth):
            if isinstance(threshold, Tensor):
                shaped(threshold, "JumpReLU.threshold", n_latents)
            elif math.isnan(threshold):
                raise ValueError("JumpReLU.threshold is nan")
            if not 0 < bandwidth < math.inf:
                raise ValueError(f"JumpReLU.bandwidth must be a number above 0, not {bandwidth}")
        case ReLU():
            pass
        case _:
            raise TypeError(f"activation must be a ReLU, JumpReLU, TopK or BatchTopK, not {chosen!r}")


def _whole(k: object, n_latents: int, name: str) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{name} must be a whole number, not {k!r}")
    if not 1 <= k <= n_latents:
        raise ValueError(f"{name} must lie in [1, {n_latents}], the number of latents, not {k}")
