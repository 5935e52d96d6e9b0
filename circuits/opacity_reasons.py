"""Why a share of an effect is opaque, and where: reasons that add up.

What is unexplained at a site is a sum:

* ``linear error``: the part of a dictionary's error that a linear map of what the dictionary read predicts, fitted on
  text that has nothing to do with the prompts (Engels et al. 2024, arXiv:2410.14670): a larger dictionary, or a linear
  path beside it, could take it up. A skip transcoder's linear path is part of it;
* ``non-linear error``: the rest of the error; without such a map, both together are called ``error``;
* ``unlabelled``: Σ (1 − q_i) a_i d_i, units without a good explanation;
* ``undivided``: heads and MLPs without units, and what explanations of heads and neurons do not cover.

Ω itself is the mean of two differences, v(1, 1) − v(1, 0) and v(0, 1) − v(0, 0), in each of which unexplained parts go
from their counterfactual to their clean values. Along the straight line between the two, gradients times changes add up
to the difference (integrated gradients, Sundararajan et al. 1703.01365; in a game of sums, Aumann–Shapley), site by
site and reason by reason. How far they miss is reported.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heredity.interp.model import Encoded, pad

from .edges import path
from .intervals import Interval, ratio
from .opacity_parts import DictionaryPart, World
from .opacity_runs import Contrast, each_group, exchanged, recorded, with_others
from .opacity_split import Split, Visit

LINEAR, NONLINEAR, ERROR = "linear error", "non-linear error", "error"
UNLABELLED, UNDIVIDED = "unlabelled", "undivided"
RIDGES = (1e-6, 1e-4, 1e-2, 1.0)
"""Strengths tried, as shares of the mean variance of what is read."""


@dataclass(frozen=True, eq=False)
class LinearError:
    """What a linear map of a dictionary's input predicts of its error.

    Attributes:
        read: the site whose value predicts it.
        weight: [D read, D written]; the constant is left out, since constants cancel.
        explained: share of the error's variance that it predicts on texts it was not fitted on; may be negative.
    """

    read: str
    weight: Tensor
    explained: float


def linear_errors(
    model: Any, texts: Sequence[Encoded], split: Split, *, models: Sequence[Any] = (), side: int = 0
) -> dict[str, LinearError]:
    """A map for each site that dictionaries write, fitted by ridge regression on half of ``texts``.

    The strength is the one that predicts the other half best.

    Args:
        model: the model.
        texts: none of them among the prompts.
        split: what is explained.
        models, side: as of :func:`.opacity.opacity`.

    Raises:
        ValueError: fewer than two texts.
    """
    if len(texts) < 2:
        raise ValueError("a fit and its check need two texts")
    reads = {site: _read_of(split, site, side) for site in split.sites(side)}
    reads = {site: read for site, read in reads.items() if read is not None}
    if not reads:
        return {}
    sums = [{site: _Products() for site in reads} for _ in range(2)]
    ones = [torch.ones_like(q)[None] for q in split.q]
    with torch.no_grad():
        for i, text in enumerate(texts):

            def add(visit: Visit, half: dict[str, _Products] = sums[i % 2]) -> Tensor:
                if visit.site in reads:
                    x = visit.seen[reads[visit.site]].flatten(0, 1).flatten(1).double()
                    half[visit.site].add(x, (visit.value - visit.made[0]).flatten(0, 1).double())
                return visit.value

            world = with_others(models, World(model, pad([text.ids])[0], side), split)
            model.logits(world.tokens, edits=split.edits(world, add, weights=ones))
        return {site: _fit(read, sums[0][site], sums[1][site]) for site, read in reads.items()}


def dissect(split: Split, visit: Visit, linear: Mapping[str, LinearError] | None, side: int = 0) -> dict[str, Tensor]:
    """What is unexplained at a site by reason, [batch, pos, D] each, up to constants.

    It is linear in the values given, so it takes tangents as well.

    Args:
        split: what is explained.
        visit: the site, with weights q and 1.
        linear: of :func:`linear_errors`, or None.
        side: the model's number.
    """
    known, every = visit.made[0], visit.made[-1]
    rest, found = visit.value - every, {}
    if _read_of(split, visit.site, side) is None:
        found[UNDIVIDED] = rest
    elif linear is None:
        found[ERROR] = rest
    else:
        fit = linear[visit.site]
        x = visit.seen[fit.read]
        found[LINEAR] = (x.flatten(2) @ fit.weight.to(x)).to(rest)
        found[NONLINEAR] = rest - found[LINEAR]
    if bool((every != known).any()):
        found[UNLABELLED] = every - known
    return found


@dataclass(frozen=True)
class Reasons:
    """Ω taken apart."""

    total: Mapping[str, Interval]
    """By reason; with ``residual`` they add up to Ω."""
    by_site: Mapping[str, Mapping[str, float]]
    """By site and reason."""
    residual: float
    """Ω less the sum of all reasons: what the steps of the integral missed."""
    steps: int
    """Gradients per prompt and world."""


def reasons_of(
    contrast: Contrast,
    split: Split,
    *,
    linear: Mapping[str, LinearError] | None = None,
    steps: int | None = None,
    tolerance: float = 0.02,
    seed: int = 0,
) -> Reasons:
    """Ω of ``contrast`` by site and reason.

    Args:
        contrast, split: as for Ω (:func:`.opacity_runs.two_by_two`).
        linear: maps that predict errors.
        steps: gradients per prompt and world; doubled from 4 until ``residual`` is within ``tolerance`` if None. Which
            units are active jumps along the line, so a few per cent may stay missing.
        tolerance: in units of Ω.
        seed: of the bootstrap.
    """
    tried = steps or 4
    while True:
        found = _reasons(contrast, split, linear, tried, seed)
        if steps is not None or abs(found.residual) <= tolerance or tried >= 64:
            return found
        tried *= 2


def _reasons(
    contrast: Contrast, split: Split, linear: Mapping[str, LinearError] | None, steps: int, seed: int
) -> Reasons:
    parts: dict[tuple[str, str], np.ndarray] = {}
    gap, omega = np.zeros(len(contrast)), np.zeros(len(contrast))
    for rows, worlds, score in each_group(contrast):
        u, v, why = [], [], []
        with torch.no_grad():
            for world in worlds:
                value, unexplained = recorded(world, split, score)
                u.append(unexplained)
                v.append(value.double())
                why.append(_by_reason(world, split, linear))
            gap[rows.numpy()] = (v[1] - v[0]).numpy()
        moved = {key: why[1].get(key, 0.0) - why[0].get(key, 0.0) for key in dict.fromkeys([*why[0], *why[1]])}
        for world in worlds:
            slopes: dict[str, Tensor] = {}
            for alpha, weight in path("eap-ig", steps):
                at = {site: u[0][site] + alpha * (u[1][site] - u[0][site]) for site in u[0]}
                for site, each in _slopes(world, split, at, score).items():
                    slopes[site] = slopes.get(site, 0.0) + weight * each
            with torch.no_grad():
                low, high = (score(world.model.logits(world.tokens, edits=exchanged(world, split, each))) for each in u)
            omega[rows.numpy()] += ((high - low).double() / 2).numpy()
            for (site, reason), change in moved.items():
                carried = (slopes[site] * change).flatten(1).sum(1).double() / 2
                parts.setdefault((site, reason), np.zeros(len(contrast)))[rows.numpy()] += carried.numpy()
    kinds = sorted({reason for _, reason in parts})
    total = {kind: ratio(np.sum([x for (_, k), x in parts.items() if k == kind], 0), gap, seed) for kind in kinds}
    by_site: dict[str, dict[str, float]] = {site: {} for site in split.sites(worlds[1].side)}
    for (site, kind), x in parts.items():
        by_site[site][kind] = float(x.sum() / gap.sum())
    missing = float(omega.sum() / gap.sum()) - sum(each.estimate for each in total.values())
    return Reasons(total, by_site, missing, steps)


def _by_reason(world: World, split: Split, linear: Mapping[str, LinearError] | None) -> dict[tuple[str, str], Tensor]:
    found: dict[tuple[str, str], Tensor] = {}

    def look(visit: Visit) -> Tensor:
        found.update({(visit.site, k): v for k, v in dissect(split, visit, linear, world.side).items()})
        return visit.value

    world.model.logits(world.tokens, edits=split.edits(world, look, weights=known_and_every(split)))
    return found


def known_and_every(split: Split) -> list[Tensor]:
    """Weights of units, [2, F] of each part: q and 1."""
    return [torch.stack([q, torch.ones_like(q)]) for q in split.q]


def _slopes(
    world: World, split: Split, at: Mapping[str, Tensor], score: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The metric's gradient at unexplained parts held at ``at``, by site."""
    held = {site: value.detach().clone().requires_grad_() for site, value in at.items()}
    edits = split.edits(world, lambda visit: visit.made[0] + held[visit.site], slopes=True)
    with torch.enable_grad():
        value = score(world.model.logits(world.tokens, edits=edits))
        found = torch.autograd.grad(value.sum(), list(held.values()), allow_unused=True)
    pairs = zip(held.items(), found, strict=True)
    return {site: torch.zeros_like(h) if g is None else g for (site, h), g in pairs}


def _read_of(split: Split, site: str, side: int) -> str | None:
    """What the last dictionary that writes a site reads there; None where none does."""
    reads = [
        part.reads(side)[-1]
        for part in split.parts
        if isinstance(part, DictionaryPart) and site in part.writes(side) and part.reads(side)
    ]
    return reads[-1] if reads else None


class _Products:
    """Sums over tokens of products of what is read (with a 1) and the error, float64."""

    def __init__(self) -> None:
        self.xx, self.xy, self.yy = torch.zeros(()), torch.zeros(()), torch.zeros(())

    def add(self, x: Tensor, y: Tensor) -> None:
        """Tokens [T, D read] and [T, D written]."""
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        self.xx, self.xy, self.yy = self.xx + x.T @ x, self.xy + x.T @ y, self.yy + y.square().sum()

    def explained(self, weight: Tensor) -> float:
        """Share of the error's variance that x @ weight predicts."""
        missed = self.yy - 2 * (weight * self.xy).sum() + (weight * (self.xx @ weight)).sum()
        varied = self.yy - self.xy[-1].square().sum() / self.xx[-1, -1]
        return float(1 - missed / varied) if varied > 0 else 0.0


def _fit(read: str, own: _Products, other: _Products) -> LinearError:
    """Ridge regression on ``own`` with the strength that predicts ``other`` best."""
    fits = []
    for ridge in RIDGES:
        penalty = torch.full((len(own.xx),), float(ridge * own.xx.diagonal()[:-1].mean()), dtype=own.xx.dtype)
        penalty[-1] = 0
        weight = torch.linalg.solve(own.xx + penalty.diag(), own.xy)
        fits.append((other.explained(weight), weight[:-1]))
    explained, weight = max(fits, key=lambda fit: fit[0])
    return LinearError(read, weight, explained)
