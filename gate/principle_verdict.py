"""What principles do to the verdict, and the sentences that say what became of them."""

from collections.abc import Sequence

from .phrases import count, estimate, number, share
from .policy import Policy
from .principle_records import Kept, PrincipleRecord, TaskRecord
from .records import Audit
from .values import Interval
from .verdict import Verdict


def judged(
    verdict: Verdict, reasons: Sequence[str], principles: Sequence[PrincipleRecord], policy: Policy
) -> tuple[Verdict, tuple[str, ...]]:
    """Verdict and reasons of the rest of the audit, with those of the principles."""
    against = [p for p in principles if p.counts]
    unknown = [p for p in principles if p.status == "unmeasured" and p.declared_by is None]
    declared = [p for p in principles if p.declared_by is not None and p.status != "present"]
    doubtful = [p for p in principles if p.status == "replaced" and policy.principle_replaced == "inconclusive"]
    doubtful = [p for p in doubtful if p.declared_by is None]
    shown = [f"Principle “{p.id}”: {sentence(p)}." for p in (*against, *unknown, *doubtful)]
    told = [f"Principle “{p.id}”: {sentence(p)}, declared as “{p.declared_by}”." for p in declared]
    kept = [p.id for p in principles if p.status == "present"]
    told += [f"{count(len(kept), 'principle')} kept: {', '.join(kept)}."] if kept else []
    if against:
        verdict = "flag"
    elif (unknown or doubtful) and verdict == "pass":
        verdict = "inconclusive"
    # What speaks for a pass is no reason any more.
    rest = [reason for reason in reasons if verdict == "pass" or not reason.startswith(_PASSES)]
    return verdict, (*shown, *rest, *told)


_PASSES = ("No behaviour reaches", "Every behaviour over")


def sentence(of: Kept) -> str:
    """What became of a principle or a task, in one line without a full stop."""
    status = getattr(of, "status", "")
    if status == "unmeasured":
        return f"not measured: {of.reason}"
    if status == "absent":
        return f"done by neither model: {of.reason}"
    if status == "new":
        return f"done by the successor only: {of.reason}"
    parts = [_WORDS[status], _effect(of)]
    if of.broken:
        parts.append(f"broken on {of.broken} of {count(of.pairs, 'prompt')}")
    if isinstance(of.carried, Interval) and status != "gone":
        them = f"{of.least} carries" if of.least else f"{_listed(of.carriers)} together carry"
        parts.append(f"{them} {share(of.carried.estimate)} of the share carried in the parent")
    if status in ("replaced", "moved"):
        parts.append(f"now carried by {_listed(gained(of)) or 'no single part'}")
    return "; ".join(parts)


def gained(of: Kept) -> tuple[str, ...]:
    """The successor's nodes that gained, by how much."""
    nodes = [node for node in of.nodes if node.moved == "gained" and node.successor]
    return tuple(node.successor or "" for node in sorted(nodes, key=lambda node: -node.change.estimate))


def fled(of: Kept) -> tuple[str, ...]:
    """The parent's nodes that lost, by how much."""
    nodes = [node for node in of.nodes if node.moved == "lost" and node.parent]
    return tuple(node.parent or "" for node in sorted(nodes, key=lambda node: node.change.estimate))


_WORDS = {
    "present": "present",
    "inherited": "inherited",
    "weakened": "weakened",
    "gone": "gone",
    "lost": "lost",
    "replaced": "kept, by another mechanism",
    "moved": "kept, by another mechanism",
}


def _effect(of: Kept) -> str:
    if not isinstance(of.effect_parent, Interval) or not isinstance(of.effect_successor, Interval):
        return f"effect {estimate(of.effect_parent, 'nats')}"
    unit = "nats" if of.metric == "logit_difference" else "of probability"
    kept = f", right on {share(of.kept_successor.estimate)}" if isinstance(of.kept_successor, Interval) else ""
    return (
        f"effect {number(of.effect_parent.estimate)} in the parent, {number(of.effect_successor.estimate)} {unit} in "
        f"the successor{kept}"
    )


def _listed(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def kept_rows(audit: Audit) -> tuple[tuple[str, PrincipleRecord | TaskRecord], ...]:
    """Every principle and task of ``audit`` with the word for what it is; principles first."""
    principles = [("Principle", p) for p in audit.principles if isinstance(p, PrincipleRecord)]
    return (*principles, *(("Task", task) for task in audit.tasks))
