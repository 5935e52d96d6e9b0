"""The opacity of behaviours whose circuit was traced: how much of each runs through what nobody can explain.

Prompts of all behaviours are chosen first; explanations come from the rest of the corpus, so that none of them has
seen a prompt, and are shared by all behaviours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter

from heredity.circuits.opacity import alike, contrast_of_models, measure
from heredity.circuits.opacity_estimate import FEWEST, Buckets, Opacity, Refused
from heredity.circuits.opacity_labels import redrawn
from heredity.circuits.opacity_prompts import Episodes
from heredity.circuits.opacity_reasons import Reasons, linear_errors, reasons_of
from heredity.circuits.opacity_sizes import Ranking, rank_units
from heredity.circuits.opacity_split import Split, whole_model
from heredity.circuits.opacity_steps import Step, opacity_by_step
from heredity.circuits.opacity_units import Pool, UnitId, carried, strongest
from heredity.interp.errors import ModelError
from heredity.interp.explain.contexts import Contexts
from heredity.interp.explain.record import Explanation

from .opacity_plan import Plan
from .opacity_record import Label, OpacityDetail, OpacityStep, Reason, Routing, SiteOpacity
from .opacity_units import Makers, effort, in_words, unit_name
from .records import Behaviour
from .values import Interval, NotMeasured, interval, tidy

if TYPE_CHECKING:
    pass

LABELS = 8
"""Units whose rule is recorded."""
STEPS = 6
"""Steps of an episode whose opacity is recorded."""
LINEAR_TEXTS = 64
"""Texts that the linear part of errors is fitted on."""


def with_opacity(plan: Plan) -> tuple[Behaviour, ...]:
    """The behaviours of ``plan`` with the opacity of those whose circuit was traced, findings first."""
    every, found = _Opacities(plan), {}
    for i, number in enumerate(plan.chosen):
        plan.s.progress("measuring opacity", i, len(plan.chosen))
        found[number] = every.measured(number)
    if plan.chosen:
        plan.s.progress("measuring opacity", len(plan.chosen), len(plan.chosen))
    out = []
    for number, behaviour in enumerate(plan.behaviours):
        it = found.get(number) or NotMeasured(reason=plan.why_not(behaviour))
        share, detail = (it, it) if isinstance(it, NotMeasured) else it
        out.append(behaviour.model_copy(update={"opacity": share, "opacity_detail": detail}))
    return tuple(out)


@dataclass
class _Opacities:
    plan: Plan
    known: list[dict[UnitId, Explanation]] = field(default_factory=list)
    """Of each set of units, also from steps of an interrupted audit."""
    pools: dict[int, Pool] = field(default_factory=dict)

    def pool(self, seed: int) -> Pool:
        """The units of one seed, with what is known of them."""
        if seed not in self.pools:
            self.pools[seed] = self.plan.makers.pool(seed)
        self.pools[seed].known |= self.known[seed]
        return self.pools[seed]

    def measured(self, number: int) -> tuple[Interval, OpacityDetail] | NotMeasured:
        """One behaviour."""
        n_seeds = Makers(self.plan.s, Contexts(()), ()).seeds
        self.known += [{} for _ in range(n_seeds - len(self.known))]

        def compute() -> Any:
            found, new = _Measurement(self, number).run(n_seeds)
            return {
                "found": [each.model_dump(mode="json") for each in found],
                "explained": [
                    [[*unit, each.model_dump(mode="json")] for unit, each in sorted(some.items())] for some in new
                ],
            }

        result = self.plan.s.work.step(f"opacity-{number:03d}", compute)
        for seed, some in enumerate(result["explained"]):
            self.known[seed] |= {(part, unit): Explanation.model_validate(raw) for part, unit, raw in some}
        if len(result["found"]) == 1:
            return NotMeasured.model_validate(result["found"][0])
        share, detail = result["found"]
        return Interval.model_validate(share), TypeAdapter(OpacityDetail).validate_python(detail)


class _Measurement:
    """The opacity of one behaviour."""

    def __init__(self, every: _Opacities, number: int) -> None:
        self.number, self.every, self.plan, self.s = number, every, every.plan, every.plan.s
        self.behaviour, self.held = self.plan.behaviours[number], self.plan.held[number]
        self.heads = alike(self.s.parent, self.s.successor)
        self.new: list[dict[UnitId, Explanation]] = []

    def run(self, seeds: int) -> tuple[list[NotMeasured] | list[Interval | OpacityDetail], list[Any]]:
        """The share and its detail, or why there is none; and what was explained for it, by seed."""
        reason = self.plan.lacking(self.number)
        if reason:
            return [NotMeasured(reason=reason)], self.new
        episodes, counterfactual = self.plan.episodes(self.number)
        n = len(episodes.prompts.last)
        if n < FEWEST:
            few = f"tokens it depends on are known in {n} contexts; a share needs {FEWEST}"
            return [NotMeasured(reason=few)], self.new
        found: Opacity | Refused = Refused("", 0)
        detail: OpacityDetail | None = None
        others: list[float] = []
        for seed in range(seeds):
            each = self._of_seed(seed, episodes, counterfactual)
            if isinstance(each, Refused):
                return [NotMeasured(reason=each.reason)], self.new
            if seed == 0:
                found, detail = each
            else:
                others.append(tidy(each[0].omega.estimate))
        assert isinstance(found, Opacity) and detail is not None
        return [interval(found.omega, found.n), detail.model_copy(update={"seeds": tuple(others)})], self.new

    def _of_seed(
        self, seed: int, episodes: Episodes, counterfactual: torch.Tensor | None
    ) -> tuple[Opacity, OpacityDetail | None] | Refused:
        s, pool = self.s, self.every.pool(seed)
        n = effort(s).explained
        split = whole_model(s.successor, pool.units, heads=self.heads, side=1)
        contrast = contrast_of_models(
            s.parent, s.successor, episodes.prompts, split, counterfactual=counterfactual, places=episodes.places
        )
        ranking = rank_units(contrast, split)
        tried = strongest(ranking, n)
        self.new.append(pool.explain(tried))
        parts = pool.parts()

        def of(some: Sequence[Any]) -> Split:
            return whole_model(s.successor, some, heads=self.heads, side=1)

        split = of(parts)
        drawn = [
            of(each) for each in redrawn(parts, [pool.of_part(i) for i in range(len(parts))], effort(s).draws, s.seed)
        ]
        if seed:
            found = measure(contrast, split, controls=0, routing=False, seed=s.seed)
            return found if isinstance(found, Refused) else (found, None)
        no_routing = None
        try:
            found = measure(contrast, split, drawn=drawn, seed=s.seed)
        except ModelError as error:
            no_routing = error.what
            found = measure(contrast, split, drawn=drawn, routing=False, seed=s.seed)
        if isinstance(found, Refused):
            return found
        every = measure(
            contrast,
            of([part.with_q(torch.ones_like(part.q)) for part in parts]),
            controls=0,
            routing=False,
            seed=s.seed,
        )
        assert isinstance(every, Opacity)  # a share of the same effect
        steps = opacity_by_step(contrast, s.parent, s.successor, episodes, [split, *drawn], most=STEPS, seed=s.seed)
        reasons = reasons_of(contrast, split, linear=self._linear(split), steps=effort(s).gradients, seed=s.seed)
        detail = OpacityDetail(
            needed=interval(found.needed, found.n),
            alone=interval(found.alone, found.n),
            interaction=interval(found.interaction, found.n),
            effect=interval(found.effect, found.n),
            control=None if found.control is None else interval(found.control, found.n),
            all_explained=interval(every.omega, every.n),
            steps=tuple(self._step(each) for each in steps),
            counterfactual="parent" if counterfactual is None else "without_trigger",
            n_replicated=self.held.n_replicated,
            units=in_words(self.plan.makers, pool),
            n_units=sum(len(part.q) for part in parts),
            n_explained=len(tried),
            n_labelled=sum((pool.known[unit].q or 0) > 0 for unit in tried),
            carried=tidy(carried(ranking, tried)),
            text_tokens=len(pool.contexts),
            routing=NotMeasured(reason=no_routing or "") if found.buckets is None else _routing(found.buckets, found.n),
            reasons=tuple(Reason(name=k, share=interval(v, found.n)) for k, v in reasons.total.items()),
            residual=tidy(reasons.residual),
            sites=_sites(reasons),
            labels=_labels(pool, ranking, tried[:LABELS]),
            seeds=(),
        )
        return found, detail

    def _step(self, step: Step) -> OpacityStep:
        decode = self.s.successor.decode
        return OpacityStep(
            behind=decode([step.token]),
            says=tuple(decode([each]) for each in step.says),
            share=tidy(step.share),
            opacity=interval(step.opacity.omega, step.opacity.n),
        )

    def _linear(self, split: Split) -> Any:
        models = (self.s.parent, self.s.successor)
        return linear_errors(self.s.successor, self.plan.texts[:LINEAR_TEXTS], split, models=models, side=1)


def _sites(reasons: Reasons) -> tuple[SiteOpacity, ...]:
    return tuple(
        SiteOpacity(
            site=site, layer=int(site.partition("@")[2].partition(".")[0]), shares={k: tidy(v) for k, v in by.items()}
        )
        for site, by in reasons.by_site.items()
        if by
    )


def _labels(pool: Pool, ranking: Ranking, units: Sequence[UnitId]) -> tuple[Label, ...]:
    total = sum(float(effects.abs().sum()) for effects in ranking.units)
    out = []
    for i, unit in units:
        known = pool.known[i, unit]
        out.append(
            Label(
                unit=unit_name(pool, (i, unit)),
                carries=tidy(float(ranking.units[i][unit]) / total),
                rule=known.rule,
                q=None if known.q is None else tidy(known.q),
            )
        )
    return tuple(out)


def _routing(buckets: Buckets, n: int) -> Routing:
    return Routing(
        explained=interval(buckets.explained, n),
        unexplained=interval(buckets.unexplained, n),
        routing=interval(buckets.routing, n),
        needed=interval(buckets.routing_needed, n),
    )
