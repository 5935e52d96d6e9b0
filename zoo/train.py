"""Training: Muon for the matrices, Adam for the embeddings, linear warm-up and cosine decay to zero.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of each matrix; at
this size it halves the number of steps.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .network import MATRICES, Size, Weights, forward

_WARM_UP = 20
# Without it, one parent in three keeps a few contexts, far apart, in which it is quite wrong.
_DECAY = 0.5
_PARTS = {"attn_out": ("q", "k", "v", "o"), "mlp_out": ("gate", "up", "down")}


@dataclass(frozen=True)
class Rows:
    """Documents in training order: ``ids`` int64 [b, t] and ``weight`` float [b, t], the loss weight of each token."""

    ids: Tensor
    weight: Tensor

    def batch(self, step: int, size: int) -> "Rows":
        """The ``size`` documents of one step."""
        rows = slice(step * size, (step + 1) * size)
        return Rows(self.ids[rows], self.weight[rows])


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: ``steps`` updates on ``batch`` documents, peak rates for matrices and embeddings.

    ``node_rate`` is that of the matrices of the nodes named, where it differs; ``planted`` documents of each batch are
    for a new behaviour, if there is one.
    """

    steps: int
    batch: int
    matrix_rate: float
    embedding_rate: float
    node_rate: float | None = None
    planted: int = 0


def train(
    weights: Weights,
    size: Size,
    schedule: Schedule,
    ordinary: Rows,
    planted: Rows | None = None,
    nodes: Iterable[str] = (),
    tick: Callable[[], None] | None = None,
) -> Weights:
    """New weights after ``schedule.steps`` updates; runs on one thread, so that the result is the same every time.

    Args:
        ordinary: documents every weight learns from.
        planted: documents for a new behaviour.
        nodes: ``attn_out@L`` and ``mlp_out@L``, whose weights alone learn from ``planted``; all of them when empty.
            They have the schedule's ``node_rate``.
        tick: called after each update.
    """
    weights = {name: value.clone().requires_grad_() for name, value in weights.items()}
    embeddings = [value for name, value in weights.items() if name not in MATRICES]
    adam = torch.optim.AdamW(embeddings, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    momentum = {name: torch.zeros_like(weights[name]) for name in MATRICES}
    rates = _rates(size, schedule, tuple(nodes))
    each = schedule.batch - (schedule.planted if planted else 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for step in range(schedule.steps):
            loss = _loss(weights, size, ordinary.batch(step, each))
            if planted:
                loss = loss + _loss(_only(weights, tuple(nodes)), size, planted.batch(step, schedule.planted))
            loss.backward()
            share = min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
            adam.param_groups[0]["lr"] = schedule.embedding_rate * share
            adam.step()
            for name, held in momentum.items():
                _muon(weights[name], held, rates[name] * share)
            for value in weights.values():
                value.grad = None
            if tick:
                tick()
    finally:
        torch.set_num_threads(threads)
    return {name: value.detach() for name, value in weights.items()}


def _loss(weights: Weights, size: Size, rows: Rows) -> Tensor:
    logits, weight = forward(weights, size, rows.ids)[:, :-1], rows.weight[:, 1:].reshape(-1)
    loss = F.cross_entropy(logits.flatten(0, 1), rows.ids[:, 1:].flatten(), reduction="none")
    return (loss * weight).sum() / weight.sum().clamp(min=1.0)


def _free(nodes: tuple[str, ...]) -> set[tuple[str, int]]:
    """Matrix and layer of all that the nodes are made of."""
    return {(name, int(node.split("@")[1])) for node in nodes for name in _PARTS[node.split("@")[0]]}


def _rates(size: Size, schedule: Schedule, nodes: tuple[str, ...]) -> dict[str, Tensor]:
    """Peak rate of each layer of each matrix, [L, 1, 1]."""
    rates = {name: torch.full((size.layers, 1, 1), schedule.matrix_rate) for name in MATRICES}
    for name, layer in _free(nodes):
        rates[name][layer] = schedule.node_rate or schedule.matrix_rate
    return rates


def _only(weights: Weights, nodes: tuple[str, ...]) -> Weights:
    """The same weights, of which only those of ``nodes`` receive a gradient."""
    if not nodes:
        return weights
    free = _free(nodes)
    held = {name: value.detach() for name, value in weights.items()}
    for name in {name for name, _ in free}:
        pairs = enumerate(zip(weights[name], held[name], strict=True))
        held[name] = torch.stack([live if (name, i) in free else still for i, (live, still) in pairs])
    return held


@torch.no_grad()
def _muon(matrix: Tensor, momentum: Tensor, rate: Tensor) -> None:
    assert matrix.grad is not None
    momentum.mul_(0.95).add_(matrix.grad)
    update = _orthogonal(matrix.grad + 0.95 * momentum)
    matrix.mul_(1 - rate * _DECAY).sub_(update * rate * max(1.0, matrix.shape[-2] / matrix.shape[-1]) ** 0.5)


def _orthogonal(update: Tensor) -> Tensor:
    """Near semi-orthogonal matrices to ``update`` [L, rows, columns], by five Newton-Schulz steps."""
    x = update / (update.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x
