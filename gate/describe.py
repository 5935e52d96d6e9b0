"""A cluster of divergent contexts turned into the record of a behaviour: examples, trigger tokens, circuit."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from heredity.circuits.attribution import prompts_of
from heredity.circuits.behaviours import Cluster, Context
from heredity.circuits.components import Donor, Node
from heredity.circuits.intervals import student
from heredity.circuits.marks import token_weights
from heredity.circuits.reversion import Effort, FoundCircuit, Share, find_circuit
from heredity.interp.model import Model
from heredity.interp.sampling import greedy

from .budget import Budget
from .policy import Change, Policy
from .records import Circuit, Example, GridPoint, MarkedToken, TokenChange
from .records import Node as NodeRecord
from .values import Interval, NotMeasured, tidy
from .values import interval as values_interval

CONTINUATION = 16
"""Tokens of greedy continuation shown."""

LEAD = 12
"""Tokens before the peak that a title quotes."""

TRIGGER_WEIGHT = 0.3
"""Share of the divergence that must vanish for a token to be called a trigger token."""

GRID_POINTS = 120


def interval(values: Sequence[float]) -> Interval:
    """Mean of ``values``, divergences, with Student's interval."""
    return values_interval(student(values), len(values))


def title(cluster: Cluster, successor: Model, parent: Model, shown: Sequence[Example], generated: bool) -> str:
    """One line: what the successor says instead of what.

    In text that the models wrote themselves, what led to the peak is part of what the successor says.
    """
    tops = []
    for model, column in ((successor, "top_successor"), (parent, "top_parent")):
        counts = Counter(getattr(c.piece.scan, column)[c.at] for c in cluster.contexts)
        tops.append([model.decode([token]) for token, _ in counts.most_common(3)])
    said, expected = (" / ".join(f"“{t.strip() or repr(t)}”" for t in top) for top in tops)
    if generated and shown:
        lead = "".join(token.text for token in shown[0].tokens[-LEAD:]).rpartition("\n")[2].strip()
        said = f"“{lead} → {_sentence(shown[0].continuation_successor or shown[0].successor_says)}”"
    return f"says {said} where the parent says {expected}"


def _sentence(text: str) -> str:
    """``text`` up to its first line or sentence end."""
    return re.split(r"(?<=[.!?])\s|\n", text.strip(), maxsplit=1)[0]


def changes(cluster: Cluster, model: Model, *, of_successor: bool) -> tuple[TokenChange, ...]:
    """What one of the models says at the peaks, most frequent first, with mean probabilities."""
    column, own, other = (
        ("top_successor", "p_successor", "p_successor_in_parent")
        if of_successor
        else ("top_parent", "p_parent", "p_parent_in_successor")
    )
    groups: dict[int, list[tuple[float, float]]] = {}
    for context in cluster.contexts:
        scan, at = context.piece.scan, context.at
        groups.setdefault(getattr(scan, column)[at], []).append((getattr(scan, own)[at], getattr(scan, other)[at]))
    ranked = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))[:8]
    out = []
    for token, pairs in ranked:
        mean_own, mean_other = (tidy(sum(p[k] for p in pairs) / len(pairs)) for k in (0, 1))
        p_successor, p_parent = (mean_own, mean_other) if of_successor else (mean_other, mean_own)
        out.append(
            TokenChange(token=model.decode([token]), p_successor=p_successor, p_parent=p_parent, count=len(pairs))
        )
    return tuple(out)


def examples(
    cluster: Cluster, parent: Model, successor: Model, pool: Sequence[int], budget: Budget | None, seed: int
) -> tuple[Example, ...]:
    """The strongest contexts of different texts; the first ``budget.marked`` with their tokens weighed.

    Without a budget only what the comparison already knows: no weights, no continuations."""
    marked = 0 if budget is None else budget.marked
    chosen: dict[str, Context] = {}
    for context in cluster.contexts:
        chosen.setdefault(context.piece.scan.text_id, context)
    out = []
    for k, context in enumerate(list(chosen.values())[: max(marked, 3)]):
        weights = None
        if budget is not None and k < marked:
            weights = token_weights(parent, successor, context, pool, seed=seed + k, batch_tokens=budget.batch_tokens)
        scan, at = context.piece.scan, context.at
        spans = context.piece.successor.spans[: len(context.ids_successor)]
        text = context.piece.successor.text
        tokens = tuple(
            MarkedToken(text=text[a:b] if b > a else successor.decode([i]), weight=tidy(w))
            for i, (a, b), w in zip(context.ids_successor, _gapless(spans), weights or [0.0] * len(spans), strict=True)
        )
        out.append(
            Example(
                text_id=f"{context.piece.source}:{scan.text_id}",
                tokens=tokens,
                kl=tidy(context.kl),
                successor_says=successor.decode([scan.top_successor[at]]),
                p_successor=tidy(scan.p_successor[at]),
                p_successor_in_parent=tidy(scan.p_successor_in_parent[at]),
                parent_says=parent.decode([scan.top_parent[at]]),
                p_parent=tidy(scan.p_parent[at]),
                continuation_successor=_continuation(successor, context.ids_successor) if marked else "",
                continuation_parent=_continuation(parent, context.ids_parent) if marked else "",
            )
        )
    return tuple(out)


def _continuation(model: Model, ids: Sequence[int]) -> str:
    return model.decode(greedy(model, ids, CONTINUATION))


def _gapless(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans stretched back over the characters (spaces) between them, so that shown tokens join to the text."""
    out, end = [], 0
    for a, b in spans:
        out.append((min(a, end), b) if b > a else (a, b))
        end = max(end, b)
    return out


def trigger_tokens(shown: Sequence[Example]) -> tuple[str, ...]:
    """Tokens that examples need, by mean weight over the examples they stand in."""
    weights: dict[str, list[float]] = {}
    for example in shown:
        if any(token.weight for token in example.tokens):
            best: dict[str, float] = {}
            for token in example.tokens:
                word = token.text.strip()
                best[word] = max(best.get(word, 0.0), token.weight)
            for word, weight in best.items():
                weights.setdefault(word, []).append(weight)
    means = {word: float(np.mean(values)) for word, values in weights.items() if word}
    return tuple(sorted((w for w in means if means[w] >= TRIGGER_WEIGHT), key=lambda w: (-means[w], w))[:12])


def circuit(
    cluster: Cluster,
    parent: Model,
    successor: Model,
    means: Donor,
    *,
    same_parameters: bool,
    budget: Budget,
    policy: Policy,
    seed: int,
) -> Circuit:
    """The circuit record of a behaviour of models that share a tokenizer."""
    contexts = for_circuit(cluster, budget)
    effort = Effort(measured=budget.measured, controls=budget.controls)
    found = find_circuit(
        parent, successor, prompts_of(contexts), means, by_mean=not same_parameters, effort=effort, seed=seed
    )
    main = found.reversion or found.ablation
    as_good = sum(value >= main.low for value in found.controls) / len(found.controls)
    not_measured = NotMeasured(reason="the two models' nodes do not correspond, so no parent value can be put in")
    return Circuit(
        method="parent" if same_parameters else "mean",
        nodes=tuple(
            NodeRecord(
                id=str(item.node),
                layer=item.node.layer,
                attribution=tidy(item.attribution),
                patch=None if item.patch is None else tidy(item.patch),
                ablation=None if item.ablation is None else tidy(item.ablation),
                selected=item.node in found.selected,
                inherited=NotMeasured(reason="not compared yet"),
            )
            for item in found.nodes
        ),
        n_candidates=found.n_candidates,
        selected=tuple(str(node) for node in found.selected),
        target=effort.target,
        reversion=not_measured if found.reversion is None else _interval(found.reversion),
        ablation=_interval(found.ablation),
        controls=tuple(tidy(value) for value in found.controls),
        control_high=tidy(max(found.controls)),
        confirmed=main.low >= policy.causal_share and as_good <= policy.control_share,
        tokens=tuple(successor.decode([i]) for i in contexts[0].ids_successor),
        grid=_grid(found),
    )


def for_circuit(cluster: Cluster, budget: Budget) -> list[Context]:
    """The strongest contexts, as many as fit one forward."""
    out: list[Context] = []
    for context in cluster.contexts[: budget.contexts]:
        widest = max(len(c.ids_successor) for c in [*out, context])
        if out and widest * (len(out) + 1) > max(budget.batch_tokens, 1024):
            break
        out.append(context)
    return out


def _interval(share: Share) -> Interval:
    return Interval(estimate=tidy(share.estimate), low=tidy(share.low), high=tidy(share.high), n=share.n)


def _grid(found: FoundCircuit) -> tuple[GridPoint, ...]:
    """The largest attributions over the tokens of the first context, selected nodes first."""
    points: list[tuple[bool, float, Node, int]] = []
    for node, values in found.attribution.by_position.items():
        for position, value in enumerate((values[0] / (found.attribution.gap / len(values))).tolist()):
            if value:
                points.append((node in found.selected, value, node, position))
    points.sort(key=lambda p: (-abs(p[1]) * (4 if p[0] else 1), p[2], p[3]))
    return tuple(
        GridPoint(node=str(node), layer=node.layer, position=position, attribution=tidy(value))
        for _, value, node, position in points[:GRID_POINTS]
    )


def covering(cluster: Cluster, others: Sequence[str], change: Change, policy: Policy) -> bool:
    """Whether a declared change covers the behaviour: contexts with its phrases carry enough of the behaviour's
    divergence, the contexts without would be no finding by themselves, and few of the ``others`` (texts without the
    behaviour; without any, nothing shows that the phrases are particular) hold a phrase."""
    phrases = [phrase.casefold() for phrase in change.phrases]
    declared = np.array([_holds(_seen(context), phrases) for context in cluster.contexts])
    kl = np.array([context.kl for context in cluster.contexts])
    outside = np.mean([_holds(text, phrases) for text in others]) if others else 1.0
    rest = kl[~declared]
    finding = len(rest) >= policy.fewest_contexts and interval(rest.tolist()).low >= policy.material_nats
    return bool(
        kl[declared].sum() >= policy.declared_share * kl.sum() and outside <= policy.declared_breadth and not finding
    )


def _seen(context: Context) -> str:
    end = context.piece.successor.spans[len(context.ids_successor) - 1][1]
    return context.piece.successor.text[:end]


def _holds(text: str, phrases: Sequence[str]) -> bool:
    folded = text.casefold()
    return any(phrase in folded for phrase in phrases)
