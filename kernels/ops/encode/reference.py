"""The definition of encode: all pre-activations at once, then selection by sorting."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from ...features import FeatureCSR, starts


def encode(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    activation: Activation,
    norm: Tensor | None,
    window: float,
) -> FeatureCSR:
    """See :func:`heredity.kernels.encode`; ``window`` lowers JumpReLU's gate, for its pseudo-derivative."""
    pre = torch.stack([x @ w for x, w in zip(xs, weights, strict=True)]).sum(0)
    if bias is not None:
        pre = pre + bias
    score = pre if norm is None else pre.to(torch.promote_types(pre.dtype, torch.float32)) * norm
    keep = selected(score, activation, window)
    tokens, latents = keep.nonzero(as_tuple=True)
    return FeatureCSR(starts(keep.sum(1)), latents.int(), pre[tokens, latents], pre.shape[1])


def selected(score: Tensor, activation: Activation, window: float) -> Tensor:
    """Which entries of ``score`` [T, F] the activation keeps."""
    match activation:
        case ReLU():
            return score > 0
        case JumpReLU(threshold=threshold):
            return score > torch.as_tensor(threshold, dtype=score.dtype, device=score.device).clamp(min=0) - window
        case BatchTopK(threshold=float() | int() as threshold):
            return score > max(float(threshold), 0.0)
        case TopK(k=k):
            # A stable descending sort leaves ties in ascending order of latents.
            order = score.sort(dim=1, descending=True, stable=True).indices[:, :k]
            return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True) & (score > 0)
        case BatchTopK(k=int(k)):
            n_tokens, n_latents = score.shape
            order = score.T.reshape(-1).sort(descending=True, stable=True).indices[: k * n_tokens]
            flat = torch.zeros(n_latents * n_tokens, dtype=torch.bool, device=score.device)
            return flat.index_fill_(0, order, True).view(n_latents, n_tokens).T & (score > 0)
    raise TypeError(f"no such activation: {activation!r}")
