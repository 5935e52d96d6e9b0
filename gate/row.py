"""An audit in one row, for tables of several audits."""

from typing import Literal

from .records import Audit
from .values import Estimate, Interval, NotMeasured, Record


class Row(Record):
    """What one audit says, without its evidence."""

    verdict: Literal["pass", "flag", "inconclusive"]
    findings: int
    """Behaviours over the policy that nobody declared."""
    counted: int
    """Those of them that flag the successor."""
    declared: int
    """Behaviours over the policy that the intent covers."""
    title: str | None
    """What the successor does in the behaviour whose ``effect`` stands here; null if none was listed."""
    effect: Estimate
    """KL(successor‖parent), nats: of the largest finding, else of the largest behaviour below the policy, one that has
    as many contexts as the policy asks for if there is any."""
    emergence: Estimate
    """Largest of the findings'."""
    opacity: Estimate
    """Largest of the findings'."""
    inherited: Estimate
    """Smallest of the behaviours over the policy."""
    visible: float | NotMeasured
    """Nats from which most planted circuits were seen: smaller ones may have been missed."""
    mean_kl: float
    """KL(successor‖parent) over the text, nats per token."""
    weight_distance: float | NotMeasured


def row_of(audit: Audit) -> Row:
    """``audit`` as one row."""
    undeclared = [found for found in audit.findings if found.declared_by is None]
    counts_unconfirmed = audit.policy.values.get("unconfirmed") == "flag"
    # In a table the worst stands for all; what was declared counts as little here as it does for the verdict.
    fewest = int(audit.policy.values.get("fewest_contexts", 1))
    frequent = [behaviour for behaviour in audit.behaviours if behaviour.n_contexts >= fewest]
    shown = undeclared or audit.findings or frequent or audit.behaviours
    largest = max(shown, key=lambda item: item.effect.estimate, default=None)
    over = {found.behaviour for found in audit.findings}
    behaviours = [behaviour for behaviour in audit.behaviours if behaviour.id in over]
    power = audit.calibration.power
    return Row(
        verdict=audit.verdict,
        findings=len(undeclared),
        counted=sum(found.confirmed or counts_unconfirmed for found in undeclared),
        declared=len(audit.findings) - len(undeclared),
        title=largest.title if largest else None,
        effect=largest.effect if largest else NotMeasured(reason="no behaviour was listed"),
        emergence=_extreme([found.emergence for found in undeclared or audit.findings], largest=True),
        opacity=_extreme([found.opacity for found in undeclared or audit.findings], largest=True),
        inherited=_extreme([behaviour.inherited for behaviour in behaviours], largest=False),
        visible=_visible(power.visible) if not isinstance(power, NotMeasured) else power,
        mean_kl=audit.drift.mean_kl,
        weight_distance=audit.drift.weight_distance,
    )


def _visible(value: float | None) -> float | NotMeasured:
    return NotMeasured(reason="too few planted circuits were seen at any size") if value is None else value


def _extreme(values: list[Interval | NotMeasured], *, largest: bool) -> Interval | NotMeasured:
    """The largest or smallest measured estimate, else the first reason why there is none."""
    measured = [value for value in values if isinstance(value, Interval)]
    if measured:
        return (max if largest else min)(measured, key=lambda value: value.estimate)
    reasons = [value for value in values if isinstance(value, NotMeasured)]
    return reasons[0] if reasons else NotMeasured(reason="nothing is over the policy")
