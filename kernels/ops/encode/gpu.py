"""Encode on a GPU: one product whose tiles are gated as they are made, then a search of the little that can be kept.

The product (``product_gpu``) stores the gated pre-activations and the best score of every group of 32 latents, and only
the latter, 1/32 as much, are read in full by the selection (``select_gpu``). What is kept lies in groups whose best
score is kept. For TopK these are the groups with the k largest best scores: there are then k scores no smaller than the
k-th of them, so the k-th largest score is not smaller either. There are no atomics: two runs give the same bits.

A crosscoder's product runs over the models' widths one after the other, into one accumulator. Tokens are taken in
chunks, so that the pre-activations stay below ``CHUNK`` bytes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from ...features import FeatureCSR, starts
from .product_gpu import Gated, multiply, padded
from .select_gpu import above, top

CHUNK = 512 * 2**20
"""Bytes of pre-activations at a time (one token's, if those are more)."""

OFFSETS = 2**31
"""Offsets within activations are below this: the product computes them in 32 bits."""


@torch.no_grad()
def encode(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    activation: Activation,
    norm: Tensor | None,
    window: float,
) -> FeatureCSR:
    """See :func:`heredity.kernels.encode`; ``window`` lowers JumpReLU's gate, for its pseudo-derivative."""
    n_tokens, n_latents = xs[0].shape[0], weights[0].shape[1]
    xs = [x if x.stride(1) == 1 else x.contiguous() for x in xs]
    weights = [w if 1 in w.stride() else w.contiguous() for w in weights]
    gates, floor = _gates(activation, window, xs[0].device)
    k = activation.k if isinstance(activation, BatchTopK) else None
    best = None if k is None else _Best(k * n_tokens)
    rows = min(max(CHUNK // (max(padded(n_latents), 1) * xs[0].element_size()), 1), tokens_at_once(xs))
    parts = []
    for first in range(0, n_tokens if n_latents else 0, rows):
        gated = multiply([x[first : first + rows] for x in xs], weights, bias, norm, gates, floor)
        if best is not None:
            best.add(gated)
        elif isinstance(activation, TopK):
            parts.append(top(gated, activation.k))
        else:
            parts.append(above(gated, -math.inf))
    parts = parts if best is None else best.parts
    if parts:
        return parts[0] if len(parts) == 1 else FeatureCSR.concatenate(parts)
    indptr = torch.zeros(n_tokens + 1, dtype=torch.int64, device=xs[0].device)
    return FeatureCSR(indptr, indptr.new_zeros(0, dtype=torch.int32), xs[0].new_zeros(0), n_latents)


def tokens_at_once(xs: Sequence[Tensor]) -> int:
    """As many as have their activations within ``OFFSETS``, also where a row is a slice of a much longer one."""
    return max(OFFSETS // max(max(x.stride(0) + x.shape[1] for x in xs), 1), 1)


def _gates(activation: Activation, window: float, device: torch.device) -> tuple[Tensor | None, float]:
    """What scores must exceed: float32 [F], or None and one number."""
    match activation:
        case JumpReLU(threshold=Tensor() as threshold) if threshold.ndim:
            return threshold.to(device, torch.float32).clamp(min=0) - window, 0.0
        case JumpReLU(threshold=threshold):
            return None, max(float(threshold), 0.0) - window
        case BatchTopK(threshold=float() | int() as threshold):
            return None, max(float(threshold), 0.0)
        case ReLU() | TopK() | BatchTopK():
            return None, 0.0
    raise TypeError(f"no such activation: {activation!r}")


class _Best:
    """The ``count`` largest entries of the tokens so far, one part per chunk."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.parts: list[FeatureCSR] = []
        self.scores: list[Tensor] = []

    def add(self, gated: Gated) -> None:
        """Take in the next chunk."""
        # n groups that are open hold n entries at least as large as the smallest of their best scores.
        known = gated.best[gated.best > -math.inf].float()
        part = above(gated, self._floor([*self.scores, known]))
        score = part.values.float()
        if gated.norm is not None:
            score = score * gated.norm.float()[part.indices.long()]
        self.parts.append(part)
        self.scores.append(score)
        if sum(map(len, self.scores)) > self.count:
            self._drop()

    def _drop(self) -> None:
        """Keep ``count`` entries, of those that tie the ones with the lowest latents, then the first tokens."""
        score = torch.cat(self.scores)
        latents = torch.cat([part.indices for part in self.parts])
        floor = self._floor([score])
        keep = score > floor
        # Entries stand token by token, and the sort is stable.
        equal = (score == floor).nonzero().squeeze(1)
        equal = equal[latents[equal].argsort(stable=True)]
        keep[equal[: self.count - int(keep.sum())]] = True
        keeps = keep.split([part.nnz for part in self.parts])
        self.scores = [score[kept] for score, kept in zip(self.scores, keeps, strict=True)]
        self.parts = [_only(part, kept) for part, kept in zip(self.parts, keeps, strict=True)]

    def _floor(self, scores: list[Tensor]) -> float:
        """The count-th largest of ``scores``; -inf where there are fewer."""
        every = torch.cat(scores)
        return float(every.topk(self.count, sorted=False).values.min()) if len(every) >= self.count else -math.inf


def _only(part: FeatureCSR, keep: Tensor) -> FeatureCSR:
    """The entries at which ``keep`` [N] is true."""
    return FeatureCSR(starts(keep)[part.indptr], part.indices[keep], part.values[keep], part.n_latents)
