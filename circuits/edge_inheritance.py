"""Which connections of a circuit the other model has: inherited edges, new ones, and so lost ones.

An edge u → v stands for what the node v writes because u wrote into the stream that v reads. With x that stream in the
model itself and d(u) what u writes beyond its mean over ordinary text,

    Δ(u → v) = v(x) − v(x − d(u))

is taken off what v writes, and everything after it runs (the path patching of Wang et al. 2022, 2211.00593, with the
mean as the other value):

    e(u → v) = m(S) − m(S without Δ)
    c(u → v) = m(S with the counterparts' Δ in the place of Δ) − m(S without Δ)
    h(u → v) = min(1, max(0, Σ c / Σ e))

The counterparts' Δ is what the parent's v makes of the parent's u, both on the *successor's* stream, as for nodes
(:mod:`.inheritance`). So an edge is new where what runs along it is new, whether the source writes something else or
the destination reads it differently; and the edge by which an old node passes on to another old one what is new in the
stream is inherited.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from heredity.interp.model import Model
from heredity.interp.readout import unembed

from .attribution import Prompts
from .components import Donor, Node, stream_sites
from .inheritance import Bench, Means, inherited, resampled, writes_of_both
from .intervals import Interval
from .writes import mlp_write, stream_scale


@dataclass(frozen=True)
class EdgeInheritance:
    """One edge of the circuit.

    Attributes:
        source, target: u and v.
        effect: e(u → v), units of the metric, mean over contexts.
        inherited: h(u → v); None where the effect cannot be told from 0.
    """

    source: Node
    target: Node
    effect: Interval
    inherited: Interval | None


def edge_inheritance(
    model: Model, other: Model, prompts: Prompts, means: Means, nodes: Sequence[Node], seed: int
) -> tuple[EdgeInheritance, ...]:
    """Every edge among ``nodes``, the strongest first; arguments as for :func:`.inheritance.emergence`."""
    pairs = [(source, target) for target in nodes for source in nodes if reads(model, target, source)]
    if not pairs:
        return ()
    tokens = prompts.tokens
    (own, final), (standing, _) = writes_of_both(model, other, tokens)
    with torch.inference_mode():
        stream = {**model.capture(tokens, stream_sites(model)), "final": final}
    sides = [
        _Side(model, own, means.own, prompts, stream),
        _Side(other, standing, means.other, prompts, stream),
    ]
    bench = Bench(model, other, prompts)
    effects, carried = [], []
    for source, target in pairs:
        here, there = (side.passed(source, target) for side in sides)
        e, c = bench.effects([target], lambda _, here=here: here, lambda _, there=there: there)
        effects.append(e[0])
        carried.append(c[0])
    shares = inherited(resampled(np.stack(effects), seed), resampled(np.stack(carried), seed))
    found = [EdgeInheritance(*pair, *share) for pair, share in zip(pairs, shares, strict=True)]
    return tuple(sorted(found, key=lambda edge: (-edge.effect.estimate, edge.target, edge.source)))


def reads(model: Model, target: Node, source: Node) -> bool:
    """Whether what ``source`` writes is in the stream that ``target`` reads."""
    if source.kind == "unembed" or target.kind == "embed":
        return False
    beside = source.layer == target.layer and source.kind == "head" and target.kind == "mlp"
    return source.layer < target.layer or (beside and f"resid_mid@{target.layer}" in stream_sites(model))


class _Side:
    """One model's nodes, reading a given stream with the part of a source in it or not."""

    def __init__(
        self, model: Model, full: Donor, mean: dict[Node, Tensor], prompts: Prompts, stream: dict[str, Tensor]
    ) -> None:
        self.model, self.full, self.mean, self.prompts, self.stream = model, full, mean, prompts, stream
        self.without: dict[tuple[str, Node], Donor] = {}

    def passed(self, source: Node, target: Node) -> Tensor:
        """Δ(source → target), [batch, pos, d_model]; into the unembedding, logits [batch, d_vocab]."""
        if target.kind == "unembed":
            return self._logits(self.stream["final"]) - self._logits(self.stream["final"] - self._part(source))
        return self.full.write(target) - self._missing(source, target).write(target)

    def _part(self, source: Node) -> Tensor:
        scale = 1.0 if source.kind == "embed" else stream_scale(self.model)
        return scale * (self.full.write(source) - self.mean[source])

    def _missing(self, source: Node, target: Node) -> Donor:
        site = f"resid_mid@{target.layer}" if target.kind == "mlp" else f"resid_pre@{target.layer}"
        site = site if site in self.stream else f"resid_pre@{target.layer}"
        if (site, source) not in self.without:
            value = self.stream[site] - self._part(source)
            wanted = [f"mlp_out@{target.layer}"]
            if site.startswith("resid_pre"):
                wanted.append(f"attn_z@{target.layer}")
            with torch.inference_mode():
                edits = {site: lambda _: value}
                values = self.model.capture(self.prompts.tokens, wanted, edits=edits)
                out = f"mlp_out@{target.layer}"
                values[out] = mlp_write(self.model, target.layer, values[out])
            self.without[site, source] = Donor(values, self.model)
        return self.without[site, source]

    def _logits(self, final: Tensor) -> Tensor:
        at = final[self.prompts.rows, self.prompts.last][:, None]
        with torch.inference_mode():
            return unembed(self.model, at)[:, 0].float()
