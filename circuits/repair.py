"""Which edit of the weights takes one behaviour back: tried smallest first, measured for real, the cheapest that works.

Every candidate is put into the running successor and measured on ordinary text and on contexts of the behaviour, others
than it was made from. What is reported afterwards comes from yet others (the caller's).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from heredity.interp.errors import ModelError
from heredity.interp.model import Model

from .attribution import Prompts
from .components import Donor, Node
from .linear import Factors, edited_weights
from .repair_edits import Output, Restorable, outputs, overwriting, random_overwriting, random_restoration, restorable
from .repair_trial import Trial

Way = Literal["restore", "overwrite"]

RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
"""Input directions restored per map, tried in this order."""

STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Weights of the behaviour's tokens against ordinary ones in overwriting, tried in this order."""

FREE = 1e-3
"""Nats of KL per token of ordinary text below which costs are not told apart."""

SLACK = 0.01
"""How much worse the edit made from all contexts may measure than the one made from some of them."""

MISSED = 0.005
"""How much less an edit of fewer maps may take back."""

FURTHER = 2
"""Candidates of a way tried beyond the first that works: a larger one can cost less."""

MARGIN = 0.25
"""How far beyond the target, as a share of the rest, an edit must be where it is chosen: elsewhere it lags a little."""

KEPT = 0.9
"""Share of a declared behaviour that must stay."""

SINGLY = 32
"""Maps that are left out one by one at most."""


@dataclass(frozen=True)
class Tried:
    """One candidate and what it did on the contexts and texts of the choice.

    Attributes:
        way: of the edit.
        level: directions per map (restore) or strength (overwrite).
        maps: weights edited.
        closed: share of the behaviour's divergence that is gone.
        cost: mean KL(S‖edited) per token of ordinary text, nats.
        kept: the smallest share of a declared behaviour that is left (1 without any).
    """

    way: Way
    level: float
    maps: int
    closed: float
    cost: float
    kept: float

    def works(self, target: float) -> bool:
        """Whether it reaches the target, with its margin, and leaves declared behaviours alone."""
        return self.reaches(target + MARGIN * (1 - target))

    def reaches(self, target: float) -> bool:
        """Whether it reaches the target itself and leaves declared behaviours alone."""
        return self.closed >= target and self.kept >= KEPT

    def pays(self, target: float) -> bool:
        """Whether to apply it: it reaches the target, or does some good at no cost that could be told from none."""
        return self.reaches(target) or (self.cost <= FREE and self.kept >= KEPT)


@dataclass(frozen=True)
class Chosen:
    """The edit, with everything that was tried on the way."""

    tried: tuple[Tried, ...]
    best: Tried
    changes: dict[str, Factors]
    """By the weight's name: left [d_out, r] and right [d_in, r]."""
    controls: tuple[Tried, ...]


@dataclass(frozen=True)
class Bed:
    """What edits are made from and measured on.

    Attributes:
        parent, successor: the pair; the successor with the edits of earlier findings.
        modules, modules_parent: linear maps of both (``modules_parent`` is None where parameters do not correspond).
        moments: E[x·xᵀ] of the successor's maps over ordinary text.
        fit: contexts that candidates are made from.
        trial: other contexts, which they are measured on: an edit that only fits its own contexts is no repair.
        whole: both; the edit chosen is made again from these.
        nodes: the circuit.
        means: the nodes' mean writes, where the parent's values cannot be put in.
    """

    parent: Model
    successor: Model
    modules: Mapping[str, nn.Module]
    modules_parent: Mapping[str, nn.Module] | None
    moments: Mapping[str, Tensor]
    fit: Prompts
    trial: Trial
    whole: Prompts
    nodes: Sequence[Node]
    means: Donor | None

    def measured(self, way: Way, level: float, changes: Mapping[str, Factors]) -> Tried:
        """What ``changes`` do."""
        with edited_weights(self.successor, self.modules, changes):
            return Tried(
                way,
                level,
                len(changes),
                self.trial.closed(),
                self.trial.elsewhere().mean_kl,
                min(self.trial.kept(), default=1.0),
            )

    def restorable(self, prompts: Prompts) -> dict[str, Restorable]:
        """The maps that can be restored, read on ``prompts``."""
        if self.modules_parent is None:
            return {}
        return restorable(self.parent, self.successor, self.modules, self.modules_parent, prompts, self.moments)

    def overwriting(self, prompts: Prompts, places: Sequence[Output], strength: float) -> dict[str, Factors]:
        """The edit of the nodes' output matrices made from ``prompts``."""
        return overwriting(
            self.parent, self.successor, self.modules, places, prompts, self.moments, self.means, strength
        )


def choose(bed: Bed, *, target: float, controls: int, seed: int) -> Chosen:
    """The best edit found that takes back ``target`` of the behaviour, beside ``controls`` random ones of its size;
    where none does, the one that takes back most.

    Raises:
        ModelError: nothing in this pair can be edited.
    """
    tried: list[Candidate] = []
    maps = bed.restorable(bed.fit)
    places: list[Output] = []
    if maps:
        most = max(found.subspace.size for found in maps.values())
        ladder = [float(rank) for rank in RANKS if rank <= most]
        tried += _climb(bed, "restore", ladder, lambda r: _restoring(maps, maps, r), target)
    try:
        places = outputs(bed.successor, bed.modules, bed.nodes)
    except ModelError:
        if not tried:
            raise
    if places:
        tried += _climb(bed, "overwrite", STRENGTHS, lambda s: bed.overwriting(bed.fit, places, s), target)
    if not tried:
        raise ModelError(
            "no weight was found whose change carries the behaviour",
            where=bed.successor.spec,
            remedy="Repair a successor whose change is in the linear maps of its heads and MLPs.",
        )
    best = preferred([found for found, _ in tried], target)
    changes = next(made for found, made in tried if found is best)
    if best.works(target):
        best, changes = _fewer(bed, best, changes, maps, target)
    drawn = _controls(bed, best, changes, maps, controls, seed)
    whole = (
        _restoring(bed.restorable(bed.whole), changes, best.level)
        if best.way == "restore"
        else bed.overwriting(bed.whole, places, best.level)
    )
    again = bed.measured(best.way, best.level, whole)
    if (
        again.closed >= best.closed - SLACK
        and again.cost <= max(FREE, 2 * best.cost)
        and again.kept >= best.kept - SLACK
    ):
        changes = whole
    return Chosen(tuple(item[0] for item in tried), best, changes, drawn)


def preferred(tried: Sequence[Tried], target: float) -> Tried:
    """Of edits that work, the cheapest; of those that cost next to nothing, the one that takes back most.

    One that costs next to nothing and reaches the target without its margin goes before any that costs more. Where none
    reaches it, the one that takes back most.
    """
    working = [found for found in tried if found.works(target)]
    if all(found.cost > FREE for found in working):
        working = [found for found in tried if found.reaches(target) and found.cost <= FREE] or working
    if not working:
        return max(tried, key=lambda found: (found.kept >= KEPT, found.closed))
    dear = max(FREE, min(found.cost for found in working))
    return max((found for found in working if found.cost <= dear), key=lambda found: found.closed)


def _restoring(maps: Mapping[str, Restorable], names: Collection[str], rank: float) -> dict[str, Factors]:
    return {name: found.factors(int(rank)) for name, found in maps.items() if name in names}


Candidate = tuple[Tried, dict[str, Factors]]


def _climb(
    bed: Bed, way: Way, levels: Sequence[float], make: Callable[[float], dict[str, Factors]], target: float
) -> list[Candidate]:
    out: list[Candidate] = []
    beyond = 0
    for level in levels:
        changes = make(level)
        if not changes:
            continue
        found = bed.measured(way, float(level), changes)
        out.append((found, changes))
        beyond += any(item[0].works(target) for item in out)
        if beyond > FURTHER:
            break
    return out


def _fewer(
    bed: Bed, best: Tried, changes: dict[str, Factors], maps: Mapping[str, Restorable], target: float
) -> Candidate:
    """Maps left out as long as the edit still works and costs no more: first as many as possible of those with the
    least effect, then one by one."""
    least, dear = best.closed - MISSED, max(FREE, best.cost)
    order = sorted(changes, key=lambda name: (abs(maps[name].effect) if name in maps else 0.0, name))

    def without(dropped: Sequence[str]) -> Candidate | None:
        rest = {name: value for name, value in changes.items() if name not in dropped}
        found = bed.measured(best.way, best.level, rest) if rest else None
        if found is None or not found.works(target) or found.closed < least or found.cost > dear:
            return None
        return found, rest

    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        found = without(order[:middle])
        if found:
            low = middle
        else:
            high = middle
    if low:
        smaller = without(order[:low])
        assert smaller is not None
        best, changes = smaller
    if len(changes) <= SINGLY:
        for name in order[low:]:
            smaller = without([name])
            if smaller:
                best, changes = smaller
    return best, changes


def _controls(
    bed: Bed, best: Tried, changes: Mapping[str, Factors], maps: Mapping[str, Restorable], count: int, seed: int
) -> tuple[Tried, ...]:
    """What edits do that read random directions instead, as many of them in the same maps."""
    out = []
    for k in range(count):
        drawn = (
            random_restoration(maps, bed.moments, {n: f[1].shape[1] for n, f in changes.items()}, seed * 1000 + k)
            if best.way == "restore"
            else random_overwriting(changes, bed.moments, seed * 1000 + k)
        )
        out.append(bed.measured(best.way, best.level, drawn))
    return tuple(out)
