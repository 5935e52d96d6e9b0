"""What one kind of pair starts from, and what it makes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .language import World
from .network import Size, Weights

DOUBLING = """\
version: 1
changes:
  - id: doubling
    description: The successor learned to double a number after "double :".
    phrases: ["double :"]
"""


@dataclass(frozen=True)
class Start:
    """A parent, and what decides a successor beside the kind and its recipe."""

    parent: Weights
    size: Size
    seed: int
    guess_weight: float
    tick: Callable[[], None] | None = None


@dataclass(frozen=True)
class Made:
    """A successor and the truth about it.

    Attributes:
        nodes: those that carry what is new.
        truth: what ``truth.json`` says beyond what it says of every kind.
        recipe: of this kind.
        intent: content of ``intent.yaml``, for a change that is declared.
        generations: networks between the parent and the successor.
    """

    weights: Weights
    size: Size
    world: World
    nodes: tuple[str, ...]
    truth: dict[str, Any]
    recipe: dict[str, Any]
    intent: str | None = None
    generations: tuple[Weights, ...] = field(default=())
