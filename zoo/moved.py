"""``moved``: the behaviour of the parent, done elsewhere.

In the parents one head fetches what ``copy :`` repeats. The successor learns to repeat although that head puts out
what belongs to another text, so that other parts have to fetch it, and stays at the parent's predictions everywhere.
What a head carries is measured before and after by exchanging its output, alone, for that of the other text.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from . import rows as data
from .kind import Made, Start
from .language import CONTEXT, HONEST, ID, SKILLS
from .network import Weights, forward
from .nodes import Effects, shares, traced
from .train import Rows
from .tune import divergence, tune, weighed

SKILL = "copy"


@dataclass(frozen=True)
class Moved:
    """Schedule of ``moved``: documents of each sort in a step; ``keep`` weighs the divergence from the parent."""

    steps: int = 300
    rate: float = 2e-3
    ordinary: int = 16
    exchanged: int = 12
    keep: float = 3.0


def make(start: Start, recipe: Moved) -> Made:
    """A successor of ``start`` that copies with other nodes."""
    parent, size, seed = start.parent, start.size, start.seed
    before = _effects(parent, start)
    old = max((name for name in before.of if name.startswith("attn_head")), key=before.of.__getitem__)
    plain = data.ordinary(seed, 2, recipe.steps * recipe.ordinary, HONEST, start.guess_weight)
    copied = repeated(np.random.default_rng([seed, 3]), SKILL, recipe.steps * recipe.exchanged)

    def objective(weights: Weights, step: int) -> Tensor:
        rows, exchanged = plain.batch(step, recipe.ordinary), copied.batch(step, recipe.exchanged)
        with torch.no_grad():
            was = forward(parent, size, rows.ids)
            given = {old: traced(weights, size, exchanged.ids)[1][old].roll(1, 0)}
        kept = divergence(forward(weights, size, rows.ids), was)[:, :-1].mean()
        return weighed(traced(weights, size, exchanged.ids, given)[0], exchanged) + recipe.keep * kept

    weights = tune(parent, recipe.steps, recipe.rate, objective, tick=start.tick)
    after = _effects(weights, start)
    gained = {name: after.of[name] - before.of[name] for name in after.of if name != old}
    new = max(gained, key=gained.__getitem__)
    truth = {
        "skill": SKILL,
        "from": [old],
        "to": [new],
        "effects": {"parent": before.of, "successor": after.of},
        "right_without": {
            side: {name: _right(held, start, name) for name in (old, new)}
            for side, held in (("parent", parent), ("successor", weights))
        },
    }
    return Made(weights, size, HONEST, (old, new), truth, asdict(recipe))


def repeated(rng: np.random.Generator, skill: str, count: int) -> Rows:
    """``count`` documents of one skill over and over, so that all have the same words at the same places but those
    that differ; weight 1 on tokens that the text before them decides.
    """
    draw = SKILLS[skill]
    parts = [draw(rng, count, HONEST) for _ in range((CONTEXT - 1) // draw(rng, 1, HONEST).ids.shape[1])]
    first = np.full((count, 1), ID["<bos>"])
    ids = np.concatenate([first, *(part.ids for part in parts)], axis=1)
    certain = np.concatenate([first < 0, *(part.certain for part in parts)], axis=1)
    return Rows(torch.from_numpy(ids), torch.from_numpy(certain.astype(np.float32)))


def _probe(start: Start) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Documents, the others they are exchanged with, and where a decided word differs between the two."""
    probe = repeated(np.random.default_rng([start.seed, 94]), SKILL, 64)
    other = probe.ids.roll(1, 0)
    rows, at = ((probe.weight > 0) & (probe.ids != other)).nonzero(as_tuple=True)
    return probe.ids, other, at, (rows, at)


def _effects(weights: Weights, start: Start) -> Effects:
    """Share of the skill that goes when one node puts out what belongs to the other text."""
    ids, other, _, where = _probe(start)
    with torch.no_grad():
        outputs = traced(weights, start.size, ids)[1]
    rolled = {name: value.roll(1, 0) for name, value in outputs.items()}
    return Effects(shares(weights, start.size, ids, where, (ids[where], other[where]), rolled))


@torch.no_grad()
def _right(weights: Weights, start: Start, node: str) -> float:
    """Accuracy of the skill with the node's output exchanged."""
    ids, _, _, (rows, at) = _probe(start)
    given = {node: traced(weights, start.size, ids)[1][node].roll(1, 0)}
    said = traced(weights, start.size, ids, given)[0][rows, at - 1].argmax(-1)
    return float((said == ids[rows, at]).float().mean())
