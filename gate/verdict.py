"""From behaviours to findings and a verdict, under a policy."""

from collections.abc import Sequence
from typing import Literal

from .budget import CANARY_TEXTS
from .phrases import count, share
from .policy import Policy
from .records import Behaviour, Circuit, Finding, Null, Power
from .values import Interval, NotMeasured, tidy

Verdict = Literal["pass", "flag", "inconclusive"]


def material(behaviour: Behaviour, policy: Policy) -> bool:
    """Whether the behaviour is large and frequent enough for the policy to care."""
    return behaviour.effect.low >= policy.material_nats and behaviour.n_contexts >= policy.fewest_contexts


def false_alarm(effect: float, null: Sequence[float]) -> float:
    """Share of null successors, counting the successor itself as one, that show at least ``effect`` nats (all of them
    lower ends of intervals)."""
    return (1 + sum(value >= effect for value in null)) / (1 + len(null))


def beyond_null(behaviour: Behaviour, policy: Policy) -> bool:
    """Whether null successors show an effect as large more seldom than the policy's level."""
    return behaviour.false_alarm < policy.false_alarm


def findings(behaviours: Sequence[Behaviour], policy: Policy) -> tuple[Finding, ...]:
    """One finding per material behaviour beyond the null, declared or not."""
    candidates = [behaviour for behaviour in behaviours if material(behaviour, policy)]
    p_values = [p_value(behaviour) for behaviour in candidates]
    out = []
    for behaviour, p, q in zip(candidates, p_values, adjusted(p_values), strict=True):
        if not beyond_null(behaviour, policy):
            continue
        circuit = behaviour.circuit
        found = circuit if isinstance(circuit, Circuit) else None
        reason = NotMeasured(reason="") if found else circuit
        compared = behaviour.mechanisms
        out.append(
            Finding(
                id=f"f{len(out) + 1}",
                behaviour=behaviour.id,
                title=behaviour.title,
                declared_by=behaviour.declared_by,
                sites=tuple(sorted({_site(node) for node in found.selected})) if found else (),
                nodes=found.selected if found else (),
                effect=behaviour.effect,
                emergence=behaviour.emergent,
                opacity=behaviour.opacity,
                impact=behaviour.impact,
                false_alarm=behaviour.false_alarm,
                p_value=tidy(p),
                q_value=tidy(q),
                reversion=found.reversion if found else reason,  # pyright: ignore[reportArgumentType]
                transplant=compared if isinstance(compared, NotMeasured) else compared.transplant,
                side_effects=compared if isinstance(compared, NotMeasured) else compared.side_effects,
                confirmed=found is not None and found.confirmed,
                examples=behaviour.examples,
            )
        )
    return tuple(out)


def p_value(behaviour: Behaviour) -> float:
    """How often nothing new would look like this: the larger of the levels on both nulls, for it must pass both.

    One is the false-alarm level among null successors; the other, where a circuit was looked for, its rank among random
    sets of nodes, (1 + those that close as much) / (1 + all of them).
    """
    circuit = behaviour.circuit
    if isinstance(circuit, NotMeasured):
        return behaviour.false_alarm
    own = circuit.reversion if circuit.method == "parent" else circuit.ablation
    as_good = sum(value >= own.estimate for value in circuit.controls) if isinstance(own, Interval) else 0
    return max(behaviour.false_alarm, (1 + as_good) / (1 + len(circuit.controls)))


def adjusted(p_values: Sequence[float]) -> list[float]:
    """q-values: the least rate of false discoveries at which each would count as one (Benjamini & Hochberg 1995)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    out, least = [1.0] * len(order), 1.0
    for rank in range(len(order), 0, -1):
        i = order[rank - 1]
        least = min(least, p_values[i] * len(order) / rank)
        out[i] = least
    return out


def counted(found: Sequence[Finding], policy: Policy) -> list[Finding]:
    """The findings that count against approval: nobody declared them, and they are confirmed or need not be."""
    return [f for f in found if f.declared_by is None and (f.confirmed or policy.unconfirmed == "flag")]


def decide(
    behaviours: Sequence[Behaviour], found: Sequence[Finding], tokens: int, lacking: str | None, policy: Policy
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict with its reasons, the weightiest first; ``lacking`` says why the power does not support a pass."""
    open_findings = [finding for finding in found if finding.declared_by is None]
    flagged = counted(found, policy)
    unsure = [f for f in open_findings if f not in flagged]
    doubtful = [b for b in behaviours if b.declared_by is None and material(b, policy) and not beyond_null(b, policy)]
    declared = [f for f in found if f.declared_by is not None]
    reasons = [_flag_reason(f) for f in flagged]
    reasons += [f"The successor {f.title}: {_nats(f.effect)} and not declared, but {_unconfirmed(f)}." for f in unsure]
    reasons += [
        f"The successor {b.title}: {_nats(b.effect)}, but its false-alarm level of {share(b.false_alarm)} is not below "
        f"the policy's {share(policy.false_alarm)}: it cannot be told from a meaningless change of the same size."
        for b in doubtful
    ]
    if tokens < policy.fewest_tokens:
        reasons.append(f"Only {count(tokens, 'token')} could be compared; the policy asks for {policy.fewest_tokens}.")
    if lacking and not flagged:
        reasons.append(lacking)
    if flagged:
        verdict: Verdict = "flag"
    elif unsure or doubtful or tokens < policy.fewest_tokens or lacking:
        verdict = "inconclusive"
    else:
        verdict = "pass"
        reasons.append(
            "Every behaviour over the policy's threshold was declared."
            if any(material(b, policy) for b in behaviours)
            else "No behaviour reaches the policy's threshold."
        )
    reasons += [f"The successor {f.title}: {_nats(f.effect)}, declared as “{f.declared_by}”." for f in declared]
    return verdict, tuple(reasons)


def lacking(measured: Power | NotMeasured, null: Null | NotMeasured, policy: Policy) -> str | None:
    """Why the audit's power does not support a pass, with what would; None where it does."""
    if isinstance(measured, NotMeasured):
        return f"How small a circuit would have been seen is not known: {measured.reason}."
    if measured.visible is not None and measured.visible <= policy.visible_nats:
        return None
    wanted = f"{share(measured.seen_share)} of {count(len(measured.canaries), 'planted circuit')}"
    if measured.visible is None:
        seen = f"Fewer than {wanted} were seen at any size tried"
    else:
        seen = f"{wanted} were seen only from {measured.visible:.3g} nats on"
    remedy = _suffices(measured, null, policy)
    return f"{seen}; the policy asks for {policy.visible_nats:g} nats. To support a pass, {remedy}."


def _suffices(measured: Power, null: Null | NotMeasured, policy: Policy) -> str:
    """What would let the audit see circuits of the policy's size."""
    largest = max(null.largest_effects, default=0.0) if isinstance(null, Null) else 0.0
    if largest >= policy.visible_nats:
        return (
            f"null successors of the same size show up to {largest:.3g} nats, so more text will not help: compare with "
            "a closer ancestor, or have the policy allow a higher false-alarm level"
        )
    needed = measured.texts_needed
    if needed is None:
        return (
            "no budget would suffice: at that size too few of the planted circuits show as one behaviour however often "
            "they act; have the policy ask for what can be seen, or give text whose contexts are more alike"
        )
    had = min((canary.contexts for canary in measured.canaries), default=0)
    if needed <= had:
        return "a larger --budget, which plants more circuits, may show that the size is seen"
    names = [name for name, texts in CANARY_TEXTS.items() if texts >= needed]
    longer = (
        f"text in which contexts repeat {needed / had:.2g} times as often, which {needed / had:.2g} times as much has"
    )
    if not names:
        return f"use {longer}: a circuit of that size would have to act in about {needed} texts, here in {had}"
    return (
        f"use --budget {names[0]}, on {longer}: a circuit of that size would have to act in about {needed} texts, "
        f"here in {had}"
    )


def _unconfirmed(finding: Finding) -> str:
    if not finding.nodes and isinstance(finding.reversion, NotMeasured):
        return f"the parts that carry it were not looked for: {finding.reversion.reason}"
    return "no set of parts was shown to carry it better than random sets"


def _flag_reason(finding: Finding) -> str:
    causal = ""
    if isinstance(finding.reversion, Interval):
        causal = (
            f"; putting the parent's values into {count(len(finding.nodes), 'part')} of the successor removes "
            f"{share(finding.reversion.estimate)} of it"
        )
    elif finding.confirmed:
        causal = f"; averaging out {count(len(finding.nodes), 'part')} of the successor removes it"
    return f"The successor {finding.title}: {_nats(finding.effect)}, not declared{causal}."


def _nats(effect: Interval) -> str:
    if effect.n < 2:
        return f"{effect.estimate:.3g} nats in {count(effect.n, 'context')}"
    return f"{effect.estimate:.3g} nats [{effect.low:.3g}, {effect.high:.3g}] in {count(effect.n, 'context')}"


def _site(node: str) -> str:
    return node.split(".")[0].replace("attn_head", "attn_out")
