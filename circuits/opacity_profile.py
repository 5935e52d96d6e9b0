"""Where an effect first enters parts that no explanation predicts: a cheap companion of the 2×2, by gradients.

Along the straight line of embeddings from the counterfactual prompt to the clean one, the change of the input is
propagated through the network (forward-mode derivatives), each unit's change multiplied by its q and everything else
dropped at every divided site. What reaches the metric, T_free, has passed explained units only:

    Ω_touch = 1 − T_free / ( m(x) − m(x′) )

is the share of the effect whose path touches any unexplained part. What is dropped at a site, times the full gradient
there (reverse mode), is the effect that first touches an unexplained part *there*; T_free and all of these add up to
m(x) − m(x′), to the error of the integral (completeness, Sundararajan et al. 1703.01365).

It counts a path that enters an unexplained part and comes out as an explained unit later as opaque; the 2×2 clamps
unexplained parts and asks what their content does to the outcome. The two agree in rank, not in every case.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.autograd.forward_ad as forward
from torch import Tensor

from heredity.interp.model import Edit
from heredity.interp.sites import order

from .edges import path
from .intervals import Interval, ratio
from .opacity_estimate import FEWEST, Refused, effect_of
from .opacity_parts import World
from .opacity_reasons import LinearError, dissect, known_and_every
from .opacity_routing import each_pattern
from .opacity_runs import with_others
from .opacity_split import Split, Visit
from .pairs import Metric, Pairs
from .writes import ENTRY, both

ROUTING, PATTERN = "routing", "attn_pattern"
GROUP_TOKENS, PASS_TOKENS = 128, 512
"""Padded tokens of pairs taken together, and with all points of the path in one forward."""


@dataclass(frozen=True)
class Profile:
    """Ω_touch, and where and why paths first become opaque. Shares are of the effect, ratios of means over pairs."""

    touch: Interval
    """Share of the effect whose path touches an unexplained part."""
    explained: Interval
    """Share on paths through explained units only; with ``touch`` and routing it adds up to 1."""
    reasons: Mapping[str, Interval]
    """``touch`` by reason (:mod:`.opacity_reasons`), and apart from it ``routing`` where patterns were cut: paths that
    changed where attention looks before they touched anything unexplained."""
    by_site: Mapping[str, Mapping[str, float]]
    """The same by site (``attn_pattern@L`` for routing), in the order of the forward."""
    completeness: float
    """How far integrated gradients miss m(x) − m(x′), as a share of it."""
    effect: Interval
    """Mean of m(x) − m(x′)."""
    n: int
    steps: int
    """Points of the path, each a forward with derivatives and a backward."""

    def up_to(self, layer: int) -> float:
        """Ω_touch if only layers up to this one were divided. It may fall with depth: a part may pass on, for a later
        unit to explain, what opposes the behaviour."""
        sites = [site for site in self.by_site if int(site.split("@")[1].split(".")[0]) <= layer]
        return sum((share for site in sites for kind, share in self.by_site[site].items() if kind != ROUTING), 0.0)


def opacity_profile(
    model: Any,
    pairs: Pairs,
    metric: Metric,
    split: Split,
    *,
    linear: Mapping[str, LinearError] | None = None,
    routing: bool = False,
    steps: int | None = None,
    tolerance: float = 0.02,
    models: Sequence[Any] = (),
    side: int = 0,
    fewest: int = FEWEST,
    seed: int = 0,
) -> Profile | Refused:
    """The profile of the difference between clean and counterfactual prompts.

    Args:
        model, pairs, metric, split, models, side, fewest, seed: as of :func:`.opacity.opacity`.
        linear: maps that predict errors (:func:`.opacity_reasons.linear_errors`).
        routing: whether paths through attention patterns are cut as well and shown apart. Without, they count as
            explained where what they read is, as in Ω.
        steps: points of the path; doubled from 5 until ``completeness`` is within ``tolerance`` if None.
        tolerance: of completeness.

    Raises:
        As :func:`.opacity.opacity`; NotImplementedError where an operation of the model has no forward-mode derivative.
    """
    tried = steps or 5
    while True:
        found = _profile(_Setting(model, pairs, metric, split, linear, routing, models, side), tried, fewest, seed)
        if steps is not None or isinstance(found, Refused) or found.completeness <= tolerance or tried >= 80:
            return found
        tried *= 2


@dataclass(frozen=True)
class _Setting:
    model: Any
    pairs: Pairs
    metric: Metric
    split: Split
    linear: Mapping[str, LinearError] | None
    routing: bool
    models: Sequence[Any]
    side: int


def _profile(setting: _Setting, steps: int, fewest: int, seed: int) -> Profile | Refused:
    pairs, n = setting.pairs, len(setting.pairs)
    gap, everything, free = (np.zeros(n) for _ in range(3))
    first: dict[tuple[str, str], np.ndarray] = {}
    for rows in pairs.groups(GROUP_TOKENS):
        group = pairs.of(rows)
        points, at_once = path("eap-ig", steps), max(1, PASS_TOKENS // group.clean.numel())
        for some in (points[i : i + at_once] for i in range(0, steps, at_once)):
            run = _Run(setting, group, rows, some)
            reached, dropped = run.forward()
            total, slopes = run.backward()
            gap[rows.numpy()] = run.gap
            free[rows.numpy()] += run.mean(reached)
            everything[rows.numpy()] += run.mean(total)
            for (site, kind), change in dropped.items():
                carried = (slopes[site] * change).flatten(1).sum(1)
                first.setdefault((site, kind), np.zeros(n))[rows.numpy()] += run.mean(carried)
    effect = effect_of(gap, fewest=fewest, seed=seed)
    if isinstance(effect, Refused):
        return effect
    sites = sorted({site for site, _ in first}, key=_place)
    kinds = sorted({kind for _, kind in first})

    def share(above: np.ndarray) -> Interval:
        return ratio(above, gap, seed)

    def of(kind: str) -> np.ndarray:
        return np.sum([x for (_, k), x in first.items() if k == kind], 0)

    return Profile(
        touch=share(gap - free - (of(ROUTING) if ROUTING in kinds else 0.0)),
        explained=share(free),
        reasons={kind: share(of(kind)) for kind in kinds},
        by_site={
            site: {kind: float(x.sum() / gap.sum()) for (at, kind), x in first.items() if at == site} for site in sites
        },
        completeness=float(abs(everything.sum() - gap.sum()) / abs(gap.sum())),
        effect=effect,
        n=n,
        steps=steps,
    )


class _Run:
    """A group of pairs at some points of the way from the counterfactual's embeddings to the clean ones."""

    def __init__(self, setting: _Setting, group: Pairs, rows: Tensor, points: list[tuple[float, float]]) -> None:
        self.setting, self.split, self.points = setting, setting.split, points
        with torch.no_grad():
            ends = []
            for tokens in (group.corrupt, group.clean):
                value = setting.metric(setting.model.logits(tokens), rows)
                ends.append((value.double(), setting.model.capture(tokens, [ENTRY])[ENTRY]))
        (low, start), (high, end) = ends
        self.gap = (high - low).numpy()
        self.moved = (end - start).repeat(len(points), 1, 1)
        self.entry = torch.cat([start + alpha * (end - start) for alpha, _ in points])
        tokens = group.clean.repeat(len(points), 1)
        self.world = with_others(setting.models, World(setting.model, tokens, setting.side), setting.split)
        self.score = lambda logits: setting.metric(logits, rows.repeat(len(points)))

    def mean(self, values: Tensor) -> np.ndarray:
        """Weighted sum over points of [points · rows]: [rows]."""
        weights = torch.tensor([weight for _, weight in self.points], dtype=torch.float64)
        return (weights @ values.detach().double().unflatten(0, (len(weights), -1))).numpy()

    def forward(self) -> tuple[Tensor, dict[tuple[str, str], Tensor]]:
        """What reaches the metric through explained units, [points · rows], and the changes dropped, by site and
        reason."""
        dropped: dict[tuple[str, str], Tensor] = {}

        def cut(visit: Visit) -> Tensor:
            moved = Visit(
                visit.site, _tangent(visit.value), _tangent(visit.made), {k: _tangent(v) for k, v in visit.seen.items()}
            )
            for kind, change in dissect(self.split, moved, self.setting.linear, self.world.side).items():
                dropped[visit.site, kind] = change
            return forward.make_dual(forward.unpack_dual(visit.value).primal, moved.made[0])

        def still(layer: int, pattern: Tensor) -> Tensor:
            dropped[f"{PATTERN}@{layer}", ROUTING] = _tangent(pattern)
            return forward.unpack_dual(pattern).primal

        with torch.no_grad(), _forward_mode(), self._patterns(still):
            weights = known_and_every(self.split)
            edits = self.split.edits(self.world, cut, weights=weights, slopes=True)
            reached = _tangent(self.score(self._logits(edits, forward.make_dual(self.entry, self.moved))))
        return reached, dropped

    def backward(self) -> tuple[Tensor, dict[str, Tensor]]:
        """What reaches the metric by all paths, [points · rows], and the gradient at every site."""
        probes: dict[str, Tensor] = {}

        def probe(site: str, value: Tensor) -> Tensor:
            # The gradient of something added to a value is the gradient at the value.
            probes[site] = torch.zeros_like(value).requires_grad_()
            return value + probes[site]

        edits: dict[str, Edit] = {
            site: lambda value, site=site: probe(site, value) for site in self.split.sites(self.world.side)
        }
        enter = self.entry.clone().requires_grad_()
        with torch.enable_grad(), self._patterns(lambda layer, pattern: probe(f"{PATTERN}@{layer}", pattern)):
            value = self.score(self._logits(edits, enter))
            found = torch.autograd.grad(value.sum(), [enter, *probes.values()], allow_unused=True)
        slopes = [torch.zeros(()) if g is None else g for g in found]
        total = (slopes[0] * self.moved).flatten(1).sum(1)
        return total, dict(zip(probes, slopes[1:], strict=True))

    def _logits(self, edits: dict[str, Edit], enter: Tensor) -> Tensor:
        entry: Edit = lambda value: enter  # noqa: E731
        edits = {ENTRY: both(entry, edits[ENTRY]) if ENTRY in edits else entry} | {
            site: edit for site, edit in edits.items() if site != ENTRY
        }
        return self.setting.model.logits(self.world.tokens, edits=edits)

    def _patterns(self, rewrite: Callable[[int, Tensor], Tensor]) -> AbstractContextManager[None]:
        return each_pattern(self.setting.model, rewrite) if self.setting.routing else nullcontext()


@contextmanager
def _forward_mode() -> Iterator[None]:
    with warnings.catch_warnings(), forward.dual_level():
        # torch compiles some of its own rules when they are first used, by a way it has since deprecated.
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=DeprecationWarning)
        yield


def _tangent(value: Tensor) -> Tensor:
    found = forward.unpack_dual(value)
    return torch.zeros_like(found.primal) if found.tangent is None else found.tangent


def _place(site: str) -> tuple[int, int, int]:
    return order(site.replace(PATTERN, "attn_z"))
