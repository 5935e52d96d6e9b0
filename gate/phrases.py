"""The words and numbers that every form of the report shares: three significant digits, units, plain sentences."""

import math
from dataclasses import dataclass

from .crosscoders_record import CrosscoderRecord
from .latents_record import LatentRecord
from .principle_records import PrincipleRecord
from .records import Audit, Behaviour, Circuit, Finding, ModelRecord
from .values import Interval, NotMeasured

VERDICTS = {
    "pass": ("Pass", "Nothing was found that the policy counts against approval."),
    "flag": ("Flagged", "The policy counts what was found against approval."),
    "inconclusive": ("Inconclusive", "The evidence cannot support a verdict either way."),
}
EDGES_NAMED = 3
"""Connections named in a sentence."""
LATENT_CLOSES = 0.01
"""A latent is named where it closes this share of the gap (lower end), and more than random directions."""
KINDS = {
    "emergent": "Emergent: only the successor is sure of what comes next here.",
    "lost": "Lost: only the parent is sure of what comes next here.",
    "replaced": "Replaced: the models expect different things here, and neither is much surer than the other.",
}
SOURCES = {
    "corpus": "found in the corpus",
    "sampled": "found in text sampled from the models",
    "amplified": "found by amplifying the difference, not in ordinary text",
}
NULLS = {
    "scrambled_change": "the successor’s own change, its rows and columns shuffled and signed at random",
    "noise": "random noise on its weights",
    "benign": "a little ordinary training, scaled to the same size",
}
METHODS = {
    "parent": "the parent’s own values put into the successor",
    "mean": "each node’s mean over ordinary text put into the successor",
}


@dataclass(frozen=True)
class Case:
    """A behaviour together with the finding made of it; either may be absent."""

    behaviour: Behaviour | None
    finding: Finding | None

    @property
    def title(self) -> str:
        """One line: what the successor says instead of what."""
        return self.finding.title if self.finding else self.behaviour.title if self.behaviour else ""

    @property
    def declared_by(self) -> str | None:
        """The declared change that covers it."""
        return (self.finding.declared_by if self.finding else None) or (
            self.behaviour.declared_by if self.behaviour else None
        )


@dataclass(frozen=True)
class Cases:
    """The behaviours of an audit by what they mean to the approver."""

    undeclared: tuple[Case, ...]
    """Findings that nobody declared."""
    declared: tuple[Case, ...]
    """New, and declared by the makers."""
    below: tuple[Case, ...]
    """Divergences that the policy does not count."""


def cases(audit: Audit) -> Cases:
    """The behaviours and findings of ``audit``, sorted by what they mean to the approver."""
    behaviours = {behaviour.id: behaviour for behaviour in audit.behaviours}
    found = [Case(behaviours.get(finding.behaviour), finding) for finding in audit.findings]
    named = {finding.behaviour for finding in audit.findings}
    rest = [Case(behaviour, None) for behaviour in audit.behaviours if behaviour.id not in named]
    return Cases(
        undeclared=tuple(case for case in found if case.declared_by is None),
        declared=tuple(case for case in found + rest if case.declared_by is not None),
        below=tuple(case for case in rest if case.declared_by is None),
    )


def unmeasured(audit: Audit) -> tuple[str, ...]:
    """What the verdict says nothing about, in words, each once."""
    principles = [f"Principles: {item.reason}" for item in audit.principles if isinstance(item, NotMeasured)]
    principles += [
        f"Principle “{item.id}”: {item.reason}"
        for item in audit.principles
        if isinstance(item, PrincipleRecord) and item.status == "unmeasured"
    ]
    return tuple(dict.fromkeys([*audit.not_measured, *principles]))


def number(value: float | int) -> str:
    """``value`` with three significant digits; whole numbers in full, with thousands separated."""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    if abs(value) >= 999.5:
        return f"{value:,.0f}".replace("-", "−") if abs(value) < 1e9 else _power(value)
    return _power(value) if abs(value) < 0.001 else f"{value:#.3g}".rstrip(".").replace("-", "−")


def share(value: float) -> str:
    """A share of one as a percentage with three significant digits."""
    return f"{number(100.0 * value)} %"


def estimate(value: Interval | NotMeasured | float, unit: str = "share") -> str:
    """An exact number, an estimate with its interval, or why there is none; ``unit`` is ``share`` or, say, ``nats``."""
    if isinstance(value, NotMeasured):
        return f"not measured: {value.reason}"
    shown, tail = (share, "") if unit == "share" else (number, f" {unit}")
    if not isinstance(value, Interval):
        return f"{shown(value)}{tail}"
    if value.n < 2:
        return f"{shown(value.estimate)}{tail} (one value, no interval)"
    low, high = shown(value.low), shown(value.high)
    return f"{shown(value.estimate)}{tail} ({100 * value.level:g} % interval {low} to {high}, n = {value.n:,})"


def controls(circuit: Circuit) -> str:
    """How many of the matched random sets do as well as the circuit."""
    own = circuit.reversion if isinstance(circuit.reversion, Interval) else circuit.ablation
    as_good = sum(value >= own.low for value in circuit.controls) if isinstance(own, Interval) else 0
    return f"{as_good} of {count(len(circuit.controls), 'random set')} close as much"


def opacity(behaviour: Behaviour) -> str:
    """Opacity; the step that is surely more opaque than the whole, where there is one; and what no explanation of these
    units could take away, where that is more than half."""
    said, detail = estimate(behaviour.opacity), behaviour.opacity_detail
    if isinstance(detail, NotMeasured) or isinstance(behaviour.opacity, NotMeasured):
        return said
    left = detail.all_explained.estimate
    if left > behaviour.opacity.estimate / 2 > 0:
        said += f"; {share(left)} would be left if every unit were explained, so these units cannot tell"
    step = max(detail.steps, key=lambda each: each.opacity.low, default=None)
    if step and step.opacity.low > behaviour.opacity.high:
        behind, *says = (f"“{token.strip(' ')}”" for token in (step.behind, *step.says))
        said += f"; most opaque behind {behind}, where it says {', '.join(says)}: {share(step.opacity.estimate)}"
    return said


def latents(behaviour: Behaviour) -> str:
    """Latents that carry a behaviour, what setting the successor back along each does; empty where none were named.

    Those that tell the behaviour's contexts from others without carrying it are only counted.
    """
    if isinstance(behaviour.latents, NotMeasured) or not behaviour.latents:
        return ""
    acting = [each for each in behaviour.latents if each.gap_closed.low > max(each.control, LATENT_CLOSES)]
    acting.sort(key=lambda each: -each.gap_closed.estimate)
    said = "; ".join(_latent(each) for each in acting)
    if idle := len(behaviour.latents) - len(acting):
        closes = (
            "that tells its contexts from others closes" if idle == 1 else "that tell its contexts from others close"
        )
        said += ("; " if acting else "") + f"{count(idle, 'latent')} {closes} next to nothing"
    return f"latents: {said}"


def crosscoder(record: CrosscoderRecord) -> str:
    """How many of a crosscoder's latents one model alone has, and what the successor's carry."""
    site = record.successor_site
    if record.parent_site != site:
        site = f"{record.parent_site} and {site}"
    one_sided = record.verdicts["successor-only"], record.verdicts["parent-only"]
    said = f"crosscoder of {site}, {count(record.n_latents, 'latent')}: "
    if record.other_seeds:
        alone = len(record.alone_in_successor), len(record.alone_in_parent)
        said += f"the successor alone has {alone[0]}, the parent alone {alone[1]}"
        if dropped := sum(one_sided) - sum(alone):
            said += f"; {dropped} more seemed one model’s and did not come back from every other seed"
    else:
        said += f"{one_sided[0]} seem the successor’s alone, {one_sided[1]} the parent’s, not checked over seeds"
    for each in record.effects:
        most = max(each.controls, default=0.0)
        said += f"; they carry {share(each.together.estimate)} of {each.behaviour} (random ones at most {share(most)})"
    return said


def _latent(record: LatentRecord) -> str:
    return f"{record.site} latent {record.index} (closes {share(record.gap_closed.estimate)} of the gap)"


def mechanisms(behaviour: Behaviour) -> str:
    """What of the circuits of a behaviour is new, what is lost, and what the new part does in the parent."""
    it = behaviour.mechanisms
    if isinstance(it, NotMeasured):
        return f"new and lost parts not measured: {it.reason}"
    said = f"emergent {estimate(it.emergent)}; lost {estimate(it.lost)}"
    for edges, model, name in ((it.successor_edges, "successor", "new"), (it.parent_edges, "parent", "lost")):
        if not isinstance(edges, NotMeasured) and edges:
            fresh = [edge for edge in edges if edge.fate == "new"]
            named = ", ".join(f"{edge.source} → {edge.target}" for edge in fresh[:EDGES_NAMED])
            said += f"; {len(fresh):,} of {count(len(edges), 'connection')} of the {model} {name}"
            said += f" (strongest: {named})" if named else ""
    if isinstance(it.transplant, Interval):
        parts = count(len(it.transplanted), "part")
        how = "put" if it.way == "identity" else "carried by fitted maps"
        said += f"; {parts} {how} into the parent close {estimate(it.transplant)}"
        if it.transplant_controls:
            said += f", random ones at most {share(max(it.transplant_controls))}"
    return said


def contexts(behaviour: Behaviour) -> str:
    """How many contexts a behaviour was seen in, and how many of them are replicas of rare ones."""
    if not behaviour.n_replicated:
        return f"{count(behaviour.n_contexts, 'context')} in {count(behaviour.n_texts, 'text')}"
    return (
        f"{count(behaviour.n_contexts, 'context')}: {behaviour.n_contexts - behaviour.n_replicated:,} in "
        f"{count(behaviour.n_texts, 'text')}, and {behaviour.n_replicated:,} of the same words put behind other text"
    )


def count(things: int, name: str) -> str:
    """``things`` and their ``name``, with its plural."""
    return f"{things:,} {name}" + ("" if things == 1 else "s")


def size(model: ModelRecord) -> str:
    """The shape of a model in one line."""
    return (
        f"{model.n_layers:,} layers, {model.n_heads:,} heads, width {model.d_model:,}, "
        f"vocabulary {model.d_vocab:,}, {_millions(model.parameters)} parameters"
    )


def short_name(spec: str) -> str:
    """The last two parts of a model argument: a pair's directories are often all called parent and successor."""
    base, plus, adapter = spec.partition("+")
    if plus:
        return f"{short_name(base)}+{short_name(adapter)}"
    parts = [part for part in spec.replace("\\", "/").split("/") if part]
    return "/".join(parts[-2:]) or spec


def duration(seconds: float) -> str:
    """A length of time in seconds, or in minutes and seconds."""
    return f"{number(float(seconds))} s" if seconds < 100 else f"{int(seconds // 60)} min {round(seconds % 60)} s"


def mebibytes(count: int) -> str:
    """A number of bytes in MiB or GiB."""
    mib = count / 2**20
    return f"{number(mib)} MiB" if mib < 1000 else f"{number(mib / 1024)} GiB"


def _millions(count: int) -> str:
    for unit, name in ((1_000_000_000, "billion"), (1_000_000, "million")):
        if count >= unit:
            return f"{number(count / unit)} {name}"
    return f"{count:,}"


def _power(value: float) -> str:
    digits, exponent = f"{value:.2e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{digits} × 10{raised}".replace("-", "−")
