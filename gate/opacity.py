"""The opacity of behaviours whose circuit was traced: how much of each runs through what nobody can explain.

Prompts of all behaviours are chosen first; explanations come from the rest of the corpus, so that none of them has
seen a prompt, and are shared by all behaviours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter

from heredity.circuits import intervals
from heredity.circuits.attribution import Prompts
from heredity.circuits.behaviours import Cluster
from heredity.circuits.divergence import Window
from heredity.circuits.opacity import alike, contrast_of_models, measure, without_trigger
from heredity.circuits.opacity_estimate import FEWEST, Buckets, Opacity, Refused
from heredity.circuits.opacity_labels import redrawn
from heredity.circuits.opacity_prompts import HeldOut, episodes_of, held_out, text_of
from heredity.circuits.opacity_reasons import Reasons, linear_errors, reasons_of
from heredity.circuits.opacity_sizes import Ranking, rank_units
from heredity.circuits.opacity_split import Split, whole_model
from heredity.circuits.opacity_units import Pool, UnitId, carried, strongest
from heredity.interp.errors import ModelError
from heredity.interp.explain.contexts import Contexts
from heredity.interp.explain.record import Explanation
from heredity.interp.model import Encoded

from .opacity_record import Label, OpacityDetail, Reason, Routing, SiteOpacity
from .opacity_units import Makers, effort, in_words, unit_name
from .records import Behaviour, Circuit
from .values import Interval, NotMeasured, tidy
from .verdict import beyond_null, material

if TYPE_CHECKING:
    from .assemble import Setting

FEWEST_TEXTS, FEWEST_TOKENS = 40, 2_000
"""Text to explain on that has to be left beside the prompts."""
DRAWS = 3
"""Of q from its uncertainty, for the intervals."""
LABELS = 8
"""Units whose rule is recorded."""
LINEAR_TEXTS = 64
"""Texts that the linear part of errors is fitted on."""

TOO_LARGE = (
    "a quick audit of models of this size does not explain their parts; --budget standard does, at the layers that "
    "the circuit runs through"
)


def with_opacity(
    s: "Setting", clusters: Sequence[Cluster], behaviours: Sequence[Behaviour], items: Sequence[Window]
) -> tuple[Behaviour, ...]:
    """``behaviours`` with the opacity of those whose circuit was traced, findings first.

    Args:
        s: the audit.
        clusters: the contexts of each behaviour.
        behaviours: the records so far.
        items: the windows of the corpus.
    """
    plan = _Plan(s, clusters, behaviours, items)
    found: dict[int, tuple[Interval, OpacityDetail] | NotMeasured] = {}
    for i, number in enumerate(plan.chosen):
        s.progress("measuring opacity", i, len(plan.chosen))
        found[number] = plan.measured(number)
    if plan.chosen:
        s.progress("measuring opacity", len(plan.chosen), len(plan.chosen))
    out = []
    for number, behaviour in enumerate(behaviours):
        it = found.get(number) or NotMeasured(reason=plan.why_not(behaviour))
        share, detail = (it, it) if isinstance(it, NotMeasured) else it
        out.append(behaviour.model_copy(update={"opacity": share, "opacity_detail": detail}))
    return tuple(out)


@dataclass
class _Plan:
    s: "Setting"
    clusters: Sequence[Cluster]
    behaviours: Sequence[Behaviour]
    items: Sequence[Window]
    known: list[dict[UnitId, Explanation]] = field(default_factory=list)
    """Of each set of units, also from steps of an interrupted audit."""
    pools: dict[int, Pool] = field(default_factory=dict)

    @cached_property
    def chosen(self) -> list[int]:
        """Behaviours measured, findings first."""
        if not self._possible:
            return []
        policy = self.s.rules.policy
        traced = [i for i, b in enumerate(self.behaviours) if isinstance(b.circuit, Circuit)]
        traced.sort(
            key=lambda i: not (material(self.behaviours[i], policy) and beyond_null(self.behaviours[i], policy))
        )
        return traced[: effort(self.s).behaviours]

    @property
    def _possible(self) -> bool:
        return self.s.same_tokens and (self.s.sizes.small or self.s.sizes.name != "quick")

    def why_not(self, behaviour: Behaviour) -> str:
        """Why a behaviour that is not among the chosen was not measured."""
        if isinstance(behaviour.circuit, NotMeasured):
            return f"its circuit was not traced: {behaviour.circuit.reason}"
        if not self._possible:
            return TOO_LARGE
        return f"only {effort(self.s).behaviours} behaviours are measured at this budget"

    @cached_property
    def held(self) -> dict[int, HeldOut]:
        """Prompts of each behaviour that is measured."""
        s = self.s
        return {
            i: held_out(self.clusters[i], s.parent, s.successor, self.items, window=s.sizes.window, seed=s.seed)
            for i in self.chosen
        }

    @cached_property
    def texts(self) -> tuple[Encoded, ...]:
        """Windows of the corpus that share no text with any prompt."""
        taken = {name for held in self.held.values() for name in held.texts}
        kept = [w.successor for w in self.items if text_of("corpus", w.text_id) not in taken]
        return tuple({text.ids: text for text in kept}.values())

    @cached_property
    def makers(self) -> Makers:
        """How the units are made."""
        if self.s.sizes.small:
            layers = list(range(self.s.successor.shape.n_layers))
        else:
            layers = sorted(_layers([self.behaviours[i] for i in self.chosen])[: effort(self.s).layers])
        return Makers(self.s, Contexts(self.texts), layers)

    def pool(self, seed: int) -> Pool:
        """The units of one seed, with what is known of them."""
        if seed not in self.pools:
            self.pools[seed] = self.makers.pool(seed)
        self.pools[seed].known |= self.known[seed]
        return self.pools[seed]

    def measured(self, number: int) -> tuple[Interval, OpacityDetail] | NotMeasured:
        """One behaviour."""
        n_seeds = Makers(self.s, Contexts(()), ()).seeds
        self.known += [{} for _ in range(n_seeds - len(self.known))]

        def compute() -> Any:
            found, new = _Measurement(self, number).run(n_seeds)
            return {
                "found": [each.model_dump(mode="json") for each in found],
                "explained": [
                    [[*unit, each.model_dump(mode="json")] for unit, each in sorted(some.items())] for some in new
                ],
            }

        result = self.s.work.step(f"opacity-{number:03d}", compute)
        for seed, some in enumerate(result["explained"]):
            self.known[seed] |= {(part, unit): Explanation.model_validate(raw) for part, unit, raw in some}
        if len(result["found"]) == 1:
            return NotMeasured.model_validate(result["found"][0])
        share, detail = result["found"]
        return Interval.model_validate(share), TypeAdapter(OpacityDetail).validate_python(detail)


def _layers(behaviours: Sequence[Behaviour]) -> list[int]:
    """Layers of the nodes that circuits selected, those with the largest attributions first."""
    found: dict[int, float] = {}
    for behaviour in behaviours:
        if isinstance(behaviour.circuit, Circuit):
            for node in behaviour.circuit.nodes:
                if node.selected and "@" in node.id:
                    found[node.layer] = found.get(node.layer, 0.0) + abs(node.attribution)
    return sorted(found, key=lambda layer: (-found[layer], layer))


class _Measurement:
    """The opacity of one behaviour."""

    def __init__(self, plan: _Plan, number: int) -> None:
        self.plan, self.s = plan, plan.s
        self.behaviour, self.held = plan.behaviours[number], plan.held[number]
        self.heads = alike(self.s.parent, self.s.successor)
        self.new: list[dict[UnitId, Explanation]] = []

    def run(self, seeds: int) -> tuple[list[NotMeasured] | list[Interval | OpacityDetail], list[Any]]:
        """The share and its detail, or why there is none; and what was explained for it, by seed."""
        reason = self._lacking()
        if reason:
            return [NotMeasured(reason=reason)], self.new
        prompts, places, counterfactual = self._prompts()
        if len(prompts.last) < FEWEST:
            few = f"tokens it depends on are known in {len(prompts.last)} contexts; a share needs {FEWEST}"
            return [NotMeasured(reason=few)], self.new
        found: Opacity | Refused = Refused("", 0)
        detail: OpacityDetail | None = None
        others: list[float] = []
        for seed in range(seeds):
            each = self._of_seed(seed, prompts, places, counterfactual)
            if isinstance(each, Refused):
                return [NotMeasured(reason=each.reason)], self.new
            if seed == 0:
                found, detail = each
            else:
                others.append(tidy(each[0].omega.estimate))
        assert isinstance(found, Opacity) and detail is not None
        return [_interval(found.omega, found.n), detail.model_copy(update={"seeds": tuple(others)})], self.new

    def _lacking(self) -> str | None:
        n = len(self.held.contexts)
        if n < FEWEST:
            return f"it shows in {n} contexts, and behind other text too seldom; a share needs {FEWEST}"
        texts = self.plan.texts
        tokens = sum(len(text.ids) for text in texts)
        if len(texts) < FEWEST_TEXTS or tokens < FEWEST_TOKENS:
            return (
                f"beside its contexts {len(texts)} texts of {tokens} tokens are left to explain parts on, of "
                f"{FEWEST_TEXTS} and {FEWEST_TOKENS} that are needed"
            )
        return None

    def _prompts(self) -> tuple[Prompts, list[list[int]], torch.Tensor | None]:
        """Prompts, where the behaviour shows in each, and the same without the trigger where the parent has other
        parts."""
        contexts = list(self.held.contexts)
        if self.heads:
            return *episodes_of(contexts), None
        named = set(self.behaviour.trigger_tokens)

        def triggers(ids: Sequence[int]) -> list[float]:
            return [float(self.s.successor.decode([i]).strip() in named) for i in ids]

        contexts = [c for c in contexts if any(triggers(c.ids_successor))]
        if not contexts:
            return Prompts(*(torch.zeros(0, dtype=torch.int64) for _ in range(4))), [], None
        prompts, places = episodes_of(contexts)
        rows = [row[: last + 1] for row, last in zip(prompts.tokens.tolist(), prompts.last.tolist(), strict=True)]
        pool = sorted({token for text in self.plan.texts for token in text.ids})
        without = without_trigger(prompts, [triggers(row) for row in rows], pool, seed=self.s.seed)
        return prompts, places, without

    def _of_seed(
        self, seed: int, prompts: Prompts, places: list[list[int]], counterfactual: torch.Tensor | None
    ) -> tuple[Opacity, OpacityDetail | None] | Refused:
        s, pool = self.s, self.plan.pool(seed)
        n = effort(s).explained
        split = whole_model(s.successor, pool.units, heads=self.heads, side=1)
        contrast = contrast_of_models(
            s.parent, s.successor, prompts, split, counterfactual=counterfactual, places=places
        )
        ranking = rank_units(contrast, split)
        tried = strongest(ranking, n)
        self.new.append(pool.explain(tried))
        parts = pool.parts()

        def of(some: Sequence[Any]) -> Split:
            return whole_model(s.successor, some, heads=self.heads, side=1)

        split = of(parts)
        drawn = [of(each) for each in redrawn(parts, [pool.of_part(i) for i in range(len(parts))], DRAWS, s.seed)]
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
        reasons = reasons_of(contrast, split, linear=self._linear(split), steps=effort(s).gradients, seed=s.seed)
        detail = OpacityDetail(
            needed=_interval(found.needed, found.n),
            alone=_interval(found.alone, found.n),
            interaction=_interval(found.interaction, found.n),
            effect=_interval(found.effect, found.n),
            control=None if found.control is None else _interval(found.control, found.n),
            all_explained=_interval(every.omega, every.n),
            counterfactual="parent" if counterfactual is None else "without_trigger",
            n_replicated=self.held.n_replicated,
            units=in_words(self.plan.makers, pool),
            n_units=sum(len(part.q) for part in parts),
            n_explained=len(tried),
            n_labelled=sum((pool.known[unit].q or 0) > 0 for unit in tried),
            carried=tidy(carried(ranking, tried)),
            text_tokens=len(pool.contexts),
            routing=NotMeasured(reason=no_routing or "") if found.buckets is None else _routing(found.buckets, found.n),
            reasons=tuple(Reason(name=k, share=_interval(v, found.n)) for k, v in reasons.total.items()),
            residual=tidy(reasons.residual),
            sites=_sites(reasons),
            labels=_labels(pool, ranking, tried[:LABELS]),
            seeds=(),
        )
        return found, detail

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
        explained=_interval(buckets.explained, n),
        unexplained=_interval(buckets.unexplained, n),
        routing=_interval(buckets.routing, n),
        needed=_interval(buckets.routing_needed, n),
    )


def _interval(found: intervals.Interval, n: int) -> Interval:
    return Interval(estimate=tidy(found.estimate), low=tidy(found.low), high=tidy(found.high), n=n)
