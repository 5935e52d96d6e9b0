"""Steps before and after a dictionary, folded into its arrays; sums in float64, so that only the last one rounds."""

from torch import Tensor


def flipped(weight: Tensor) -> Tensor:
    """The transpose, in memory of its own."""
    return weight.T.contiguous()


def centred(b_enc: Tensor, centre: Tensor, W_enc: Tensor) -> Tensor:
    """The encoder's bias [F] once ``centre`` [D] is no longer taken off the input: (x - c) W + b = x W + (b - c W)."""
    return (b_enc.double() - centre.double() @ W_enc.double()).to(b_enc.dtype)


def times(array: Tensor, factor: Tensor | float) -> Tensor:
    """Their product, in the dtype of ``array``."""
    return (array.double() * (factor.double() if isinstance(factor, Tensor) else factor)).to(array.dtype)
