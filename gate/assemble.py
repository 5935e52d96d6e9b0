"""All measurements of an audit in order, as records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import TypeAdapter

from heredity.circuits.behaviours import Cluster, Natural, Piece
from heredity.circuits.components import Donor, mean_donor
from heredity.circuits.divergence import vocabulary
from heredity.circuits.null import NullSuccessors
from heredity.circuits.weights import comparable, relative_distance
from heredity.interp.capture import batches
from heredity.interp.corpus import Corpus
from heredity.interp.dictionaries.record import Dictionary
from heredity.interp.errors import CorpusError, ModelError
from heredity.interp.model import Model, pad
from heredity.interp.remember import Remembered

from . import describe, stages
from .baselines import baselines
from .benign_null import benign_null
from .budget import Budget
from .counterparts import Mechanisms
from .coverage import by_site
from .crosscoders import Crosscoders, crosscoders
from .latents import with_latents
from .mechanisms import Counterparts, shares, with_inherited
from .opacity import with_opacity
from .opacity_plan import Plan
from .policy import Loaded
from .power import power
from .principle_files import Asked
from .principle_records import PrincipleRecord, TaskRecord
from .principles import examine
from .readouts import Baselines
from .records import Behaviour, Calibration, Circuit, Drift, Example, Null
from .stages import Progress, Scanned
from .values import Interval, NotMeasured, tidy
from .verdict import counted, false_alarm, findings
from .work import Work

LISTED = 12
"""Behaviours listed at most."""

ORDER: tuple[Natural, ...] = ("corpus", "sampled", "amplified")
"""Sources of text, the most ordinary first."""

OPACITY = NotMeasured(reason="not measured yet")


@dataclass(frozen=True)
class Setting:
    """The two models, what can be compared between them, and the terms on which it is."""

    parent: Model
    successor: Model
    sizes: Budget
    rules: Loaded
    work: Work
    seed: int
    progress: Progress
    another_parent: Callable[[], Model]
    """Loads a second copy of the parent, for the null between architectures."""
    remembered: Remembered
    """The parent, for what depends on it and the text alone: other candidates ask it the same."""
    benign: int | None = None
    """How many benign successors make the null, instead of weight changes that mean nothing."""
    dictionaries: tuple[Dictionary, ...] = ()
    """Whose latents are explained."""
    other_seeds: tuple[Dictionary, ...] = ()
    """Crosscoders among them again, trained from other seeds."""
    train_dictionaries: bool = False
    """Whether dictionaries are to be trained where none were given."""

    @cached_property
    def same_parameters(self) -> bool:
        """Every parameter of one model has its counterpart in the other."""
        return comparable(self.parent, self.successor)

    @cached_property
    def same_tokens(self) -> bool:
        """Both read text as the same tokens."""
        return vocabulary(self.parent, self.successor).same


@dataclass(frozen=True)
class Measured:
    """Everything measured, before any verdict."""

    baselines: Baselines
    behaviours: tuple[Behaviour, ...]
    calibration: Calibration
    drift: Drift
    texts: int
    tokens: int
    compared: int
    kl_in_behaviours: float
    sites: dict[str, Interval] | NotMeasured
    crosscoders: Crosscoders
    principles: tuple[PrincipleRecord, ...]
    tasks: tuple[TaskRecord, ...]


def measure(s: Setting, corpus: Corpus, asked: Asked) -> Measured:
    """Run every stage."""
    parent, successor, sizes, seed = s.parent, s.successor, s.sizes, s.seed
    remembered = s.remembered
    items = stages.windows(parent, successor, corpus, sizes, seed)
    if not items:
        raise CorpusError(
            "holds nothing to compare: no text has two tokens",
            where=corpus.texts[0].source,
            remedy="Give longer text that these models' tokenizers can read.",
        )
    scanned: dict[Natural, Scanned] = {
        "corpus": stages.scan_windows(remembered, successor, items, "corpus", sizes, s.work.step, s.progress)
    }
    openings = [item.successor for item in items]
    declared = [phrase for change in (s.rules.intent.changes if s.rules.intent else ()) for phrase in change.phrases]
    decoded = stages.amplified(remembered, successor, openings, declared, sizes, s.work.step, s.progress, seed)
    generated: tuple[tuple[Natural, bool], ...] = (("sampled", False), ("amplified", True))
    for source, flag in generated:
        texts = stages.generated_windows(parent, successor, decoded, from_amplified=flag)
        scanned[source] = stages.scan_windows(parent, successor, texts, source, sizes, s.work.step, s.progress)
    drifted, weights = stages.drift_and_weights(
        remembered, successor, items, sizes, s.work, s.same_parameters, s.progress
    )
    null = _null(s, items, scanned["corpus"])
    principles, tasks = examine(s, asked, null, [item.parent.text for item in items])
    pieces = [piece for source in ORDER for piece in scanned[source].pieces]
    fewest = s.rules.policy.fewest_contexts
    clusters = stages.behaviours_in(parent, successor, pieces, items, sizes, fewest, seed)
    clusters.sort(key=lambda c: -c.effect * len(c.contexts))
    clusters = [c for c in clusters if len(c.contexts) > 1 or c.effect >= stages.REPLICATE_NATS][:LISTED]
    behaviours = _behaviours(s, clusters, items, scanned, null)
    plan = Plan(s, clusters, behaviours, items)
    behaviours = with_latents(plan, with_opacity(plan), null)
    compared = crosscoders(plan, pieces)
    kl = scanned["corpus"].kl
    inside = sum(_mass(c, "corpus") for c in clusters)
    return Measured(
        baselines=baselines(successor, scanned, decoded, drifted, weights),
        behaviours=behaviours,
        calibration=Calibration(
            null=null,
            power=power(
                parent,
                successor,
                items,
                scanned["corpus"].pieces,
                null,
                sizes,
                s.rules.policy,
                s.work,
                s.progress,
                seed,
                flagged=bool(counted(findings(behaviours, s.rules.policy), s.rules.policy)),
            ),
        ),
        drift=Drift(
            mean_kl=tidy(kl.mean()),
            weight_distance=tidy(relative_distance(parent, successor))
            if s.same_parameters
            else NotMeasured(reason="the models have different parameters"),
            lowest_cka=tidy(min(value for _, value in drifted["cka"])),
            loss_parent=_loss(scanned["corpus"], of_parent=True),
            loss_successor=_loss(scanned["corpus"], of_parent=False),
        ),
        texts=len(items),
        tokens=sum(len(item.parent.ids) for item in items),
        compared=len(kl),
        kl_in_behaviours=tidy(inside / kl.sum()) if kl.sum() > 0 else 0.0,
        sites=by_site(s, items),
        crosscoders=compared,
        principles=principles,
        tasks=tasks,
    )


def _loss(scanned: Scanned, *, of_parent: bool) -> float | NotMeasured:
    found = scanned.loss(of_parent=of_parent)
    return NotMeasured(reason="no token follows a compared one") if found is None else tidy(found)


def _null(s: Setting, items: Sequence[Any], scanned: Scanned) -> Null:
    few: list[Any] = []
    for item in items:
        few.append(item)
        if sum(len(i.parent.ids) for i in few) >= s.sizes.null_tokens:
            break
    noise = not s.same_parameters
    if scanned.bulk == 0:
        # Scaled to no size at all, a null successor is the parent itself, which shows nothing: no need to run it.
        return Null(
            kind="noise" if noise else "scrambled_change",
            draws=s.sizes.null_draws,
            scale=0.0,
            size=0.0,
            largest_effects=(0.0,) * s.sizes.null_draws,
            mean_kl=(0.0,) * s.sizes.null_draws,
            tokens=sum(len(i.parent.ids) for i in few),
        )
    size, left_out = scanned.drifted
    if s.benign:
        return benign_null(s, few, items, size, s.benign).model_copy(update={"left_out": tidy(left_out)})
    nulls = NullSuccessors(s.parent, s.another_parent() if noise else s.successor, noise=noise)
    result = stages.null_effects(
        s.remembered,
        nulls,
        few if not noise else [item.for_parent() for item in few],
        size,
        s.sizes,
        s.work,
        s.progress,
        seed=s.seed,
        fewest=s.rules.policy.fewest_contexts,
    )
    return Null(
        kind="noise" if noise else "scrambled_change",
        draws=len(result["draws"]),
        scale=tidy(result["scale"]),
        size=tidy(size),
        left_out=tidy(left_out),
        largest_effects=tuple(tidy(draw["largest"]) for draw in result["draws"]),
        mean_kl=tuple(tidy(draw["mean"]) for draw in result["draws"]),
        tokens=sum(len(i.parent.ids) for i in few),
    )


def _mass(found: Cluster, source: str) -> float:
    """KL(S‖P) summed over the episodes of ``source``, nats."""
    return float(
        sum(
            sum(c.piece.scan.kl[c.span[0] : c.span[1] + 1])
            for c in (*found.contexts, *found.weaker)
            if c.piece.source == source
        )
    )


def _behaviours(
    s: Setting, clusters: Sequence[Cluster], items: Sequence[Any], scanned: dict[Natural, Scanned], null: Null
) -> tuple[Behaviour, ...]:
    quiet = _quiet_texts(scanned, clusters)
    pool = sorted({token for item in items[:200] for token in item.successor.ids})
    means: list[Donor] = []

    def donor() -> Donor:
        if not means:
            means.append(_means(s.successor, items, s.sizes))
        return means[0]

    counterparts = Counterparts(s, items, quiet, donor)
    out: list[Behaviour] = []
    analysed = 0
    for number, found in enumerate(clusters):
        s.progress("tracing behaviours", number, len(clusters))
        effect = describe.interval([c.kl for c in found.contexts])
        policy = s.rules.policy
        wanted = effect.low >= policy.material_nats and len(found.contexts) >= policy.fewest_contexts
        analysed += wanted

        def compute(found: Cluster = found, wanted: bool = wanted, rank: int = analysed) -> Any:
            shown = describe.examples(found, s.parent, s.successor, pool, s.sizes if wanted else None, s.seed)
            return {
                "examples": [example.model_dump(mode="json") for example in shown],
                "circuit": _circuit(s, found, wanted, rank, donor).model_dump(mode="json"),
            }

        traced = s.work.step(f"behaviour-{number:03d}", compute)
        circuit = TypeAdapter(Circuit | NotMeasured).validate_python(traced["circuit"])
        traced["mechanisms"] = s.work.step(
            f"mechanisms-{number:03d}",
            lambda found=found, circuit=circuit: counterparts.of(found, circuit).model_dump(mode="json"),
        )
        out.append(_behaviour(s, found, f"b{number + 1}", effect, traced, scanned, null, quiet))
    s.progress("tracing behaviours", len(clusters), len(clusters))
    return tuple(out)


def _means(successor: Model, items: Sequence[Any], sizes: Budget) -> Donor:
    few = [item.successor for item in items[: max(1, sizes.drift_tokens // sizes.window)]]
    return mean_donor(successor, [pad([few[i].ids for i in group]) for group in batches(few, sizes.batch_tokens)])


def _circuit(s: Setting, found: Cluster, wanted: bool, rank: int, donor: Callable[[], Donor]) -> Circuit | NotMeasured:
    if not wanted:
        return NotMeasured(reason="below the policy's threshold, so not traced")
    if not s.same_tokens:
        return NotMeasured(reason="the models read text with different tokenizers")
    if rank > s.sizes.behaviours:
        return NotMeasured(reason=f"only {s.sizes.behaviours} behaviours are traced at this budget")
    try:
        return describe.circuit(
            found,
            s.parent,
            s.successor,
            donor(),
            same_parameters=s.same_parameters,
            budget=s.sizes,
            policy=s.rules.policy,
            seed=s.seed,
        )
    except ModelError as error:
        # Raised for architectures whose parts do not add up to the residual stream, so cannot be exchanged one by one.
        return NotMeasured(reason=error.what)


def _behaviour(
    s: Setting,
    found: Cluster,
    name: str,
    effect: Interval,
    traced: dict[str, Any],
    scanned: dict[Natural, Scanned],
    null: Null,
    quiet: Sequence[str],
) -> Behaviour:
    examples = tuple(Example(**example) for example in traced["examples"])
    circuit = TypeAdapter(Circuit | NotMeasured).validate_python(traced["circuit"])
    compared = TypeAdapter(Mechanisms | NotMeasured).validate_python(traced["mechanisms"])
    largest = null.largest_effects
    source: Natural = next(n for n in ORDER if any(c.piece.source == n for c in found.contexts))
    declared = [
        change.id
        for change in (s.rules.intent.changes if s.rules.intent else ())
        if describe.covering(found, quiet, change, s.rules.policy)
    ]
    return Behaviour(
        id=name,
        source=source,
        title=describe.title(found, s.successor, s.parent, examples, source != "corpus"),
        kind=found.kind,
        n_contexts=len(found.contexts),
        n_replicated=sum(c.piece.source == "replicated" for c in found.contexts),
        n_texts=len({(c.piece.source, c.piece.scan.text_id) for c in found.contexts if c.piece.source != "replicated"}),
        effect=effect,
        effect_reverse=describe.interval([c.reverse for c in found.contexts]),
        impact=tidy(_mass(found, source) / scanned[source].kl.sum()),
        false_alarm=tidy(false_alarm(effect.low, largest)),
        null_max=max(largest, default=0.0),
        declared_by=declared[0] if declared else None,
        **shares(compared),
        opacity=OPACITY,
        opacity_detail=OPACITY,
        latents=OPACITY,
        successor_tokens=describe.changes(found, s.successor, of_successor=True),
        parent_tokens=describe.changes(found, s.parent, of_successor=False),
        trigger_tokens=describe.trigger_tokens(examples),
        examples=examples,
        circuit=with_inherited(circuit, compared),
        mechanisms=compared,
    )


def _quiet_texts(scanned: dict[Natural, Scanned], clusters: Sequence[Cluster]) -> list[str]:
    """Texts in which no behaviour shows."""
    loud = {id(c.piece) for found in clusters for c in found.contexts}

    def holds(piece: Piece) -> bool:
        return id(piece) in loud

    return [piece.successor.text for part in scanned.values() for piece in part.pieces if not holds(piece)]
