"""At which depth two models of one shape come apart: hybrids of both, the lower part of one under the other's upper.

Exchanging a single layer says little: layers that were trained together do harm one by one, and their shares do not add
up. Cut through the whole stream, shares of neighbouring cuts add up to everything there is. Cutting from below (the
parent's stream under the successor's upper part) and from above (the successor's stream under the parent's upper part)
answers for the two orders in which layers can be exchanged, bottom first and top first; a share is the mean of both, as
Shapley values are means over orders (Shapley 1953). A hybrid of layers that do not fit each other is further from both
models than these are from one another; then shares lie far outside 0 to 1, in pairs, and tell only that.

T tokens, W windows, V vocabulary.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from heredity.interp.model import Model, pad

from .intervals import Interval, ratio

MOST = 8
"""Stretches of layers: each costs two forwards."""


def stretches(model: Model, most: int = MOST) -> list[range]:
    """The layers of ``model`` in at most ``most`` stretches of like length, in order."""
    layers, count = model.shape.n_layers, min(most, model.shape.n_layers)
    ends = [round(k * layers / count) for k in range(count + 1)]
    return [range(a, b) for a, b in pairwise(ends)]


@torch.no_grad()
def by_depth(
    parent: Model, successor: Model, groups: Sequence[Sequence[Sequence[int]]], *, seed: int
) -> list[tuple[str, Interval]] | None:
    """What share of KL(S‖P) each stretch of the computation is the reason of; the shares add up to 1.

    A share below 0 says that the stretch takes back what others do.

    Args:
        parent, successor: models with the same parameters and tokens.
        groups: token ids of windows of text, a batch each.
        seed: of the bootstrap over windows.

    Returns:
        (``embed``, ``layer 3`` or ``layers 4–7``, ``unembed``; share with its 95 % interval) in the order of the
        forward; None where the models say the same everywhere.
    """
    parts = stretches(successor)
    cuts = ["resid_pre@0", *(f"resid_post@{part[-1]}" for part in parts)]
    kept = [_windows(parent, successor, cuts, group) for group in groups]
    below, above = (np.concatenate([each[side] for each in kept]) for side in range(2))
    whole = below[:, -1]
    if not whole.sum() > 0:
        return None
    shares = (np.diff(below, axis=1) - np.diff(above, axis=1)) / 2
    names = ["embed", *map(_name, parts), "unembed"]
    return [(name, ratio(column, whole, seed)) for name, column in zip(names, shares.T, strict=True)]


def _windows(
    parent: Model, successor: Model, cuts: Sequence[str], group: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Σ KL(S‖hybrid) of each window, [W, cuts + 2] each: with the parent's parts below each cut, from none to all of
    them, and with the parent's above it, from all to none."""
    tokens, mask = pad(list(group))
    log_s = successor.logits(tokens).log_softmax(-1)
    p_s = log_s.exp()

    def apart(logits: Tensor) -> np.ndarray:
        kl = (p_s * (log_s - logits.log_softmax(-1))).sum(-1).clamp_min(0)
        return (kl * mask).sum(1).double().numpy()

    nothing, everything = np.zeros(len(tokens)), apart(parent.logits(tokens))
    there, here = parent.capture(tokens, list(cuts)), successor.capture(tokens, list(cuts))
    below = [apart(_upper(successor, tokens, cut, there[cut])) for cut in cuts]
    above = [apart(_upper(parent, tokens, cut, here[cut])) for cut in cuts]
    return np.stack([nothing, *below, everything], 1), np.stack([everything, *above, nothing], 1)


def _upper(model: Model, tokens: Tensor, cut: str, stream: Tensor) -> Tensor:
    """Logits of what of ``model`` stands above ``cut``, on another model's ``stream`` there."""
    return model.logits(tokens, edits={cut: lambda _: stream})


def _name(part: range) -> str:
    return f"layer {part[0]}" if len(part) == 1 else f"layers {part[0]}–{part[-1]}"
