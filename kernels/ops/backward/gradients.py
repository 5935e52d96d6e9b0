"""What a backward pass returns."""

from typing import NamedTuple

from torch import Tensor


class Gradients(NamedTuple):
    """Gradients of a sparse autoencoder, in the dtypes of what they belong to; lists hold one per model.

    Attributes:
        decoders: [F, D] each.
        values: [N], of every stored activation, active or not.
        weights: [D, F] each, of the encoder, laid out latent by latent in memory.
        bias: [F], of the encoder.
        xs: [T, D] each, or None where not asked for.
    """

    decoders: list[Tensor]
    values: Tensor
    weights: list[Tensor]
    bias: Tensor
    xs: list[Tensor] | None
