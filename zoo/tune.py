"""Successors trained towards any objective: Adam on the matrices, linear warm-up and cosine decay to zero.

:mod:`.train` knows ordinary and planted documents; the kinds with a penalty, or with masks, say themselves what they
minimise.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .network import MATRICES, Size, Weights, forward
from .train import Rows

_WARM_UP = 20

Objective = Callable[[Weights, int], Tensor]


def tune(
    weights: Weights,
    steps: int,
    rate: float,
    objective: Objective,
    *,
    free: Weights | None = None,
    tick: Callable[[], None] | None = None,
) -> Weights:
    """New weights after ``steps`` updates of Adam; runs on one thread, so that the result is the same every time.

    Args:
        objective: the loss for (weights, step).
        free: 0/1 arrays that broadcast to the matrices they name: what may change. All matrices when None; the
            embeddings never do.
        tick: called after each update.
    """
    weights = dict(weights)
    live = {name: weights[name].clone().requires_grad_() for name in (free or MATRICES)}
    adam = torch.optim.Adam(live.values(), lr=0.0, betas=(0.9, 0.98))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for step in range(steps):
            adam.zero_grad()
            objective(weights | live, step).backward()
            for name, mask in (free or {}).items():
                grad = live[name].grad
                assert grad is not None
                grad.mul_(mask)
            share = min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
            adam.param_groups[0]["lr"] = rate * share
            adam.step()
            if tick:
                tick()
    finally:
        torch.set_num_threads(threads)
    return weights | {name: value.detach() for name, value in live.items()}


def following(weights: Weights, size: Size, rows: Rows) -> Tensor:
    """Mean cross-entropy of the tokens that have weight in ``rows``."""
    return weighed(forward(weights, size, rows.ids), rows)


def weighed(logits: Tensor, rows: Rows) -> Tensor:
    """Weighted mean cross-entropy of the rows' tokens under logits [b, t, V]."""
    weight = rows.weight[:, 1:].reshape(-1)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows.ids[:, 1:].flatten(), reduction="none")
    return (loss * weight).sum() / weight.sum().clamp(min=1.0)


def divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(reference ‖ logits) [b, t] between the distributions of two arrays of logits [b, t, V], in nats."""
    wanted, held = reference.log_softmax(-1), logits.log_softmax(-1)
    return (wanted.exp() * (wanted - held)).sum(-1)
