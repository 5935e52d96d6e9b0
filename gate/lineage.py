"""Audits joined into lines of descent: each generation against its parent and against its first ancestor.

A step may be small and pass while the sum of the steps is not, so a generation is placed by both distances. Efficiency
is what a model knows of the audited text for its size: (ln V − loss) nats per token over a uniform guess among its V
tokens, per million parameters, and per 10⁹ FLOP of a forward, which is taken as 2 FLOP per parameter and token.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from heredity.interp.errors import OutputError

from .read_audit import read_audit
from .records import Audit, ModelRecord
from .row import Row, row_of
from .values import NotMeasured, Record, tidy

SCHEMA_VERSION = "1.0"

FLOP_PER_PARAMETER = 2
"""Of a forward, per token: a multiplication and an addition; what attention adds with the length is left out."""


class Distance(Record):
    """A generation as its audit against another model sees it."""

    audit: str
    """Directory of the audit."""
    row: Row


class Generation(Record):
    """One model of a line."""

    number: int
    """Steps from the first ancestor, which is 0."""
    model: ModelRecord
    parent: str | None
    """Digest of the model before it; null for the first ancestor."""
    to_parent: Distance | NotMeasured
    to_first: Distance | NotMeasured
    loss: float | NotMeasured
    """Mean −log p of the tokens that follow on the audited text, nats per token."""
    flop_per_token: int
    per_million_parameters: float | NotMeasured
    """(ln V − loss) per million parameters."""
    per_gigaflop: float | NotMeasured
    """(ln V − loss) per 10⁹ FLOP of one token's forward."""


class Line(Record):
    """A first ancestor and what descends from it, earlier generations first."""

    first: str
    generations: tuple[Generation, ...]


class Lineage(Record):
    """All lines, and what a reader should know of them."""

    schema_version: Literal["1.0"] = SCHEMA_VERSION
    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    exit_code: int
    """Of the worst audit: 1 flag, 3 inconclusive, 0 pass, in this order."""


@dataclass(frozen=True)
class _Edge:
    path: Path
    audit: Audit


_Edges = Mapping[tuple[str, str], _Edge]


def lineage(folders: Sequence[Path]) -> Lineage:
    """The lines that the audits in ``folders`` form.

    Raises:
        OutputError: one is no audit, a pair was audited twice, or they do not form lines of descent.
    """
    edges: dict[tuple[str, str], _Edge] = {}
    models: dict[str, ModelRecord] = {}
    for folder in folders:
        audit = read_audit(folder)
        pair = audit.parent.sha256, audit.successor.sha256
        if pair[0] == pair[1]:
            raise _fault("compares a model with itself", folder, "Leave it out: it is no step.")
        if pair in edges:
            raise _fault(f"compares the same two models as {edges[pair].path}", folder, "Give one of the two.")
        edges[pair] = _Edge(folder, audit)
        for model in (audit.parent, audit.successor):
            models.setdefault(model.sha256, model)
    parents = _parents(edges)
    roots = [model for model in models if model not in parents]
    lines = tuple(_line(root, parents, edges, models) for root in roots)
    verdicts = {edge.audit.verdict for edge in edges.values()}
    return Lineage(
        lines=lines,
        notes=tuple(_notes(lines, edges)),
        exit_code=1 if "flag" in verdicts else 3 if "inconclusive" in verdicts else 0,
    )


def _parents(edges: _Edges) -> dict[str, str]:
    """The model right before each: of those it was audited against, the one furthest from a first ancestor."""
    against: dict[str, list[str]] = defaultdict(list)
    for parent, successor in edges:
        against[successor].append(parent)
    depth: dict[str, int] = {}

    def depth_of(model: str, below: tuple[str, ...] = ()) -> int:
        if model in below:
            path = edges[model, below[-1]].path
            raise _fault("closes a circle: a model would descend from itself", path, "Leave this audit out.")
        if model not in depth:
            depth[model] = 1 + max((depth_of(one, (*below, model)) for one in against[model]), default=-1)
        return depth[model]

    out = {model: max(others, key=depth_of) for model, others in list(against.items()) if depth_of(model)}
    for model, others in against.items():
        ancestors = set()
        at = model
        while at in out:
            at = out[at]
            ancestors.add(at)
        for other in others:
            if other not in ancestors:
                raise _fault(
                    f"gives a model a second parent besides that of {edges[out[model], model].path}",
                    edges[other, model].path,
                    "Give audits against a model's parent and against ancestors of it.",
                )
    return out


def _line(root: str, parents: Mapping[str, str], edges: _Edges, models: Mapping[str, ModelRecord]) -> Line:
    numbers = {root: 0}
    while more := [m for m, parent in parents.items() if parent in numbers and m not in numbers]:
        numbers |= {model: numbers[parents[model]] + 1 for model in more}
    members = sorted(numbers, key=lambda model: numbers[model])
    losses = _losses(root, members, parents, edges)
    return Line(
        first=root,
        generations=tuple(_generation(numbers[m], models[m], parents.get(m), root, edges, losses[m]) for m in members),
    )


def _generation(
    number: int, model: ModelRecord, parent: str | None, root: str, edges: _Edges, loss: float | NotMeasured
) -> Generation:
    own = NotMeasured(reason="it is the first ancestor")
    far = edges.get((root, model.sha256))
    flop = FLOP_PER_PARAMETER * model.parameters
    gain = loss if isinstance(loss, NotMeasured) else math.log(model.d_vocab) - loss
    return Generation(
        number=number,
        model=model,
        parent=parent,
        to_parent=own if parent is None else _distance(edges[parent, model.sha256]),
        to_first=own
        if parent is None
        else _distance(far)
        if far
        else NotMeasured(reason="it was not audited against the first ancestor"),
        loss=loss,
        flop_per_token=flop,
        per_million_parameters=gain if isinstance(gain, NotMeasured) else tidy(gain / (model.parameters / 1e6)),
        per_gigaflop=gain if isinstance(gain, NotMeasured) else tidy(gain / (flop / 1e9)),
    )


def _distance(edge: _Edge) -> Distance:
    return Distance(audit=str(edge.path), row=row_of(edge.audit))


def _losses(
    root: str, members: Sequence[str], parents: Mapping[str, str], edges: _Edges
) -> dict[str, float | NotMeasured]:
    """Loss of every member, from its audit against the first ancestor if there is one; comparable or not at all."""
    used = {m: edges.get((root, m)) or edges[parents[m], m] for m in members if m != root}
    texts = {_text_of(edge.audit) for edge in used.values()}
    if len(texts) > 1:
        reason = NotMeasured(reason="the audits of this line read different text, so losses cannot be compared")
        return dict.fromkeys(members, reason)
    return {m: used[m].audit.drift.loss_successor for m in used} | {
        root: next(edges[pair].audit.drift.loss_parent for pair in edges if pair[0] == root)
    }


def _text_of(audit: Audit) -> tuple[str, int]:
    return audit.provenance.corpus_sha256, audit.coverage.compared_tokens


def _notes(lines: Sequence[Line], edges: _Edges) -> list[str]:
    out = []
    if len(lines) > 1:
        out.append(f"The audits form {len(lines)} lines: between them, an audit is missing or they share no ancestor.")
    missing = [
        g.model.sha256[:12]
        for line in lines
        for g in line.generations
        if g.number > 1 and isinstance(g.to_first, NotMeasured)
    ]
    if missing:
        out.append(
            f"Not audited against the first ancestor: {', '.join(missing)}. Small steps that add up would not be seen."
        )
    vocabularies = [{g.model.d_vocab for g in line.generations} for line in lines]
    if any(len(sizes) > 1 for sizes in vocabularies):
        out.append("Models of a line have vocabularies of different sizes: their losses are per token of their own.")
    policies = {edge.audit.policy.sha256 for edge in edges.values()}
    if len(policies) > 1:
        out.append("The audits were made under different policies, so their verdicts do not mean the same.")
    return out


def _fault(what: str, where: Path, remedy: str) -> OutputError:
    return OutputError(what, where=str(where), remedy=remedy)
