"""What became of a behaviour and of the mechanism that carries it, from a parent to its successor, on the same prompts.

**Behaviour.** The effect is the mean of m(x) − m(x′) over pairs; a pair is *kept* where m(x) > 0, that is, where the
right answer leads. What a successor lost is compared with what means nothing (:attr:`Change.tolerance`): the largest
loss of any null successor, and how far the parent's own effect differs between two random halves of the prompts. A pair
is *broken* where the parent keeps it, the successor does not, and the fall is larger than any pair's in any null.

**Mechanism.** Necessity is the share of a model's effect that goes when the parent's carriers (or their counterparts in
the successor) are exchanged together. That alone would miss a step that moved: parts that work one after the other each
carry most of the effect, so those that stayed hide the one that did not. So :attr:`Change.carried` is taken carrier by
carrier, of those that alone carry at least :data:`MAIN` of what all carry in the parent (of all together where none
does): share in the successor over share in the parent, of the carrier that kept least. 1 where the same nodes do the
work, 0 where a step of it is done elsewhere.

All intervals are percentile bootstraps over pairs, parent and successor drawn together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .intervals import BOOTSTRAPS, Interval
from .mechanism import Readings

MAIN = 0.5
"""Share of what all carriers take from which one is a main carrier: most of the effect passes through it."""
HALVES = 1000
"""Random halves of the prompts."""
Z = 1.959963984540054

Fate = Literal["kept", "weakened", "gone"]


@dataclass(frozen=True)
class NodeChange:
    """What one node carries in both models, as shares of each model's own effect.

    Attributes:
        parent_node, successor_node: the same mechanism in both; None where there is no counterpart.
        parent, successor: None where it has no counterpart there.
        change: successor − parent, without a counterpart counting as 0.
        inherited: h, the part of its share in the successor that it had in the parent, 0 to 1; None where it carries
            nothing in the successor.
        moved: ``gained`` or ``lost`` where the change's interval lies outside of what halves of the prompts differ by.
    """

    parent_node: str | None
    successor_node: str | None
    parent: Interval | None
    successor: Interval | None
    change: Interval
    inherited: float | None
    moved: Literal["gained", "lost"] | None


@dataclass(frozen=True)
class Change:
    """Everything compared.

    Attributes:
        effect_parent, effect_successor, difference: the effect and its change (successor − parent), in units of the
            metric.
        lost: share of the parent's effect that is gone.
        tolerance: loss of effect that means nothing, in units of the metric.
        kept_parent, kept_successor: share of pairs kept, with Wilson's interval.
        broken: numbers of broken pairs.
        fate: ``gone`` where at most half of the pairs are kept and effect was lost; ``weakened`` where the loss exceeds
            the tolerance or a pair is broken.
        necessity_parent, necessity_successor, carried: see the module.
        least: the parent's main carrier that ``carried`` is of; None where it is of all carriers together.
        inherited: Σ over nodes of the smaller of their normalised shares (positive ones) in parent and successor.
        nodes: by size of change.
    """

    effect_parent: Interval
    effect_successor: Interval
    difference: Interval
    lost: Interval
    tolerance: float
    kept_parent: Interval
    kept_successor: Interval
    broken: tuple[int, ...]
    fate: Fate
    necessity_parent: Interval
    necessity_successor: Interval
    carried: Interval
    least: str | None
    inherited: Interval
    nodes: tuple[NodeChange, ...]


def compare(
    parent: Readings,
    successor: Readings,
    nulls: Sequence[np.ndarray],
    counterpart: Mapping[str, str] | Callable[[str], str | None],
    carriers: Sequence[str],
    seed: int = 0,
) -> Change:
    """What became of ``parent``'s behaviour and mechanism in ``successor``.

    Args:
        parent, successor: on the same N pairs in the same order.
        nulls: of each null successor, m(x) and m(x′) of every pair, float64 [2, N]; may be empty.
        counterpart: the successor's node for a node of the parent, if any.
        carriers: of the parent.
        seed: of bootstraps and halves.
    """
    find = counterpart.get if isinstance(counterpart, Mapping) else counterpart
    rng = np.random.default_rng(seed)
    n = len(parent.clean)
    draws = rng.integers(n, size=(BOOTSTRAPS, n))
    halves = np.stack([rng.permutation(n) for _ in range(HALVES)])
    resampled = Resampled(draws)
    effect_p, effect_s = parent.effect, successor.effect
    lost = resampled.share(effect_p - effect_s, effect_p)
    null_effects = [null[0] - null[1] for null in nulls]
    null_loss = max((float((effect_p - null).mean()) for null in null_effects), default=0.0)
    tolerance = max(null_loss, _between_halves(effect_p, halves), 0.0)
    kept_s = wilson(int((successor.clean > 0).sum()), n)
    falls = parent.clean - successor.clean
    largest = max((float((parent.clean - null[0]).max()) for null in nulls), default=2 * float(parent.clean.std()))
    broken = np.flatnonzero((parent.clean > 0) & (successor.clean <= 0) & (falls > max(largest, 0.0)))
    difference = resampled.mean(effect_s - effect_p)
    fate: Fate = "kept"
    if kept_s.estimate <= 0.5 and difference.high < 0:
        fate = "gone"
    elif -difference.high > tolerance or len(broken):
        fate = "weakened"
    necessity_p, necessity_s = (resampled.share(r.carried, r.effect) for r in (parent, successor))
    measured = min((len(value) for of in (parent, successor) for value in of.effects.values()), default=n)
    few = Resampled(rng.integers(measured, size=(BOOTSTRAPS, measured)))
    split = np.stack([rng.permutation(measured) for _ in range(HALVES)])
    nodes, inherited = _nodes(parent, successor, find, few, split)
    carried, least = _carried(parent, successor, find, carriers, resampled, few)
    return Change(
        effect_parent=resampled.mean(effect_p),
        effect_successor=resampled.mean(effect_s),
        difference=difference,
        lost=lost,
        tolerance=tolerance,
        kept_parent=wilson(int((parent.clean > 0).sum()), n),
        kept_successor=kept_s,
        broken=tuple(broken.tolist()),
        fate=fate,
        necessity_parent=necessity_p,
        necessity_successor=necessity_s,
        carried=carried,
        least=least,
        inherited=inherited,
        nodes=nodes,
    )


class Resampled:
    """Bootstrap intervals of several numbers over the same draws [draws, N] of pairs."""

    def __init__(self, draws: np.ndarray) -> None:
        self.draws = draws

    def mean(self, values: np.ndarray) -> Interval:
        """Of the mean."""
        return interval(float(values.mean()), values[self.draws].mean(1))

    def share(self, above: np.ndarray, below: np.ndarray) -> Interval:
        """Of Σ above / Σ below."""
        return interval(*self.ratios(above, below))

    def quotient(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> Interval:
        """Of (Σa / Σb) / (Σc / Σd)."""
        (first, firsts), (second, seconds) = self.ratios(a, b), self.ratios(c, d)
        with np.errstate(divide="ignore", invalid="ignore"):
            return interval(float(np.divide(first, second)), firsts / seconds)

    def ratios(self, above: np.ndarray, below: np.ndarray) -> tuple[float, np.ndarray]:
        """Σ above / Σ below, and the same of every draw."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.divide(above.sum(), below.sum())), above[self.draws].sum(1) / below[self.draws].sum(1)


def interval(estimate: float, draws: np.ndarray) -> Interval:
    """``estimate`` with the 95 % percentile interval of ``draws``; all of it not a number where that cannot be told."""
    if not np.isfinite(draws).all() or not np.isfinite(estimate):
        return Interval(estimate, float("nan"), float("nan"))
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(estimate, float(low), float(high))


def wilson(hits: int, n: int) -> Interval:
    """A share with Wilson's 95 % interval (1927)."""
    p, z = hits / n, Z**2 / n
    middle, half = (p + z / 2) / (1 + z), Z * np.sqrt(p * (1 - p) / n + z / (4 * n)) / (1 + z)
    return Interval(p, float(max(0.0, middle - half)), float(min(1.0, middle + half)))


def _between_halves(values: np.ndarray, halves: np.ndarray) -> float:
    """What the means of two random halves differ by, at most in 95 of 100 cases."""
    middle = len(values) // 2
    one, other = values[halves[:, :middle]].mean(1), values[halves[:, middle : 2 * middle]].mean(1)
    return float(np.quantile(np.abs(one - other), 0.95))


def _carried(
    parent: Readings,
    successor: Readings,
    find: Callable[[str], str | None],
    carriers: Sequence[str],
    resampled: "Resampled",
    few: "Resampled",
) -> tuple[Interval, str | None]:
    """What the main carriers kept (see the module), and the one that kept least."""
    m = few.draws.shape[1]
    most = MAIN * parent.carried[:m].mean()
    main = [name for name in carriers if name in parent.effects and parent.effects[name][:m].mean() >= most > 0]
    if not main:
        return resampled.quotient(successor.carried, successor.effect, parent.carried, parent.effect), None
    kept = {}
    for name in main:
        own = successor.effects.get(find(name) or "", np.zeros(m))[:m]
        kept[name] = few.quotient(own, successor.effect[:m], parent.effects[name][:m], parent.effect[:m])
    least = min(main, key=lambda name: kept[name].estimate)
    return kept[least], least


def _nodes(
    parent: Readings,
    successor: Readings,
    find: Callable[[str], str | None],
    resampled: Resampled,
    halves: np.ndarray,
) -> tuple[tuple[NodeChange, ...], Interval]:
    """Nodes measured in either model, and the share of the mechanism that is inherited."""
    matched = {name: find(name) for name in parent.effects}
    taken = set(matched.values())
    pairs: list[tuple[str | None, str | None]] = list(matched.items())
    pairs += [(None, name) for name in successor.effects if name not in taken]
    m = halves.shape[1]
    effects, zero = (parent.effect[:m], successor.effect[:m]), np.zeros(m)
    out, columns = [], []
    for own, other in pairs:
        p = parent.effects[own][:m] if own else zero
        s = successor.effects[other][:m] if other and other in successor.effects else zero
        columns.append((p, s))
        before, after = (resampled.ratios(v, effect) for v, effect in zip((p, s), effects, strict=True))
        change = interval(after[0] - before[0], after[1] - before[1])
        noise = _between_halves(p / effects[0].mean(), halves)
        out.append(
            NodeChange(
                parent_node=own,
                successor_node=other if other in successor.effects else None,
                parent=interval(*before) if own else None,
                successor=interval(*after) if other in successor.effects else None,
                change=change,
                inherited=min(1.0, max(before[0], 0.0) / after[0]) if after[0] > 0 else None,
                moved="gained" if change.low > noise else "lost" if change.high < -noise else None,
            )
        )
    before, after = (np.stack([pair[side] for pair in columns]) for side in (0, 1))
    drawn = [_overlap(before[:, rows].mean(1), after[:, rows].mean(1)) for rows in resampled.draws]
    inherited = interval(_overlap(before.mean(1), after.mean(1)), np.array(drawn))
    return tuple(sorted(out, key=lambda node: -abs(node.change.estimate))), inherited


def _overlap(before: np.ndarray, after: np.ndarray) -> float:
    """Σ of the smaller of two normalised positive profiles; 0 where either has nothing positive."""
    one, other = (np.clip(values, 0, None) for values in (before, after))
    if not one.sum() or not other.sum():
        return 0.0
    return float(np.minimum(one / one.sum(), other / other.sum()).sum())
