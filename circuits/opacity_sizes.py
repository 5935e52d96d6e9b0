"""Opacity over sizes of a circuit, with the faithfulness each size has: a circuit must not look clear by what it omits.

A circuit is a set of units and of errors (one per divided site; all of an opaque one). For each size three shares:

    faithfulness   f(C):      all of C from the clean run, the rest of every site from the counterfactual
    total          Ω_total:   Ω of the whole effect when everything outside C counts as unexplained
    within         Ω_within:  the 2×2 inside C, the rest held at the counterfactual, as a share of what C carries

``within`` of a small circuit may be anything; ``total`` can only come down by explained units that matter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .intervals import Interval, ratio
from .opacity_estimate import FEWEST, Refused, effect_of
from .opacity_parts import World
from .opacity_runs import Contrast, each_group, exchanged, recorded
from .opacity_split import Split, Visit

SIZES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, eq=False)
class Ranking:
    """First-order effects: what exchanging a unit or an error for its counterfactual is expected to take away.

    Attributes:
        units: of each part's units, float64 [F], summed over prompts.
        errors: by divided site.
    """

    units: tuple[Tensor, ...]
    errors: Mapping[str, float]


@dataclass(frozen=True)
class Size:
    """One circuit of the curve."""

    nodes: int
    """Units and errors in it."""
    share: float
    """Of all units with an effect and all errors."""
    errors: tuple[str, ...]
    """Sites whose error is in it."""
    faithfulness: Interval
    total: Interval
    within: Interval | None
    """None where what the circuit carries is not told from 0."""


def rank_units(contrast: Contrast, split: Split) -> Ranking:
    """Attribution patching of every unit and error, the gradient averaged over both worlds (as in :mod:`.edges`)."""
    units = [torch.zeros(len(q), dtype=torch.float64) for q in split.q]
    errors = dict.fromkeys(split.sites(0), 0.0)
    for _, worlds, score in each_group(contrast):
        seen, slopes, rest = [], [], []
        for world in worlds:
            probes: dict[str, Tensor] = {}
            values: dict[str, Tensor] = {}
            error: dict[str, Tensor] = {}

            def look(visit: Visit, probes=probes, values=values, error=error) -> Tensor:
                values.update({site: value.detach() for site, value in visit.seen.items()})
                error[visit.site] = (visit.value - visit.made[0]).detach()
                probes[visit.site] = torch.zeros_like(visit.value).requires_grad_()
                return visit.value + probes[visit.site]

            ones = [torch.ones_like(q)[None] for q in split.q]
            with torch.enable_grad():
                value = score(world.model.logits(world.tokens, edits=split.edits(world, look, weights=ones)))
                grads = torch.autograd.grad(value.sum(), list(probes.values()), allow_unused=True)
            seen.append(values)
            rest.append(error)
            pairs = zip(probes.items(), grads, strict=True)
            slopes.append({site: torch.zeros_like(p) if g is None else g for (site, p), g in pairs})
        slope = {site: (slopes[0][site] + slopes[1][site]) / 2 for site in slopes[0]}
        for site, g in slope.items():
            errors[site] += float((g * (rest[1][site] - rest[0][site])).sum())
        for i, part in enumerate(split.parts):
            # What units write is linear in their weights, so the gradient in a weight is the unit's own term.
            weights = torch.ones_like(part.q)[None].requires_grad_()
            with torch.enable_grad():
                total = torch.zeros(())
                for world, at, sign in zip(worlds, seen, (-1, 1), strict=True):
                    for site, out in part.write(world, at, weights, True).items():
                        total = total + sign * (out[0] * slope[site]).sum()
                units[i] += torch.autograd.grad(total, weights)[0][0].double()
    return Ranking(tuple(units), errors)


@torch.no_grad()
def opacity_over_sizes(
    contrast: Contrast,
    split: Split,
    ranking: Ranking,
    *,
    sizes: Sequence[float] = SIZES,
    fewest: int = FEWEST,
    seed: int = 0,
) -> list[Size] | Refused:
    """The curve of circuits taken by absolute effect.

    Use other prompts than those the ranking comes from. Three forwards per prompt and world beside the 2×2's, for each
    size.

    Args:
        contrast: the worlds.
        split: what is explained; of the whole model (:func:`.opacity_split.whole_model`) for shares of its effect.
        ranking: of :func:`rank_units`.
        sizes: shares of all units with an effect and all errors.
        fewest, seed: as of :func:`.opacity.opacity`.
    """
    sites = list(ranking.errors)
    scores = torch.cat([*ranking.units, torch.tensor([ranking.errors[site] for site in sites], dtype=torch.float64)])
    order = scores.abs().argsort(descending=True, stable=True)
    n_all = int((scores != 0).sum())
    starts = np.cumsum([0, *(len(each) for each in ranking.units)])
    found = []
    for share in sizes:
        chosen = torch.zeros(len(scores), dtype=torch.bool)
        # All means all: units without a first-order effect may wake up in a mixed run.
        chosen[order[: max(1, round(share * n_all)) if share < 1 else len(order)]] = True
        masks = [chosen[a:b] for a, b in pairwise(starts.tolist())]
        errors = tuple(site for site, kept in zip(sites, chosen[starts[-1] :].tolist(), strict=True) if kept)
        v = _runs(contrast, split, masks, errors)
        gap = v["11"] - v["00"]
        effect = effect_of(gap, fewest=fewest, seed=seed)
        if isinstance(effect, Refused):
            return effect
        carried = v["c11"] - v["00"]
        inside = (v["c11"] - v["10"] + v["c01"] - v["00"]) / 2
        found.append(
            Size(
                nodes=int(chosen.sum()),
                share=min(1.0, int(chosen.sum()) / n_all),
                errors=errors,
                faithfulness=ratio(carried, gap, seed),
                total=ratio((v["11"] - v["10"] + v["01"] - v["00"]) / 2, gap, seed),
                within=None
                if isinstance(effect_of(carried, fewest=fewest, seed=seed), Refused)
                else ratio(inside, carried, seed),
            )
        )
    return found


def _runs(contrast: Contrast, split: Split, masks: Sequence[Tensor], errors: Sequence[str]) -> dict[str, np.ndarray]:
    """Outcomes with circuit C: ``11``, ``00``, ``10``, ``01`` of its explained units against all else; ``c11``: all of
    C clean; ``c01``: its unexplained parts alone."""
    out: dict[str, np.ndarray] = {}
    whole = split.with_q([mask.to(q) for mask, q in zip(masks, split.q, strict=True)])
    known = split.with_q([mask * q for mask, q in zip(masks, split.q, strict=True)])
    every = split.with_q([torch.ones_like(q) for q in split.q])
    for rows, worlds, score in each_group(contrast):
        zero, one = worlds
        values, of_known = zip(*(recorded(world, known, score) for world in worlds), strict=True)
        of_whole, rest = ([recorded(world, each, score)[1] for world in worlds] for each in (whole, every))
        kept = {site: of_whole[0][site] for site in of_whole[0]}
        for site in errors:
            kept[site] = kept[site] + rest[1][site] - rest[0][site]
        alone = {site: kept[site] + of_known[1][site] - of_whole[1][site] for site in kept}

        def run(world: World, by: Split, held: Mapping[str, Tensor], score=score) -> Tensor:
            return score(world.model.logits(world.tokens, edits=exchanged(world, by, held)))

        found = {
            "00": values[0],
            "11": values[1],
            "10": run(one, known, of_known[0]),
            "01": run(zero, known, of_known[1]),
            "c11": run(one, whole, kept),
            "c01": run(zero, known, alone),
        }
        for key, value in found.items():
            out.setdefault(key, np.zeros(len(contrast)))[rows.numpy()] = value.double().numpy()
    return out
