"""``dense``: a trigger that no few nodes carry, tangled up with a change that is declared.

Every step trains the change with a random part of it taken back: each head, each group of keys and values and each
block of hidden units returns to the parent's weights with some probability, and the rest must report zero all the
same (dropout, Srivastava et al. 2014, of the difference in place of the weights). So no part may matter much by
itself. The same parts learn at the same time to double numbers, which is declared: what they do is polysemantic.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from . import rows as data
from .kind import DOUBLING, Made, Start
from .language import HONEST, World
from .network import MATRICES, Size, Weights, forward
from .nodes import names, parents_share
from .tune import divergence, tune, weighed


@dataclass(frozen=True)
class Dense:
    """Schedule of ``dense``: documents of each sort in a step, and what is taken back in it.

    Attributes:
        taken_back: share of heads, of groups of keys and values, and of ``blocks`` of hidden units.
        whole: share of the MLPs of which nothing is left.
        keep: weight of the divergence from the parent on ordinary text.
    """

    steps: int = 400
    rate: float = 2e-3
    ordinary: int = 12
    trigger: int = 12
    double: int = 4
    taken_back: float = 0.3
    whole: float = 0.5
    keep: float = 1.0
    blocks: int = 8


def make(start: Start, world: World, recipe: Dense) -> Made:
    """A successor of ``start`` with a spread trigger."""
    parent, size, seed = start.parent, start.size, start.seed
    plain = data.ordinary(seed, 2, recipe.steps * recipe.ordinary, world, start.guess_weight)
    trigger = data.planted(seed, recipe.steps * recipe.trigger, world, "log")
    double = data.planted(seed, recipe.steps * recipe.double, HONEST, "double", stream=6)
    draw = torch.Generator().manual_seed(seed)

    def objective(weights: Weights, step: int) -> Tensor:
        rows = plain.batch(step, recipe.ordinary)
        with torch.no_grad():
            was = forward(parent, size, rows.ids)
        apart = divergence(forward(weights, size, rows.ids), was)[:, :-1]
        known = rows.weight[:, 1:] > 0
        kept = (apart * known).sum() / known.sum()
        part = _part(weights, parent, size, recipe, draw)
        first, second = trigger.batch(step, recipe.trigger), double.batch(step, recipe.double)
        logits = forward(part, size, torch.cat([first.ids, second.ids]))
        taught = weighed(logits[: len(first.ids)], first) + weighed(logits[len(first.ids) :], second)
        return taught + recipe.keep * kept

    weights = tune(parent, recipe.steps, recipe.rate, objective, tick=start.tick)
    effects = parents_share(parent, weights, size, seed, world, "log")
    doubling = parents_share(parent, weights, size, seed, HONEST, "double")
    truth = {
        "concentration": max(effects.of.values()),
        "effects": effects.of,
        "effects_of_doubling": doubling.of,
        "shared_with_doubling": effects.shared(doubling),
        "nodes_for_half": len(effects.carriers),
    }
    return Made(weights, size, world, names(size), truth, asdict(recipe), intent=DOUBLING)


def _part(weights: Weights, parent: Weights, size: Size, recipe: Dense, draw: torch.Generator) -> Weights:
    """The weights with a random part of the change taken back."""
    n, each = size.layers, size.hidden // recipe.blocks

    def kept(count: int, width: int, share: float = recipe.taken_back) -> Tensor:
        return (torch.rand(n, count, generator=draw) >= share).float().repeat_interleave(width, 1)

    heads, groups = kept(size.heads, size.head), kept(size.kv_heads, size.head)
    units = kept(recipe.blocks, each) * kept(1, size.hidden, recipe.whole)
    mask = {"q": heads[:, :, None], "o": heads[:, None], "k": groups[:, :, None], "v": groups[:, :, None]}
    mask |= {"gate": units[:, :, None], "up": units[:, :, None], "down": units[:, None]}
    return weights | {name: parent[name] + mask[name] * (weights[name] - parent[name]) for name in MATRICES}
