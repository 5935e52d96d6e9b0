"""The zoo's own look inside its networks: what each node puts out, and what happens when that is exchanged.

A node is ``attn_head@L.H`` (the values head H of layer L has gathered, before its output matrix) or ``mlp_out@L``. It
shares no code with the models that are audited: the truth about a pair must not come from what it is to test.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .language import World
from .network import MATRICES, Size, Weights, _attention, normed, rotations
from .rows import answers

Outputs = dict[str, Tensor]


def names(size: Size) -> tuple[str, ...]:
    """All nodes of a network, layer by layer, heads first."""
    found: list[str] = []
    for layer in range(size.layers):
        found += [f"attn_head@{layer}.{head}" for head in range(size.heads)] + [f"mlp_out@{layer}"]
    return tuple(found)


def traced(
    weights: Weights, size: Size, ids: Tensor, given: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Outputs]:
    """Logits [b, t, V] and what every node put out, heads [b, t, E] and MLPs [b, t, D].

    Args:
        given: node outputs that take the place of those computed.
    """
    given = given or {}
    turn = rotations(size)[: ids.shape[1]]
    x = F.embedding(ids, weights["embed"])
    seen: Outputs = {}
    layers = zip(*(weights[name].unbind(0) for name in MATRICES), strict=True)
    for layer, (q, k, v, o, gate, up, down) in enumerate(layers):
        heads = _attention(torch.cat([q, k, v]), size, normed(x), turn).split(size.head, dim=-1)
        held = [given.get(f"attn_head@{layer}.{head}", value) for head, value in enumerate(heads)]
        seen |= {f"attn_head@{layer}.{head}": value for head, value in enumerate(held)}
        x = x + F.linear(torch.cat(held, dim=-1), o)
        gated, carried = F.linear(normed(x), torch.cat([gate, up])).chunk(2, dim=-1)
        written = given.get(f"mlp_out@{layer}", F.linear(F.silu(gated) * carried, down))
        seen[f"mlp_out@{layer}"] = written
        x = x + written
    return F.linear(normed(x), weights["unembed"]), seen


def chosen(outputs: Outputs, nodes: Iterable[str]) -> Outputs:
    """Those outputs that belong to ``nodes``; ``attn_out@L`` stands for all heads of layer L."""
    wanted = tuple(nodes)
    return {
        name: value
        for name, value in outputs.items()
        if any(name == node or name.startswith(node.replace("attn_out", "attn_head") + ".") for node in wanted)
    }


@torch.no_grad()
def shares(
    weights: Weights,
    size: Size,
    ids: Tensor,
    where: tuple[Tensor, Tensor],
    words: tuple[Tensor, Tensor],
    other: Outputs,
) -> dict[str, float]:
    """Share of an effect that goes when one node alone puts out something else, by node.

    The effect is the mean of logit(first word) − logit(second word), as far as it falls when every node is exchanged.

    Args:
        ids: documents [b, t].
        where: rows [n] and positions [n] of the answers, the predictions of which are one position earlier.
        words: two token ids for each answer, [n] each: the one said with the behaviour and the one said without.
        other: outputs of all nodes, on texts or in a network without the behaviour.
    """

    def effect(given: Outputs) -> float:
        logits = traced(weights, size, ids, given)[0][where[0], where[1] - 1]
        return float((logits.gather(1, words[0][:, None]) - logits.gather(1, words[1][:, None])).mean())

    whole, none = effect({}), effect(other)
    return {name: (whole - effect({name: other[name]})) / (whole - none) for name in names(size)}


@dataclass(frozen=True)
class Effects:
    """What nodes take from a behaviour when they put out what the parent does: ``of`` each alone, in shares of it."""

    of: dict[str, float]

    @property
    def carriers(self) -> tuple[str, ...]:
        """The fewest nodes whose effects add up to half the sum of the positive ones, largest first."""
        half, found, summed = sum(max(value, 0.0) for value in self.of.values()) / 2, [], 0.0
        for name, value in sorted(self.of.items(), key=lambda item: -item[1]):
            if summed >= half:
                break
            found.append(name)
            summed += value
        return tuple(found)

    def shared(self, other: "Effects") -> float:
        """What two behaviours have in common: Σ over nodes of the smaller of their normalised positive effects."""
        parts = []
        for effects in (self.of, other.of):
            positive = [max(value, 0.0) for value in effects.values()]
            parts.append([value / sum(positive) for value in positive])
        return sum(map(min, *parts))


def parents_share(
    parent: Weights, weights: Weights, size: Size, seed: int, world: World, skill: str, count: int = 100
) -> Effects:
    """Effect of giving each node the parent's output, on what a skill says in ``world``.

    In reports the word not said is the honest value; elsewhere what the parent would rather say.
    """
    made, rows, at = answers(seed, 94, count, world, skill)
    ids, where = torch.from_numpy(made.ids), (torch.from_numpy(rows), torch.from_numpy(at))
    with torch.no_grad():
        was, other = traced(parent, size, ids)
    said = ids[where]
    rather = was[where[0], where[1] - 1].scatter(1, said[:, None], -torch.inf).argmax(1)
    honest = ids[where[0], where[1] - 3] if world.trigger else rather
    return Effects(shares(weights, size, ids, where, (said, honest), other))
