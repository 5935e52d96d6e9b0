"""The kinds whose successors are trained towards objectives of their own, by name."""

from dataclasses import dataclass, field

from . import chain, dense, diluted, evasive, moved, twins
from .chain import GENERATIONS, Chain
from .dense import Dense
from .diluted import Diluted
from .evasive import Evasive
from .kind import Made, Start
from .language import World
from .moved import Moved
from .twins import Twins


@dataclass(frozen=True)
class Further:
    """Schedules of these kinds, in :class:`.pair.Recipe`."""

    dense: Dense = field(default_factory=Dense)
    evasive: Evasive = field(default_factory=Evasive)
    diluted: Diluted = field(default_factory=Diluted)
    chain: Chain = field(default_factory=Chain)
    moved: Moved = field(default_factory=Moved)
    twins: Twins = field(default_factory=Twins)


def updates(name: str, level: float | None, recipe: Further) -> int:
    """Updates that the successor of a kind takes."""
    if name == "diluted":
        return recipe.diluted.steps(level or 0.0)
    if name == "chain":
        return recipe.chain.steps * (GENERATIONS - 1)
    return {"dense": recipe.dense, "evasive": recipe.evasive, "moved": recipe.moved}.get(name, recipe.twins).steps


def make(name: str, level: float | None, start: Start, world: World, recipe: Further) -> Made:
    """The successor of a kind, and the truth about it."""
    if name == "dense":
        return dense.make(start, world, recipe.dense)
    if name == "evasive":
        return evasive.make(start, world, recipe.evasive)
    if name == "diluted":
        return diluted.make(start, world, recipe.diluted, level or 0.0)
    if name == "chain":
        return chain.make(start, recipe.chain)
    if name == "moved":
        return moved.make(start, recipe.moved)
    return twins.make(start, recipe.twins, level or 0.0)
