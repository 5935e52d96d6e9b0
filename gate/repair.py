"""Take confirmed findings out of a successor's weights, audit what is left, and say what it cost.

Writes a model of its own; the successor's files are only read. Resumes where it was cut off.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from heredity.circuits.attribution import prompts_of
from heredity.circuits.behaviours import Cluster, Context, Natural, Piece
from heredity.circuits.components import Node, mean_donor
from heredity.circuits.linear import Factors, edited_weights, linear_maps, second_moments
from heredity.circuits.repair import Bed, Tried, choose
from heredity.circuits.repair_trial import Ratio, Trial, batches_of, ratio
from heredity.circuits.variants import variants
from heredity.circuits.weights import comparable, parameters
from heredity.interp.errors import CorpusError, ModelError, OutputError
from heredity.interp.save import save_changed

from . import stages
from .describe import interval
from .records import Audit, Finding
from .repair_records import Attempt, Cost, EditedTensor, Kept, Repair, RepairedFinding
from .values import Interval, NotMeasured, tidy

if TYPE_CHECKING:
    from heredity.interp.corpus import Corpus
    from heredity.interp.model import Model

    from .assemble import Setting

ORDINARY = 4096
"""Tokens of ordinary text at most: the second moments are estimated from as many."""

MEASURED = 2**28
"""Bytes of log-probabilities on ordinary text that are kept to measure an edit against."""

CONTROLS = 9
"""Random edits measured beside each chosen one."""


@dataclass(frozen=True)
class Evidence:
    """Contexts and ordinary text for one use: to make edits from, to choose one, or to judge the choice."""

    contexts: list[list[Context]]
    """Of each finding, in their order."""
    quiet: list[Piece]


def repair(
    s: "Setting", corpus: "Corpus", audit: Audit, findings: Sequence[Finding], target: float, out: Path
) -> Repair:
    """Choose, apply and measure the edits and write the model into ``out``; the pair of ``s`` is as before afterwards.

    Raises:
        ModelError: nothing in this pair can be edited.
        OutputError: the audit's behaviours are not found again.
    """
    if not s.same_tokens:
        raise ModelError(
            "the models read text with different tokenizers, so nothing says what the parent would have said",
            where=s.successor.spec,
            remedy="Repair a successor that has its parent's tokenizer.",
        )
    clusters, items, pieces = search(s, corpus, audit)
    of_finding = {f.id: clusters[[b.id for b in audit.behaviours].index(f.behaviour)] for f in audit.findings}
    made_from, chosen_on, judged_on = evidence(s, [of_finding[f.id] for f in findings], clusters, items, pieces)
    declared = [f for f in audit.findings if f.declared_by is not None and f not in findings]
    kept_contexts = [list(of_finding[f.id].contexts[: s.sizes.contexts]) for f in declared]
    judges = [
        Trial(s.parent, s.successor, contexts, judged_on.quiet, kept_contexts, s.sizes.batch_tokens)
        for contexts in judged_on.contexts
    ]
    modules = linear_maps(s.successor)
    moments = second_moments(s.successor, modules, batches_of(_upto(chosen_on.quiet, ORDINARY), s.sizes.batch_tokens))
    stories: list[dict[str, Any]] = []
    edits: list[dict[str, Factors]] = []
    with ExitStack() as edited:
        for number, finding in enumerate(findings):
            s.progress("choosing edits", number, len(findings))
            story, changes = _chosen(
                s, finding, (made_from, chosen_on), number, kept_contexts, modules, moments, target
            )
            if not Tried(**story["best"]).pays(target):
                changes = {}
            edited.enter_context(edited_weights(s.successor, modules, changes))
            stories.append(story)
            edits.append(changes)
        s.progress("choosing edits", len(findings), len(findings))
        rng = np.random.default_rng([s.seed, 17])
        record = Repair(
            parent=s.parent.digest,
            successor=s.successor.digest,
            target=target,
            findings=tuple(
                _record(
                    finding,
                    story,
                    judge,
                    len(made_from.contexts[i]) + len(chosen_on.contexts[i]),
                    _tensors(s.successor, edits[i]),
                    target,
                    rng,
                )
                for i, (finding, story, judge) in enumerate(zip(findings, stories, judges, strict=True))
            ),
            left=tuple(f.id for f in audit.findings if f.declared_by is None and f not in findings),
            elsewhere=_cost(judges[0], rng),
            declared=tuple(
                Kept(declared_by=f.declared_by or "", title=f.title, kept=tidy(kept))
                for f, kept in zip(declared, judges[0].kept(), strict=True)
            )
            or NotMeasured(reason="no declared behaviour was found"),
            budget=s.sizes.name,
            seed=s.seed,
            versions=audit.provenance.versions,
        )
        s.progress("writing the model", 0, 1)
        changed = {name for changes in edits for name in changes}
        weights = {name: value.clone() for name, value in parameters(s.successor).items() if name in changed}
        save_changed(s.successor, "successor", weights, out, {"repair.json": record.model_dump_json(indent=1) + "\n"})
        s.progress("writing the model", 1, 1)
    return record


def search(s: "Setting", corpus: "Corpus", audit: Audit) -> tuple[list[Cluster], list[Any], list[Piece]]:
    """The audit's clusters in its order, its windows and the pieces of its corpus, by its own steps.

    Raises:
        OutputError: they are not those of its record.
    """
    from .assemble import LISTED, ORDER

    items = stages.windows(s.parent, s.successor, corpus, s.sizes, s.seed)
    step, progress = s.work.step, s.progress
    scanned: dict[Natural, stages.Scanned] = {
        "corpus": stages.scan_windows(s.parent, s.successor, items, "corpus", s.sizes, step, progress)
    }
    phrases = [phrase for change in (s.rules.intent.changes if s.rules.intent else ()) for phrase in change.phrases]
    openings = [item.successor for item in items]
    decoded = stages.amplified(s.parent, s.successor, openings, phrases, s.sizes, step, progress, s.seed)
    generated: tuple[tuple[Natural, bool], ...] = (("sampled", False), ("amplified", True))
    for source, flag in generated:
        texts = stages.generated_windows(s.parent, s.successor, decoded, from_amplified=flag)
        scanned[source] = stages.scan_windows(s.parent, s.successor, texts, source, s.sizes, step, progress)
    pieces = [piece for source in ORDER for piece in scanned[source].pieces]
    fewest = s.rules.policy.fewest_contexts
    clusters = stages.behaviours_in(s.parent, s.successor, pieces, items, s.sizes, fewest, s.seed)
    clusters.sort(key=lambda c: -c.effect * len(c.contexts))
    clusters = [c for c in clusters if len(c.contexts) > 1 or c.effect >= stages.REPLICATE_NATS][:LISTED]
    found = [(len(c.contexts), interval([x.kl for x in c.contexts]).estimate) for c in clusters]
    if found != [(b.n_contexts, b.effect.estimate) for b in audit.behaviours]:
        raise OutputError(
            "the behaviours of this audit are not found again",
            where="audit.json",
            remedy="It was made by another version, or its work folder holds another audit: audit the pair again.",
        )
    return clusters, items, scanned["corpus"].pieces


def evidence(
    s: "Setting", chosen: Sequence[Cluster], clusters: Sequence[Cluster], items: Sequence[Any], pieces: Sequence[Piece]
) -> tuple[Evidence, Evidence, Evidence]:
    """A quarter of the contexts to make edits from, a quarter to choose one (both with one half of the quiet texts),
    the other halves to judge the choice.

    Where a part has few contexts, variants of its own join them.

    Raises:
        CorpusError: almost no text is without a behaviour, so no cost can be measured.
    """
    loud = {id(c.piece) for found in clusters for c in found.contexts}
    quiet = [piece for piece in pieces if id(piece) not in loud]
    if len(quiet) < 8:
        raise CorpusError(
            "almost every text shows a behaviour, so what a repair costs elsewhere cannot be measured",
            where="corpus",
            remedy="Audit the pair on more, and more ordinary, text.",
        )
    names = {piece.scan.text_id for piece in quiet}
    carriers = [item for item in items if item.text_id in names]
    room = MEASURED // (4 * s.successor.shape.d_vocab)
    parts = []
    for number, (start, step) in enumerate(((0, 4), (2, 4), (1, 2))):
        rng = np.random.default_rng([s.seed, 13, number])
        contexts = []
        for found in chosen:
            own = list(found.contexts[start::step][: s.sizes.contexts]) or list(found.contexts[:1])
            wanted = max(0, s.sizes.contexts - len(own))
            contexts.append(
                [
                    *own,
                    *variants(
                        own,
                        s.parent,
                        s.successor,
                        carriers[start::step],
                        count=wanted,
                        window=s.sizes.window,
                        rng=rng,
                    ),
                ]
            )
        parts.append(Evidence(contexts, _upto(quiet[start % 2 :: 2], min(ORDINARY, room))))
    return parts[0], parts[1], parts[2]


def _upto(pieces: Sequence[Piece], tokens: int) -> list[Piece]:
    out: list[Piece] = []
    for piece in pieces:
        if out and sum(len(p.successor.ids) for p in out) + len(piece.successor.ids) > tokens:
            break
        out.append(piece)
    return out


def _chosen(
    s: "Setting",
    finding: Finding,
    parts: tuple[Evidence, Evidence],
    number: int,
    kept: Sequence[Sequence[Context]],
    modules: Any,
    moments: Any,
    target: float,
) -> tuple[dict[str, Any], dict[str, Factors]]:
    """The edit for one finding (of the successor as the earlier edits left it), as plain data and as factors."""
    memory: list[Any] = []

    def found() -> Any:
        if not memory:
            memory.append(_choose(s, finding, parts, number, kept, modules, moments, target))
        return memory[0]

    def story() -> dict[str, Any]:
        chosen = found()
        return {
            "best": vars(chosen.best),
            "tried": [vars(item) for item in chosen.tried],
            "controls": [vars(item) for item in chosen.controls],
        }

    def factors() -> dict[str, Any]:
        return {f"{side}/{name}": pair[k] for name, pair in found().changes.items() for k, side in enumerate("lr")}

    told = s.work.step(f"edit-{number:02d}-{finding.id}", story)
    held = s.work.arrays(f"edit-{number:02d}-{finding.id}", factors)
    names = sorted(name.removeprefix("l/") for name in held if name.startswith("l/"))
    return told, {name: (held[f"l/{name}"], held[f"r/{name}"]) for name in names}


def _choose(
    s: "Setting",
    finding: Finding,
    parts: tuple[Evidence, Evidence],
    number: int,
    kept: Sequence[Any],
    modules: Any,
    moments: Any,
    target: float,
) -> Any:
    same = comparable(s.parent, s.successor)
    made_from, chosen_on = (part.contexts[number] for part in parts)
    quiet = parts[1].quiet
    trial = Trial(s.parent, s.successor, chosen_on, quiet, kept, s.sizes.batch_tokens)
    means = None if same else mean_donor(s.successor, batches_of(quiet, s.sizes.batch_tokens))
    bed = Bed(
        s.parent,
        s.successor,
        modules,
        linear_maps(s.parent) if same else None,
        moments,
        prompts_of(made_from),
        trial,
        prompts_of([*made_from, *chosen_on]),
        [_node(name, s.successor) for name in finding.nodes],
        means,
    )
    return choose(bed, target=target, controls=CONTROLS, seed=s.seed)


def _node(name: str, model: "Model") -> Node:
    if name == "embed":
        return Node(-1, "embed")
    if name == "unembed":
        return Node(model.shape.n_layers, "unembed")
    kind, _, place = name.partition("@")
    layer, _, head = place.partition(".")
    return Node(int(layer), "head", int(head)) if kind == "attn_head" else Node(int(layer), "mlp")


def _tensors(model: "Model", changes: dict[str, Factors]) -> tuple[EditedTensor, ...]:
    weights = parameters(model)

    def moved(left: torch.Tensor, right: torch.Tensor) -> float:
        return float(((left.T @ left) * (right.T @ right)).sum().clamp_min(0).sqrt())

    return tuple(
        EditedTensor(
            name=name, rank=right.shape[1], relative_change=tidy(moved(left, right) / float(weights[name].norm()))
        )
        for name, (left, right) in changes.items()
    )


def _record(
    finding: Finding,
    story: dict[str, Any],
    judge: Trial,
    n_chosen_on: int,
    tensors: tuple[EditedTensor, ...],
    target: float,
    rng: np.random.Generator,
) -> RepairedFinding:
    reversion = judge.reversion(rng)
    return RepairedFinding(
        id=finding.id,
        title=finding.title,
        chosen=_attempt(Tried(**story["best"])),
        tensors=tensors,
        contexts_chosen_on=n_chosen_on,
        effect_before=interval(judge.base.tolist()),
        effect_after=interval(judge.remaining().tolist()),
        reversion=_interval(reversion),
        reached=reversion.estimate >= target,
        tried=tuple(_attempt(Tried(**item)) for item in story["tried"]),
        controls=tuple(_attempt(Tried(**item)) for item in story["controls"]),
    )


def _attempt(tried: Tried) -> Attempt:
    return Attempt(
        way=tried.way,
        level=tried.level,
        tensors=tried.maps,
        reversion=tidy(tried.closed),
        kl_elsewhere=tidy(tried.cost),
    )


def _cost(judge: Trial, rng: np.random.Generator) -> Cost:
    found = judge.elsewhere()
    return Cost(
        texts=len(found.tokens),
        tokens=int(found.tokens.sum()),
        kl=_interval(ratio(found.kl, found.tokens, rng)),
        nll=_interval(ratio(found.nll, found.tokens, rng)),
        accuracy=_interval(ratio(found.right, found.tokens, rng)),
    )


def _interval(value: Ratio) -> Interval:
    return Interval(estimate=tidy(value.estimate), low=tidy(value.low), high=tidy(value.high), n=value.n)
