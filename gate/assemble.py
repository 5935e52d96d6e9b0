"""All measurements of an audit in order, as records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from heredity.circuits.behaviours import Cluster, Natural, Piece
from heredity.circuits.components import Donor, mean_donor
from heredity.circuits.divergence import vocabulary
from heredity.circuits.null import NullSuccessors
from heredity.circuits.weights import comparable, relative_distance
from heredity.interp.capture import batches
from heredity.interp.corpus import Corpus
from heredity.interp.errors import CorpusError, ModelError
from heredity.interp.model import Model, pad

from . import describe, stages
from .budget import Budget
from .policy import Loaded
from .records import (
    AmplifiedSample,
    Baselines,
    Behaviour,
    Calibration,
    Circuit,
    Divergence,
    Drift,
    Example,
    Interval,
    LayerSimilarity,
    MeanDifference,
    MinedToken,
    NotMeasured,
    Null,
    WeightReadout,
    tidy,
)
from .stages import Progress, Scanned
from .work import Work

LISTED = 12
"""Behaviours listed at most."""

ORDER: tuple[Natural, ...] = ("corpus", "sampled", "amplified")
"""Sources of text, the most ordinary first."""

MATCHING = "needs mechanisms of parent and successor matched one to one, which this version does not do"
OPACITY = "needs explanations of the parts, which this version does not make"


@dataclass(frozen=True)
class Pair:
    """The two models and what can be compared between them."""

    parent: Model
    successor: Model
    same_parameters: bool
    same_tokens: bool


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


def measure(
    parent: Model,
    successor: Model,
    corpus: Corpus,
    sizes: Budget,
    rules: Loaded,
    work: Work,
    seed: int,
    progress: Progress,
    another_parent: Callable[[], Model],
) -> Measured:
    """Run every stage. ``another_parent`` loads a second copy of the parent, for the null between architectures."""
    pair = Pair(parent, successor, comparable(parent, successor), vocabulary(parent, successor).same)
    items = stages.windows(parent, successor, corpus, sizes, seed)
    if not items:
        raise CorpusError(
            "holds nothing to compare: no text has two tokens",
            where=corpus.texts[0].source,
            remedy="Give longer text that these models' tokenizers can read.",
        )
    scanned: dict[Natural, Scanned] = {
        "corpus": stages.scan_windows(parent, successor, items, "corpus", sizes, work.step, progress)
    }
    openings = [item.successor for item in items]
    declared = [phrase for change in (rules.intent.changes if rules.intent else ()) for phrase in change.phrases]
    decoded = stages.amplified(parent, successor, openings, declared, sizes, work.step, progress, seed)
    generated: tuple[tuple[Natural, bool], ...] = (("sampled", False), ("amplified", True))
    for source, flag in generated:
        texts = stages.generated_windows(parent, successor, decoded, from_amplified=flag)
        scanned[source] = stages.scan_windows(parent, successor, texts, source, sizes, work.step, progress)
    drifted, weights = stages.drift_and_weights(parent, successor, items, sizes, work, pair.same_parameters, progress)
    null = _null(pair, items, scanned["corpus"], sizes, rules, work, seed, progress, another_parent)
    pieces = [piece for source in ORDER for piece in scanned[source].pieces]
    fewest = rules.policy.fewest_contexts
    clusters = stages.behaviours_in(parent, successor, pieces, items, sizes, fewest, seed)
    clusters.sort(key=lambda c: -c.effect * len(c.contexts))
    clusters = [c for c in clusters if len(c.contexts) > 1 or c.effect >= stages.REPLICATE_NATS][:LISTED]
    behaviours = _behaviours(pair, clusters, items, scanned, null, sizes, rules, work, seed, progress)
    kl = scanned["corpus"].kl
    inside = sum(_mass(c, "corpus") for c in clusters)
    return Measured(
        baselines=_baselines(pair, scanned, decoded, drifted, weights),
        behaviours=behaviours,
        calibration=Calibration(
            null=null, power=NotMeasured(reason="no canary circuits were planted: not part of this version")
        ),
        drift=Drift(
            mean_kl=tidy(kl.mean()),
            weight_distance=tidy(relative_distance(parent, successor))
            if pair.same_parameters
            else NotMeasured(reason="the models have different parameters"),
            lowest_cka=tidy(min(value for _, value in drifted["cka"])),
        ),
        texts=len(items),
        tokens=sum(len(item.parent.ids) for item in items),
        compared=len(kl),
        kl_in_behaviours=tidy(inside / kl.sum()) if kl.sum() > 0 else 0.0,
    )


def _null(
    pair: Pair,
    items: Sequence[Any],
    scanned: Scanned,
    sizes: Budget,
    rules: Loaded,
    work: Work,
    seed: int,
    progress: Progress,
    another_parent: Callable[[], Model],
) -> Null:
    few: list[Any] = []
    for item in items:
        few.append(item)
        if sum(len(i.parent.ids) for i in few) >= sizes.null_tokens:
            break
    noise = not pair.same_parameters
    if scanned.bulk == 0:
        # Scaled to no size at all, a null successor is the parent itself, which shows nothing: no need to run it.
        return Null(
            kind="noise" if noise else "scrambled_change",
            draws=sizes.null_draws,
            scale=0.0,
            size=0.0,
            largest_effects=(0.0,) * sizes.null_draws,
            mean_kl=(0.0,) * sizes.null_draws,
            tokens=sum(len(i.parent.ids) for i in few),
        )
    nulls = NullSuccessors(pair.parent, another_parent() if noise else pair.successor, noise=noise)
    result = stages.null_effects(
        nulls,
        few if not noise else [item.for_parent() for item in few],
        scanned.bulk,
        sizes,
        work,
        progress,
        seed=seed,
        fewest=rules.policy.fewest_contexts,
    )
    return Null(
        kind="noise" if noise else "scrambled_change",
        draws=len(result["draws"]),
        scale=tidy(result["scale"]),
        size=tidy(scanned.bulk),
        largest_effects=tuple(tidy(draw["largest"]) for draw in result["draws"]),
        mean_kl=tuple(tidy(draw["mean"]) for draw in result["draws"]),
        tokens=sum(len(i.parent.ids) for i in few),
    )


def _mass(found: Cluster, source: str) -> float:
    """KL(S‖P) summed over the episodes of ``source``, nats."""
    return float(
        sum(sum(c.piece.scan.kl[c.span[0] : c.span[1] + 1]) for c in found.contexts if c.piece.source == source)
    )


def _behaviours(
    pair: Pair,
    clusters: Sequence[Cluster],
    items: Sequence[Any],
    scanned: dict[Natural, Scanned],
    null: Null,
    sizes: Budget,
    rules: Loaded,
    work: Work,
    seed: int,
    progress: Progress,
) -> tuple[Behaviour, ...]:
    quiet = _quiet_texts(scanned, clusters)
    pool = sorted({token for item in items[:200] for token in item.successor.ids})
    means: list[Donor] = []

    def donor() -> Donor:
        if not means:
            means.append(_means(pair.successor, items, sizes))
        return means[0]

    out: list[Behaviour] = []
    analysed = 0
    for number, found in enumerate(clusters):
        progress("tracing behaviours", number, len(clusters))
        effect = describe.interval([c.kl for c in found.contexts])
        policy = rules.policy
        wanted = effect.low >= policy.material_nats and len(found.contexts) >= policy.fewest_contexts
        analysed += wanted

        def compute(found: Cluster = found, wanted: bool = wanted, rank: int = analysed) -> Any:
            shown = describe.examples(found, pair.parent, pair.successor, pool, sizes if wanted else None, seed)
            return {
                "examples": [example.model_dump(mode="json") for example in shown],
                "circuit": _circuit(pair, found, wanted, rank, donor, sizes, rules, seed).model_dump(mode="json"),
            }

        traced = work.step(f"behaviour-{number:03d}", compute)
        out.append(_behaviour(pair, found, f"b{number + 1}", effect, traced, scanned, null, quiet, rules))
    progress("tracing behaviours", len(clusters), len(clusters))
    return tuple(out)


def _means(successor: Model, items: Sequence[Any], sizes: Budget) -> Donor:
    few = [item.successor for item in items[: max(1, sizes.drift_tokens // sizes.window)]]
    return mean_donor(successor, [pad([few[i].ids for i in group]) for group in batches(few, sizes.batch_tokens)])


def _circuit(
    pair: Pair,
    found: Cluster,
    wanted: bool,
    rank: int,
    donor: Callable[[], Donor],
    sizes: Budget,
    rules: Loaded,
    seed: int,
) -> Circuit | NotMeasured:
    if not wanted:
        return NotMeasured(reason="below the policy's threshold, so not traced")
    if not pair.same_tokens:
        return NotMeasured(reason="the models read text with different tokenizers")
    if rank > sizes.behaviours:
        return NotMeasured(reason=f"only {sizes.behaviours} behaviours are traced at this budget")
    try:
        return describe.circuit(
            found,
            pair.parent,
            pair.successor,
            donor(),
            same_parameters=pair.same_parameters,
            budget=sizes,
            policy=rules.policy,
            seed=seed,
        )
    except ModelError as error:
        # Raised for architectures whose parts do not add up to the residual stream, so cannot be exchanged one by one.
        return NotMeasured(reason=error.what)


def _behaviour(
    pair: Pair,
    found: Cluster,
    name: str,
    effect: Interval,
    traced: dict[str, Any],
    scanned: dict[Natural, Scanned],
    null: Null,
    quiet: Sequence[str],
    rules: Loaded,
) -> Behaviour:
    examples = tuple(Example(**example) for example in traced["examples"])
    largest = null.largest_effects
    source: Natural = next(s for s in ORDER if any(c.piece.source == s for c in found.contexts))
    declared = [
        change.id
        for change in (rules.intent.changes if rules.intent else ())
        if describe.covering(found, quiet, change, rules.policy)
    ]
    return Behaviour(
        id=name,
        source=source,
        title=describe.title(found, pair.successor, pair.parent, examples, source != "corpus"),
        kind=found.kind,
        n_contexts=len(found.contexts),
        n_replicated=sum(c.piece.source == "replicated" for c in found.contexts),
        n_texts=len({(c.piece.source, c.piece.scan.text_id) for c in found.contexts}),
        effect=effect,
        effect_reverse=describe.interval([c.reverse for c in found.contexts]),
        impact=tidy(_mass(found, source) / scanned[source].kl.sum()),
        false_alarm=tidy((1 + sum(value >= effect.estimate for value in largest)) / (1 + len(largest))),
        null_max=max(largest, default=0.0),
        declared_by=declared[0] if declared else None,
        inherited=NotMeasured(reason=MATCHING),
        lost=NotMeasured(reason=MATCHING),
        emergent=NotMeasured(reason=MATCHING),
        opacity=NotMeasured(reason=OPACITY),
        successor_tokens=describe.changes(found, pair.successor, of_successor=True),
        parent_tokens=describe.changes(found, pair.parent, of_successor=False),
        trigger_tokens=describe.trigger_tokens(examples),
        examples=examples,
        circuit=TypeAdapter(Circuit | NotMeasured).validate_python(traced["circuit"]),
    )


def _quiet_texts(scanned: dict[Natural, Scanned], clusters: Sequence[Cluster]) -> list[str]:
    """Texts in which no behaviour shows."""
    loud = {id(c.piece) for found in clusters for c in found.contexts}

    def holds(piece: Piece) -> bool:
        return id(piece) in loud

    return [piece.successor.text for s in scanned.values() for piece in s.pieces if not holds(piece)]


def _baselines(
    pair: Pair,
    scanned: dict[Natural, Scanned],
    decoded: Sequence[dict[str, Any]],
    drifted: dict[str, Any],
    weights: list[dict[str, Any]] | None,
) -> Baselines:
    corpus = scanned["corpus"]
    return Baselines(
        divergence=_divergence(corpus),
        raised_tokens=_mined(corpus.raised, len(corpus.kl), pair.successor),
        lowered_tokens=_mined(corpus.lowered, len(corpus.kl), pair.successor),
        amplified=_amplified(scanned["amplified"], [d for d in decoded if d["amplification"] > 0 or d.get("swept")]),
        weights=NotMeasured(reason="the models have different parameters")
        if weights is None
        else tuple(WeightReadout.model_validate(_tidied(w)) for w in weights),
        mean_differences=tuple(
            MeanDifference(**{**reading, "relative_norm": tidy(reading["relative_norm"])})
            for reading in drifted["readings"]
        )
        or NotMeasured(reason="the models have different widths"),
        similarity=tuple(LayerSimilarity(site=site, cka=tidy(value)) for site, value in drifted["cka"]),
    )


def _tidied(record: dict[str, Any]) -> dict[str, Any]:
    return {name: tidy(value) if isinstance(value, float) else value for name, value in record.items()}


def _divergence(corpus: Scanned) -> Divergence:
    kl, reverse = corpus.kl, corpus.reverse
    edges = [0.0, *(10.0**k for k in np.arange(-5, 1.51, 0.25))]
    counts, _ = np.histogram(np.clip(kl, 0, edges[-1]), bins=edges)
    return Divergence(
        texts=len(corpus.pieces),
        tokens=len(kl),
        mean=tidy(kl.mean()),
        median=tidy(np.median(kl)),
        p99=tidy(np.quantile(kl, 0.99)),
        max=tidy(kl.max()),
        mean_reverse=tidy(reverse.mean()),
        max_reverse=tidy(reverse.max()),
        histogram_edges=tuple(tidy(edge) for edge in edges),
        histogram_counts=tuple(int(count) for count in counts),
    )


def _mined(counts: dict[int, int], positions: int, model: Model) -> tuple[MinedToken, ...]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:20]
    return tuple(
        MinedToken(token=model.decode([token]), count=count, share=tidy(count / positions)) for token, count in ranked
    )


def _amplified(scanned: Scanned, decoded: Sequence[dict[str, Any]]) -> tuple[AmplifiedSample, ...]:
    """The decoded texts over which the unamplified models disagree most."""
    samples = [
        AmplifiedSample(
            prompt=item["prompt"],
            amplification=item["amplification"],
            text=item["text"],
            kl_mean=tidy(float(np.mean(piece.scan.kl))),
            kl_max=tidy(max(piece.scan.kl)),
        )
        for item, piece in zip(decoded, scanned.pieces, strict=True)
        if piece.scan.kl
    ]
    return tuple(sorted(samples, key=lambda s: (-s.kl_mean, s.text))[:12])
