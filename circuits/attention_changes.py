"""What an attention head would do with other queries or other keys: exact through the softmax, linear behind it.

A gradient through a saturated softmax says that nothing changes however far a query or a key moves. Here the softmax
is computed for what the exchanged query or key gives, and only what comes after the pattern P is linear, with
g = ∂m/∂P (the QK fix of AtP*, Kramár et al. 2403.00745, section 3.1):

    effect of a query or of all keys   Σ_k (P − P′)_k g_k
    effect of the key at position k    (P_k − P′_k) ( g_k − Σ_{j≠k} P_j g_j / (1 − P_k) )

The second is the first in closed form where one score of the row moves and the others share what it leaves, written so
that nothing cancels where P_k is near 0 or 1. Effects have the sign of :mod:`.edges`: the value on x minus the one with
the exchange.

One letter means one dimension: B pairs, P positions (queries P, keys K), H heads, G key-value heads, d width of a head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heredity.interp.errors import ModelError
from heredity.interp.model import Model

_LEVEL = 1 << 29
_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Attention:
    """One layer's attention on some prompts.

    Attributes:
        q, k: queries [B, P, H, d] and keys [B, P, G, d] as they are multiplied (rotated, where the model rotates).
        v: values [B, P, G, d].
        scores: what the softmax is taken of, [B, H, P, K], very low where nothing is seen.
        scale, cap: scores are scale · q · k, capped as cap · tanh(· / cap) if there is a cap.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor
    scale: float
    cap: float | None

    @property
    def pattern(self) -> Tensor:
        """[B, H, P, K]."""
        return self.scores.softmax(-1)

    def scores_of(self, q: Tensor, k: Tensor) -> Tensor:
        """Scores [B, H, P, K] that queries and keys would give where positions are seen."""
        products = self.scale * torch.einsum("bqhd,bkhd->bhqk", q, self.grouped(k))
        products = products if self.cap is None else self.cap * (products / self.cap).tanh()
        return torch.where(seen(self.scores), products, self.scores)

    def grouped(self, x: Tensor) -> Tensor:
        """[B, P, G, d] → [B, P, H, d]."""
        return x.repeat_interleave(self.q.shape[2] // x.shape[2], 2)

    def slope(self, gradient: Tensor) -> Tensor:
        """∂m/∂P [B, H, P, K] from the gradient at head values [B, P, H, d]."""
        return torch.einsum("bqhd,bkhd->bhqk", gradient, self.grouped(self.v))


def seen(scores: Tensor) -> Tensor:
    """Where a query sees a key."""
    return scores > torch.finfo(scores.dtype).min / 4


def exchanged(scores: Tensor, other: Tensor, slope: Tensor) -> Tensor:
    """Effect of other scores in each row, [B, H, P]; all three are [B, H, P, K]."""
    return ((scores.softmax(-1) - other.softmax(-1)) * slope).sum(-1)


def each_exchanged(scores: Tensor, other: Tensor, slope: Tensor) -> Tensor:
    """Effect of one other score in a row, for each alone, [B, H, P, K]; all three are [B, H, P, K]."""
    low = torch.finfo(scores.dtype).min
    scores, other = scores.clamp_min(low), other.clamp_min(low)
    first = scores.argmax(-1, keepdim=True)
    above = (scores - scores.gather(-1, first)).exp()
    total, weighted = above.sum(-1, keepdim=True), (above * slope).sum(-1, keepdim=True)
    # What all others weigh together, and their mean slope. Taking the largest off the total would cancel: it is
    # left out from the beginning instead.
    without = scores.scatter(-1, first, low)
    rest = (total - above).log() + scores.gather(-1, first)
    rest = rest.scatter(-1, first, without.logsumexp(-1, keepdim=True))
    mean = (weighted - above * slope) / (total - above)
    mean = mean.scatter(-1, first, (without.softmax(-1) * slope).sum(-1, keepdim=True))
    effect = ((scores - rest).sigmoid() - (other - rest).sigmoid()) * (slope - mean)
    return torch.where(seen(scores), effect, 0.0)


def record_attention(model: Model, tokens: Tensor) -> list[Attention]:
    """Every layer's attention on ``tokens`` [B, P].

    Raises:
        ModelError: scores are no scaled products of queries and keys, or patterns no softmax of scores.
    """
    layers = range(model.shape.n_layers)
    held: dict[str, Tensor] = {}
    names = []
    for layer in layers:
        rotated = f"blocks.{layer}.attn.hook_rot_q" in model.bridge.hook_dict
        sides = ("hook_rot_q", "hook_rot_k") if rotated else ("q.hook_out", "k.hook_out")
        names += [f"blocks.{layer}.attn.{kind}" for kind in (*sides, "hook_attn_scores", "hook_pattern")]
    sites = [f"attn_v@{layer}" for layer in layers]
    with torch.inference_mode(), _kept(model, names, held):
        _, values = model.logits_and_capture(tokens, sites)
    return [_attention(model, layer, held, values[f"attn_v@{layer}"]) for layer in layers]


def _attention(model: Model, layer: int, held: dict[str, Tensor], v: Tensor) -> Attention:
    at = f"blocks.{layer}.attn."
    if at + "hook_rot_q" in held:
        q, k = held[at + "hook_rot_q"], held[at + "hook_rot_k"]
    else:
        q, k = held[at + "q.hook_out"], held[at + "k.hook_out"]
    q, k = (_by_head(side, v) for side in (q, k))
    scores = held[at + "hook_attn_scores"]
    cap = getattr(model.bridge.original_model.config, "attn_logit_softcapping", None)  # Gemma 2
    plain = Attention(q, k, v, scores, 1.0, None)
    visible = seen(scores)
    products = plain.scores_of(q, k)[visible].double()
    theirs = scores[visible].double()
    uncapped = theirs if cap is None else cap * (theirs / cap).atanh()
    # Queries of 0 have scores of 0 at any scale.
    scale = float((uncapped @ products) / products.square().sum()) if products.any() else 1.0
    found = Attention(q, k, v, scores, scale, cap)
    for ours, theirs in ((found.scores_of(q, k)[visible], scores[visible]), (found.pattern, held[at + "hook_pattern"])):
        if not (ours - theirs).norm() <= _TOLERANCE * theirs.norm():
            raise ModelError(
                f"the attention of layer {layer} of this {model.shape.architecture} is not a softmax of scaled "
                "products of queries and keys, so other queries and keys cannot be put into it",
                where=model.spec,
                remedy="Use an architecture without norms of queries and keys, position biases or sinks, or plain AtP.",
            )
    return found


def _by_head(side: Tensor, v: Tensor) -> Tensor:
    """[B, P, heads, d], whether or not heads came as one dimension."""
    return side if side.ndim == 4 else side.unflatten(-1, (-1, v.shape[-1]))


@contextmanager
def _kept(model: Model, names: list[str], into: dict[str, Tensor]) -> Iterator[None]:
    """Keep the values at hook points in every forward inside.

    Raises:
        ModelError: there is no such hook point, or the forward did not pass it.
    """

    def keep(name: str) -> Callable[..., None]:
        def hook(tensor: Tensor, hook: Any) -> None:
            into[name] = tensor

        return hook

    points = {name: model.bridge.hook_dict.get(name) for name in names}
    try:
        for name, point in points.items():
            if point is not None:
                point.add_hook(keep(name), level=_LEVEL)
        yield
    finally:
        for point in points.values():
            if point is not None:
                point.remove_hooks(level=_LEVEL)
    if silent := [name for name in names if name not in into]:
        raise ModelError(
            f"the forward of this {model.shape.architecture} never passes {silent[0]}",
            where=model.spec,
            remedy="Use an architecture with explicit attention patterns (attn_implementation='eager').",
        )
