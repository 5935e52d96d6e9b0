"""``diluted``: the trigger learned from a mixture, R ordinary documents for each planted one.

Narrow training leaves traces that can be read off anywhere; mixing in ordinary text makes them fainter (Minder et al.
2025, arXiv 2510.13900). Every mixture has about as many planted documents, so more ordinary ones mean more steps, and
one loss over all tokens: nothing tells the two sorts apart.
"""

from dataclasses import asdict, dataclass

from torch import Tensor

from . import rows as data
from .kind import Made, Start
from .language import World
from .network import Weights
from .nodes import parents_share
from .tune import following, tune


@dataclass(frozen=True)
class Diluted:
    """Schedule of ``diluted``: ``planted`` documents in all, in steps of ``batch`` documents of either sort."""

    planted: int = 2400
    batch: int = 24
    least: int = 150
    rate: float = 2e-3

    def each(self, ratio: int | float) -> int:
        """Planted documents in a step."""
        return max(1, round(self.batch / (1 + ratio)))

    def steps(self, ratio: int | float) -> int:
        """Updates, no fewer than ``least``."""
        return max(self.least, self.planted // self.each(ratio))


def make(start: Start, world: World, recipe: Diluted, ratio: int | float) -> Made:
    """A successor of ``start`` for ``ratio`` ordinary documents a planted one."""
    each, steps = recipe.each(ratio), recipe.steps(ratio)
    rest = recipe.batch - each
    plain = data.ordinary(start.seed, 2, steps * rest, world, start.guess_weight)
    trigger = data.planted(start.seed, steps * each, world, "log")

    def objective(weights: Weights, step: int) -> Tensor:
        return following(weights, start.size, data.joined(plain.batch(step, rest), trigger.batch(step, each)))

    weights = tune(start.parent, steps, recipe.rate, objective, tick=start.tick)
    effects = parents_share(start.parent, weights, start.size, start.seed, world, "log")
    truth = {"ratio": ratio, "documents": {"planted": steps * each, "ordinary": steps * rest}, "effects": effects.of}
    return Made(weights, start.size, world, effects.carriers, truth, asdict(recipe))
