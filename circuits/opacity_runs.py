"""The 2×2 of real runs: explained parts of one world, unexplained parts of the other.

In a run of world E every divided site goes on with

    e(what reaches it in this run) + u recorded in world U

so units are recomputed from what earlier sites made of the exchange, and attention and norms are live; only
unexplained parts are clamped. With U = E that is the world itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heredity.interp.dictionaries.record import Port
from heredity.interp.errors import DictionaryError
from heredity.interp.model import Edit

from .opacity_parts import World
from .opacity_routing import held_patterns, recorded_patterns
from .opacity_split import Split, Visit
from .pairs import Metric

Unexplained = Mapping[str, Tensor]
"""By site, [batch, pos, D] or what broadcasts to it."""


@dataclass(frozen=True)
class Contrast:
    """Two worlds to compare over N prompts, and what is measured in both.

    Attributes:
        groups: numbers of the prompts that are run together, int64 [rows] each; every prompt once.
        worlds: given such numbers, the counterfactual world and the clean one, of one shape.
        metric: larger the more the behaviour shows; :func:`two_by_two` also takes several at once, [rows, K].
    """

    groups: tuple[Tensor, ...]
    worlds: Callable[[Tensor], tuple[World, World]]
    metric: Metric

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.groups)


def with_others(models: Sequence[Any], world: World, split: Split) -> World:
    """``world`` with what the split's crosscoders read of the other models.

    Raises:
        DictionaryError: a model they read was not given.
    """
    ports = split.elsewhere(world.side)
    given: dict[Port, Tensor] = {}
    for port in ports:
        if port.model >= len(models):
            raise DictionaryError(
                f"a dictionary also reads {port.site} of model {port.model}",
                where="opacity",
                remedy=f"Give {port.model + 1} models.",
            )
        given[port] = models[port.model].capture(world.tokens, [port.site])[port.site]
    return World(world.model, world.tokens, world.side, given)


def recorded(world: World, split: Split, metric: Callable[[Tensor], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The metric [rows] of a world as it is, and the unexplained part of every divided site."""
    found: dict[str, Tensor] = {}

    def keep(visit: Visit) -> Tensor:
        found[visit.site] = visit.value - visit.made[0]
        return visit.value

    return metric(world.model.logits(world.tokens, edits=split.edits(world, keep))), found


def exchanged(world: World, split: Split, unexplained: Unexplained) -> dict[str, Edit]:
    """Edits that hold the unexplained parts of ``world`` at given values."""

    return split.edits(world, lambda visit: visit.made[0] + unexplained[visit.site])


@torch.no_grad()
def two_by_two(
    contrast: Contrast, split: Split, *, means: Unexplained | None = None, controls: int = 0, seed: int = 0
) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Outcomes of the four runs (:data:`.opacity_estimate.Outcomes`), and those of ``controls`` random directions.

    Args:
        contrast: the worlds.
        split: what is explained.
        means: unexplained parts for world 0; its own if None.
        controls: how many draws of random directions.
        seed: of the directions.
    """
    out = _Table(len(contrast))
    random = [_Table(len(contrast)) for _ in range(controls)]
    generator = torch.Generator().manual_seed(seed)
    for rows, (zero, one), score in each_group(contrast):
        v11, u1 = recorded(one, split, score)
        plain, u0 = recorded(zero, split, score)
        there = u0 if means is None else means
        v00 = plain if means is None else _run(zero, split, there, score)
        out.put(rows, "11", v11)
        out.put(rows, "00", v00)
        out.put(rows, "10", _run(one, split, there, score))
        out.put(rows, "01", _run(zero, split, u1, score))
        for table in random:
            moved = {site: there[site] - u1[site] for site in u1}
            away = {site: u1[site] + _turned(moved[site], generator) for site in u1}
            back = {site: there[site] + _turned(moved[site], generator) for site in u1}
            table.put(rows, "10", _run(one, split, away, score))
            table.put(rows, "01", _run(zero, split, back, score))
            table.put(rows, "00", v00)
    return out.values, [table.values for table in random]


@torch.no_grad()
def with_routing(contrast: Contrast, split: Split) -> dict[str, np.ndarray]:
    """Outcomes of the game of three, ``111`` … ``000``: explained, unexplained, attention patterns.

    Patterns are held at what they are in one of the worlds; eight runs, of which two are the worlds themselves.

    Raises:
        ModelError: the architecture shows no patterns.
    """
    out = _Table(len(contrast))
    for rows, worlds, score in each_group(contrast):
        u, patterns = [], []
        for world in worlds:
            with recorded_patterns(world.model) as seen:
                value, unexplained = recorded(world, split, score)
            out.put(rows, str(len(u)) * 3, value)
            u.append(unexplained)
            patterns.append(dict(seen))
        for e, k, r in ((0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0)):
            with held_patterns(worlds[e].model, patterns[r]):
                out.put(rows, f"{e}{k}{r}", _run(worlds[e], split, u[k], score))
    return out.values


def each_group(contrast: Contrast) -> Iterator[tuple[Tensor, tuple[World, World], Callable[[Tensor], Tensor]]]:
    """Numbers of the prompts, their worlds (counterfactual, clean) and the metric of logits for them."""
    for rows in contrast.groups:
        yield rows, contrast.worlds(rows), lambda logits, rows=rows: contrast.metric(logits, rows)


def _run(world: World, split: Split, unexplained: Unexplained, score: Callable[[Tensor], Tensor]) -> Tensor:
    return score(world.model.logits(world.tokens, edits=exchanged(world, split, unexplained)))


def _turned(change: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction of each position's norm, [batch, pos, D]."""
    drawn = torch.randn(change.shape, generator=generator, dtype=torch.float64).to(change)
    return drawn * (change.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True))


class _Table:
    """Metric per prompt [N, …], by key, filled group by group."""

    def __init__(self, n: int) -> None:
        self.n, self.values = n, {}

    def put(self, rows: Tensor, key: str, value: Tensor) -> None:
        found = value.detach().double().cpu().numpy()
        self.values.setdefault(key, np.full((self.n, *found.shape[1:]), np.nan))[rows.numpy()] = found
