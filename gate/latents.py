"""Latents named for a behaviour: directions of the difference at its circuit's sites, held to this pair's null."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from heredity.circuits import intervals
from heredity.circuits.attribution import Prompts, prompts_of
from heredity.circuits.difference_latents import auroc, difference_sae, differences, gap_closed, lengths
from heredity.circuits.null import NullSuccessors
from heredity.circuits.opacity import alike, without_trigger
from heredity.circuits.opacity_labels import values_at
from heredity.interp.dictionaries.describing import logit_effects
from heredity.interp.dictionaries.exclusive.scaling import unit
from heredity.interp.dictionaries.exclusive.stability import MATCH, match
from heredity.interp.dictionaries.record import Dictionary
from heredity.interp.explain.measure import explain
from heredity.interp.model import Model
from heredity.interp.sites import order

from .latents_record import LatentExample, LatentRecord
from .opacity_plan import Plan
from .records import Behaviour, Circuit, Null
from .values import NotMeasured, interval, tidy

if TYPE_CHECKING:
    from .assemble import Setting

NAMED, SEEDS = 4, 2
"""Latents recorded of a behaviour, autoencoders trained at a site."""
LATENTS, STEPS = 32, 200
"""Of each autoencoder and its training."""
DRAWS = 3
"""Null successors whose differences are trained on."""
RANDOM = 3
"""Random directions beside each latent."""
EXAMPLES = 3
TOKENS = 5
"""Tokens listed of a logit effect."""


def with_latents(plan: Plan, behaviours: Sequence[Behaviour], null: Null) -> tuple[Behaviour, ...]:
    """``behaviours`` with the latents of those that ``plan`` looks into."""
    out = []
    for number, behaviour in enumerate(behaviours):
        found: Any = NotMeasured(reason=plan.why_not(behaviour))
        if number in plan.chosen:
            plan.s.progress("naming latents", plan.chosen.index(number), len(plan.chosen))

            def compute(number: int = number) -> Any:
                named = _named(plan, number, null)
                return named.model_dump(mode="json") if isinstance(named, NotMeasured) else named

            found = TypeAdapter(tuple[LatentRecord, ...] | NotMeasured).validate_python(
                plan.s.work.step(f"latents-{number:03d}", compute)
            )
        out.append(behaviour.model_copy(update={"latents": found}))
    if plan.chosen:
        plan.s.progress("naming latents", len(plan.chosen), len(plan.chosen))
    return tuple(out)


def _named(plan: Plan, number: int, null: Null) -> list[dict[str, Any]] | NotMeasured:
    s = plan.s
    if not alike(s.parent, s.successor):
        return NotMeasured(reason="the models have other parts, so there is no difference of their activations")
    reason = plan.lacking(number)
    if reason:
        return NotMeasured(reason=reason)
    sites = _sites(plan.behaviours[number])
    if not sites:
        return NotMeasured(reason="its circuit has no head or MLP")
    contexts = _Contexts(plan, number)
    nulls = _null_contrasts(contexts, sites, null)
    out = []
    for site in sites:
        at, most = _Site(contexts, site), max(nulls[site], default=0.0)
        order_of = np.argsort(-at.contrast, kind="stable")
        above = [int(latent) for latent in order_of if at.contrast[latent] > most][: NAMED // len(sites)]
        out += [each.model_dump(mode="json") for each in at.records(above, nulls[site])]
    return out


def _sites(behaviour: Behaviour) -> list[str]:
    """The output of the heads or MLP that carries most, and the stream after the circuit's last layer: at a wrong site
    no latent tells the behaviour from its broken contexts."""
    carried: dict[str, float] = {}
    last = -1
    assert isinstance(behaviour.circuit, Circuit)
    for node in behaviour.circuit.nodes:
        if node.selected and "@" in node.id:
            site = node.id.partition(".")[0].replace("attn_head", "attn_out")
            carried[site] = carried.get(site, 0.0) + abs(node.attribution)
            last = max(last, node.layer)
    strongest = sorted(carried, key=lambda site: (-carried[site], order(site)))[:1]
    return [*strongest, f"resid_post@{last}"] if strongest else []


class _Contexts:
    """Where the behaviour shows, where its trigger is broken, and the text beside both."""

    def __init__(self, plan: Plan, number: int) -> None:
        self.plan, self.s = plan, plan.s
        episodes, _ = plan.episodes(number)
        self.prompts, self.places = episodes.prompts, episodes.places
        contexts = plan.held[number].contexts
        self.peaks = prompts_of(contexts)
        self.broken = self._broken(set(plan.behaviours[number].trigger_tokens))

    def _broken(self, named: set[str]) -> Prompts | None:
        decode, rows = self.s.successor.decode, []
        for ids, last in zip(self.peaks.tokens.tolist(), self.peaks.last.tolist(), strict=True):
            rows.append([float(decode([i]).strip() in named) for i in ids[: last + 1]])
        kept = [i for i, row in enumerate(rows) if any(row)]
        if not kept:
            return None
        at = torch.tensor(kept)
        some = Prompts(*(getattr(self.peaks, name)[at] for name in ("tokens", "last", "says_successor", "says_parent")))
        pool = sorted({token for text in self.plan.texts for token in text.ids})
        tokens = without_trigger(some, [rows[i] for i in kept], pool, seed=self.s.seed + 1)
        return Prompts(tokens, some.last, some.says_successor, some.says_parent)

    def differences(self, successor: Model, site: str, text: Tensor) -> tuple[Tensor, Tensor]:
        """Successor − parent where the behaviour shows [n, D], and where it should not [m, D]."""
        shown = differences(self.s.parent, successor, self.peaks, site)
        if self.broken is None:
            return shown, text
        return shown, differences(self.s.parent, successor, self.broken, site)


def _contrasts(d: Dictionary, shown: Tensor, hidden: Tensor) -> np.ndarray:
    return (lengths(d, shown).mean(0) - lengths(d, hidden).mean(0)).double().numpy()


class _Site:
    """The difference at one site and its latents."""

    def __init__(self, contexts: _Contexts, site: str) -> None:
        self.contexts, self.site, s = contexts, site, contexts.s
        seen = contexts.plan.makers.values(((True, site), (False, site)))
        self.parts = [(seen[True, site], seen[False, site])]
        self.text = seen[False, site] - seen[True, site]
        self.dictionaries = [
            _trained(s, [*self.parts, *self._own()], site, seed=s.seed * 100 + seed) for seed in range(SEEDS)
        ]
        self.shown, self.hidden = contexts.differences(s.successor, site, self.text)
        self.contrast = _contrasts(self.dictionaries[0], self.shown, self.hidden)

    def _own(self) -> list[tuple[Tensor, Tensor]]:
        """Both models' activations at the contexts' last tokens."""
        return [_pair(self.contexts, self.contexts.s.successor, self.site)]

    def records(self, named: Sequence[int], nulls: Sequence[float]) -> list[LatentRecord]:
        """What is recorded of some latents, the strongest first."""
        if not named:
            return []
        s, d = self.contexts.s, self.dictionaries[0]
        rows = d.W_dec[0].float()
        random = torch.randn(RANDOM, rows.shape[1], generator=torch.Generator().manual_seed(s.seed))
        alone, together = [rows[[i]] for i in named], [rows[list(named[: k + 1])] for k in range(1, len(named))]
        spans = [*random.split(1), *alone, *together]
        closed = gap_closed(
            s.parent,
            s.successor,
            self.contexts.prompts,
            self.contexts.places,
            self.site,
            spans,
            seed=s.seed,
        )
        control = max(each.estimate for each in closed[:RANDOM])
        single = closed[RANDOM : RANDOM + len(named)]
        joint = [single[0], *closed[RANDOM + len(named) :]]
        return [self._record(i, nulls, a, b, control) for i, a, b in zip(named, single, joint, strict=True)]

    def _record(
        self,
        latent: int,
        nulls: Sequence[float],
        single: intervals.Interval,
        joint: intervals.Interval,
        control: float,
    ) -> LatentRecord:
        s, d = self.contexts.s, self.dictionaries[0]
        own = unit(d.W_dec[0].double())
        cosines = [float(match(own, unit(each.W_dec[0].double()))[1][latent]) for each in self.dictionaries[1:]]
        features = d.encode(self.text.to(d.b_enc))
        said = explain(features, self.contexts.plan.makers.contexts, [latent], seed=s.seed)[0]
        score = None
        if self.contexts.broken is not None:
            shown, hidden = (lengths(d, each)[:, latent].numpy() for each in (self.shown, self.hidden))
            score = tidy(auroc(shown, hidden))
        effects = logit_effects(d, s.successor, count=TOKENS)
        n = len(self.contexts.prompts.last)
        raised, lowered = ((), ()) if effects is None else (effects.raised[latent], effects.lowered[latent])
        return LatentRecord(
            site=self.site,
            index=latent,
            contrast=tidy(float(self.contrast[latent])),
            null_max=tidy(max(nulls, default=0.0)),
            n_null=len(nulls),
            hard_auroc=score,
            seed_cosines=tuple(tidy(each) for each in cosines),
            stable=all(each >= MATCH for each in cosines),
            rule=said.rule,
            q=None if said.q is None else tidy(said.q),
            raises=tuple(s.successor.decode([int(i)]) for i in raised),
            lowers=tuple(s.successor.decode([int(i)]) for i in lowered),
            gap_closed=interval(single, n),
            gap_closed_together=interval(joint, n),
            control=tidy(control),
            examples=tuple(
                LatentExample(before=e.before, token=e.token, after=e.after, activation=tidy(e.activation))
                for e in said.examples[:EXAMPLES]
            ),
        )


def _pair(contexts: _Contexts, successor: Model, site: str) -> tuple[Tensor, Tensor]:
    found = []
    for model in (contexts.s.parent, successor):
        with torch.no_grad():
            value = model.capture(contexts.peaks.tokens, [site])[site]
        found.append(value[contexts.peaks.rows, contexts.peaks.last].clone())
    return found[0], found[1]


def _trained(s: "Setting", parts: Sequence[tuple[Tensor, Tensor]], site: str, *, seed: int) -> Dictionary:
    return difference_sae(parts, site, latents=LATENTS, steps=STEPS, seed=seed)


def _null_contrasts(contexts: _Contexts, sites: Sequence[str], null: Null) -> dict[str, list[float]]:
    """By site, contrasts of the latents of null successors' differences, trained on the same text in the same way."""
    s, plan = contexts.s, contexts.plan
    out: dict[str, list[float]] = {site: [] for site in sites}
    if null.scale == 0 or not s.same_parameters:
        return out
    there = plan.makers.values(tuple((True, site) for site in sites))
    nulls = NullSuccessors(s.parent, s.successor)
    for draw in range(DRAWS):
        with nulls.draw(s.seed * 1000 + draw, null.scale) as model:
            here = values_at(model, plan.texts, sites)
            own = {site: _pair(contexts, model, site) for site in sites}
            seen = {site: contexts.differences(model, site, here[site] - there[True, site]) for site in sites}
        for site in sites:
            d = _trained(s, [(there[True, site], here[site]), own[site]], site, seed=s.seed * 100)
            out[site] += _contrasts(d, *seen[site]).tolist()
    return out
