"""One training step: what is lost, and the gradients of it.

loss = Σ_places mean((y − ŷ)²) + aux · mean((e − ê)²)/mean(e²) (+ (L0/k − 1)² for JumpReLU, thresholds learned by the
pseudo-derivative of Rajamanoharan et al. 2407.14435)

with e = y − ŷ held fixed and ê what the dead latents that are most active (up to ``aux_k`` per token) make of it (AuxK,
Gao et al. 2406.04093, §A.2). Selection is by f·Σ‖d‖ (BatchTopK crosscoder: Minder et al. 2504.02922).

The [tokens, latents] matrix is never made: active latents and their gradients come from
:func:`heredity.kernels.autoencode`.

T tokens, F latents, D the widths of all places side by side.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from heredity.kernels import Activation, BatchTopK, FeatureCSR, JumpReLU, TopK, autoencode

from .streams import Streams
from .weights import Layout, Weights

BANDWIDTH = 0.1
"""Of the pseudo-derivative, in units of the pre-activations, which are about 1."""
SPARSITY = 1.0
"""Weight of JumpReLU's (L0/k − 1)², for each place."""


@dataclass(frozen=True)
class Settings:
    """What changes from step to step, or was looked up once.

    Attributes:
        activation: which rule.
        k: active latents per token, now.
        aux: weight of the dead latents' loss.
        aux_k: how many of them per token.
    """

    activation: str
    k: int
    aux: float
    aux_k: int


@dataclass(frozen=True)
class Outcome:
    """What a step saw.

    Attributes:
        features: the active latents.
        error: y − ŷ, [T, D].
        loss: without the dead latents'.
        aux: share of the error that dead latents leave, or None where none is dead.
        lowest: the smallest score that was kept.
    """

    features: FeatureCSR
    error: Tensor
    loss: float
    aux: float | None
    lowest: float


def gradients(weights: Weights, layout: Layout, batch: Streams, dead: Tensor, settings: Settings) -> Outcome:
    """Fill the gradients of ``weights``.

    Args:
        weights: what is trained.
        layout: of the latents.
        batch: in training's units.
        dead: int64, latents that are dead.
        settings: of this step.
    """
    for tensor in weights.named().values():
        tensor.grad = None
    norm = layout.score_per_activation(weights.W_dec.detach())
    W_enc, b_enc, W_dec, b_dec = weights.W_enc.T, weights.b_enc, weights.W_dec, weights.b_dec
    weighed = None if settings.activation == "jumprelu" else norm  # nothing is selected against a threshold
    seen = autoencode(batch.x, W_enc, b_enc, W_dec, b_dec, activation(weights, settings), norm=weighed)
    made = seen.reconstruction
    if weights.W_skip is not None:
        made = made + batch.x @ weights.W_skip
    error = batch.y - made
    weigh = 1 / torch.cat([error.new_full((c.stop - c.start,), c.stop - c.start) for c in layout.columns])
    loss = (error.square() @ weigh).mean()
    if weights.log_threshold is not None:
        # Not for TopK and BatchTopK, whose k is met by selection.
        loss = loss + SPARSITY * len(layout.columns) * (seen.active.mean() / settings.k - 1).square()
    loss.backward()
    features = FeatureCSR(seen.features.indptr, seen.features.indices, seen.features.values.detach(), len(norm))
    error = error.detach()
    aux = _revive(weights, batch.x, error, norm, dead, settings) if settings.aux and len(dead) else None
    scores = features.values * norm[features.indices]
    lowest = float(scores.min()) if features.nnz else 0.0
    return Outcome(features, error, float(loss.detach()), aux, lowest)


def activation(weights: Weights, settings: Settings) -> Activation:
    """The rule of this step."""
    if weights.log_threshold is not None:
        return JumpReLU(weights.log_threshold.exp(), BANDWIDTH)
    return TopK(settings.k) if settings.activation == "topk" else BatchTopK(k=settings.k)


def _revive(weights: Weights, x: Tensor, error: Tensor, norm: Tensor, dead: Tensor, settings: Settings) -> float:
    """Add the gradients of the dead latents' loss; return that loss."""
    rows = [part.detach()[dead].requires_grad_() for part in (weights.W_enc, weights.b_enc, weights.W_dec)]
    chosen = TopK(min(settings.aux_k, len(dead)))
    made = autoencode(x, rows[0].T, rows[1], rows[2], None, chosen, norm=norm[dead]).reconstruction
    size = error.square().mean()
    left = (error - made).square().mean() / torch.where(size > 0, size, 1.0)
    (settings.aux * left).backward()
    for part, row in zip((weights.W_enc, weights.b_enc, weights.W_dec), rows, strict=True):
        assert part.grad is not None and row.grad is not None
        part.grad.index_add_(0, dead, row.grad)
    return float(left.detach())
