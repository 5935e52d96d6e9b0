"""How a dictionary turns pre-activations into activations: exactly, since two readings of one rule differ by far.

All keep an activation's own pre-activation as its value and drop what is not above zero.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ReLU:
    """Every pre-activation above zero."""


@dataclass(frozen=True, eq=False)
class JumpReLU:
    """Every pre-activation above its latent's threshold (and above zero).

    Rajamanoharan et al. 2024, arXiv:2407.14435. The pseudo-derivative with respect to the threshold uses the rectangle
    kernel of width ``bandwidth`` (their ε, equation 11).

    Attributes:
        threshold: [F], or one number for all.
        bandwidth: ε, in units of the pre-activation; only training reads it.
    """

    threshold: Tensor | float
    bandwidth: float = 1e-3


@dataclass(frozen=True)
class TopK:
    """The ``k`` largest of each token, ties going to the lowest latent. Gao et al. 2024, arXiv:2406.04093."""

    k: int


@dataclass(frozen=True)
class BatchTopK:
    """The k·T largest of T tokens together, or at inference every one above a threshold.

    Bussmann et al. 2024, arXiv:2412.06410. Ties go to the lowest latent, then to the first token. Exactly one of ``k``
    and ``threshold`` is given.
    """

    k: int | None = None
    threshold: float | None = None


Activation = ReLU | JumpReLU | TopK | BatchTopK
