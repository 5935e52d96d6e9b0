"""Transplant between models whose parts do not correspond: the successor's nodes, run on what the parent computes.

No node of one architecture runs inside another. So the successor is run with every other node writing what the parent's
stream foretells of it (:mod:`.stitch`); the nodes to transplant stay alive in it and read that stream, and one another.
What they leave at the end of the stream beyond what was foretold of them too is carried to the end of the parent's by a
second linear map (ridge, fitted on ordinary text), and the parent's own last norm and unembedding read it. So the
parent is given the machinery, as in :mod:`.transplant`, and not the successor's answer. Two things are lost on the way:
what the parent's later nodes would make of it, and directions that ordinary text does not use. How much, is said by the
same transplant of all nodes at once, which would close the whole gap if nothing were lost.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from heredity.interp.model import Model
from heredity.interp.readout import unembed

from .attribution import Prompts
from .components import Donor, Node, patches
from .intervals import Interval, ratio
from .stitch import Stitch, ridge
from .transplant import Checked, at_last, divergence, log_probs


@dataclass(frozen=True)
class Passage:
    """From the end of one model's stream to the end of another's: a linear map [d_model, d_model of the other]."""

    weights: Tensor
    r2: float
    """Share of the variance of the other's last residual that is foretold on text used for nothing else."""


def passage(model: Model, other: Model, texts: Sequence[tuple[Tensor, Tensor]]) -> Passage:
    """Fit on ``texts`` = (tokens, mask) [batch, pos].

    Raises:
        ValueError: fewer than 50 tokens.
    """
    ends: tuple[list[Tensor], list[Tensor]] = ([], [])
    for tokens, mask in texts:
        for values, each in zip(ends, (model, other), strict=True):
            with torch.inference_mode():
                values.append(each.capture(tokens, ["final"])["final"][mask].double())
    found = ridge(torch.cat(ends[0]), torch.cat(ends[1]))
    weights = found.weights / found.scale[:, None]
    return Passage(weights, float(1 - found.missed.sum() / found.whole.sum()))


@dataclass(frozen=True)
class Carried:
    """What a transplant between architectures did.

    Attributes:
        nodes: those transplanted.
        share: of the gap closed by them, and by random sets.
        most: of the gap closed by all nodes of the successor at once.
    """

    nodes: tuple[Node, ...]
    share: Checked
    most: Interval


def transplant_across(
    parent: Model,
    successor: Model,
    prompts: Prompts,
    target: float,
    controls: Callable[[Sequence[Node]], Sequence[Collection[Node]]],
    stitch: Stitch,
    way: Passage,
    seed: int,
) -> Carried:
    """Transplant as few nodes as close ``target`` of what all nodes of the successor close.

    All are ranked by what is lost when they alone stay behind, and the first are taken. (What is new in each by itself
    does not tell: the parent's later nodes are not there to pass on what an early one found out, as they are between
    models of one architecture, so nodes with nothing new may have to come along.)

    Args:
        parent, successor: of any architectures that read text as the same tokens.
        prompts: contexts of the behaviour.
        target: a share.
        controls: random sets like the one it is given.
        stitch: what the parent's stream foretells of the successor's nodes.
        way: from the end of the successor's stream to that of the parent's.
        seed: of the bootstrap, over contexts.
    """
    target_log = log_probs(at_last(successor, prompts, {}))
    base = divergence(target_log, log_probs(at_last(parent, prompts, {})))
    host = _Host(parent, successor, prompts, stitch, way)

    def closed(some: Collection[Node]) -> np.ndarray:
        return base - divergence(target_log, log_probs(host.with_nodes(some)))

    every = list(stitch.weights)
    most = closed(every)
    without = {node: closed([other for other in every if other != node]).sum() for node in every}
    ranked = sorted(every, key=lambda node: (without[node], node))
    low, high = 0, len(ranked)
    while high - low > 1:
        middle = (low + high) // 2
        if closed(ranked[:middle]).sum() < target * most.sum():
            low = middle
        else:
            high = middle
    nodes = tuple(ranked[:high])
    others = tuple(float(closed(some).sum() / base.sum()) for some in controls(nodes))
    return Carried(nodes, Checked(ratio(closed(nodes), base, seed), others), ratio(most, base, seed))


class _Host:
    """The parent at some contexts, and the successor with the writes that it foretells."""

    def __init__(self, parent: Model, successor: Model, prompts: Prompts, stitch: Stitch, way: Passage) -> None:
        self.parent, self.successor, self.prompts = parent, successor, prompts
        self.every, self.way = set(stitch.weights), way
        features = stitch.features(parent, prompts.tokens)
        writes = {node: (stitch.means[node] + features @ map_).float() for node, map_ in stitch.weights.items()}
        values = {}
        for layer in range(successor.shape.n_layers):
            heads = [Node(layer, "head", head) for head in range(successor.shape.n_heads)]
            values[f"writes@{layer}"] = torch.stack([writes[head] for head in heads])
            values[f"mlp_out@{layer}"] = writes[Node(layer, "mlp")]
        self.donor = Donor(values, None)
        self.own = self._end(parent, [])
        self.foretold = self._end(successor, self.every)

    def with_nodes(self, nodes: Collection[Node]) -> Tensor:
        """Logits [batch, d_vocab] of the parent with ``nodes`` of the successor."""
        news = self._end(self.successor, self.every - set(nodes)) - self.foretold
        return unembed(self.parent, self.own + (news.double() @ self.way.weights).to(self.own.dtype))[:, 0]

    def _end(self, model: Model, replaced: Collection[Node]) -> Tensor:
        """The last residual [batch, 1, d_model] at the contexts, with some nodes writing what was foretold."""
        edits = patches(model, replaced, self.donor)
        with torch.inference_mode():
            end = model.capture(self.prompts.tokens, ["final"], edits=edits)["final"]
        return end[self.prompts.rows, self.prompts.last][:, None]
