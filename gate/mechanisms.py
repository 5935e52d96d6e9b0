"""The stage that compares the two models' circuits of a behaviour: from interventions to records."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from heredity.circuits.attribution import Prompts, prompts_of
from heredity.circuits.behaviours import Cluster
from heredity.circuits.components import Donor, Node, nodes_of
from heredity.circuits.divergence import Window
from heredity.circuits.edge_inheritance import edge_inheritance
from heredity.circuits.inheritance import OUTER, Emergence, Means, emergence, exchanged, mean_writes
from heredity.circuits.intervals import Interval as Measured
from heredity.circuits.matching import Matching, by_identity, match_nodes
from heredity.circuits.reversion import matched
from heredity.circuits.stitch import Stitch, emergence_across, fit, ordinary
from heredity.circuits.stitched_transplant import Carried, Passage, passage, transplant_across
from heredity.circuits.transplant import parents_values, side_effects, transplant
from heredity.interp.capture import batches
from heredity.interp.model import Encoded, Model, pad

from .counterparts import Held, HeldEdge, Mechanisms, Stitching
from .describe import for_circuit
from .records import Circuit
from .values import Estimate, Interval, NotMeasured, interval, tidy

if TYPE_CHECKING:
    from .assemble import Setting

MEAN_TOKENS = 1000
"""Tokens of ordinary text that means are taken over (on large models a quarter)."""
QUIET_TEXTS = 8
"""Texts without the behaviour on which side effects are measured (on large models a third)."""
CONTROLS = 9
"""Random sets beside the transplant and the side effects (on large models, at the quick budget, 2)."""
CONTEXTS, NODES = 4, 5
"""Contexts and nodes on large models, at the quick budget; small ones measure all."""
EDGE_NODES = 8
"""Heads and MLPs among which, and the ends, edges are measured (on large models, at the quick budget, 4)."""
STITCH_TOKENS, LEAST_TOKENS = 4000, 500
"""Of text without the behaviour that a stitch is fitted on, and below which none is."""
LEAST_FORETOLD = 0.5
"""A stitch must keep this much of what nodes do on ordinary text, lower end, before it says that something is new."""

UNFORETOLD = (
    "a linear map from the other model's stream does not keep half of what the parts do on ordinary text either"
)
LOST_ON_THE_WAY = (
    "even all parts of the successor together, carried over by the fitted maps, close less than half of the gap"
)
NOTHING_NEW = NotMeasured(reason="no part does anything here that the other model's would not do in its place")
NO_EFFECT = NotMeasured(reason="its effect was not measured, or cannot be told from none")
EDGELESS = NotMeasured(reason="no node of one architecture runs inside another, so none of its connections does")
QUIETLESS = NotMeasured(reason="no text without any behaviour was read")


class Counterparts:
    """What the behaviours of one audit share: means over ordinary text, and quiet texts."""

    def __init__(
        self, setting: "Setting", items: Sequence[Window], quiet: Sequence[str], means: Callable[[], Donor]
    ) -> None:
        self.s, self.items, self.quiet, self.means = setting, items, quiet, means
        self.level = max(1, setting.sizes.behaviours // 4)

    def of(self, found: Cluster, circuit: Circuit | NotMeasured) -> Mechanisms | NotMeasured:
        """Everything about the two circuits of a behaviour whose circuit in the successor was looked for."""
        if isinstance(circuit, NotMeasured):
            return circuit
        return self._by_identity(found, circuit) if self.s.same_parameters else self._by_function(found, circuit)

    def _by_identity(self, found: Cluster, circuit: Circuit) -> Mechanisms:
        parent, successor, sizes, seed = self.s.parent, self.s.successor, self.s.sizes, self.s.seed
        contexts = for_circuit(found, sizes)
        prompts = prompts_of(contexts if sizes.small else contexts[: CONTEXTS * self.level])
        every = {str(node): node for node in nodes_of(successor)}
        nodes = self._measured(circuit, every)
        new = emergence(successor, parent, prompts, self._means[0], nodes, seed)
        gone = emergence(parent, successor, exchanged(prompts), self._means[1], nodes, seed)
        moved = sorted({*new.carriers(circuit.target), *gone.carriers(circuit.target)})
        rng = np.random.default_rng(seed)
        count = CONTROLS if sizes.small else 2 * self.level
        given = None
        if moved:
            sets = [matched(moved, list(every.values()), rng) for _ in range(count)]
            given = transplant(parent, successor, prompts, moved, sets, seed)
        quiet = self._quiet
        cost = None
        selected = [every[name] for name in circuit.selected]
        if quiet and selected:
            sets = [matched(selected, list(every.values()), rng) for _ in range(count)]
            cost = side_effects(successor, quiet, parents_values(parent, quiet), selected, sets, seed)
        n = len(prompts.last)
        return Mechanisms(
            way="identity",
            successor=_held(new, n, by_identity(successor)),
            parent=_held(gone, n, by_identity(parent)),
            successor_edges=self._edges(successor, parent, prompts, self._means[0], new),
            parent_edges=self._edges(parent, successor, exchanged(prompts), self._means[1], gone),
            emergent=_estimate(new.share, n, "successor"),
            lost=_estimate(gone.share, n, "parent"),
            transplanted=tuple(map(str, moved)),
            transplant=interval(given.own, n) if given else NOTHING_NEW,
            transplant_controls=tuple(map(tidy, given.controls)) if given else (),
            side_effects=interval(cost.own, sum(len(tokens) for tokens, _ in quiet)) if cost else QUIETLESS,
            side_effect_controls=tuple(map(tidy, cost.controls)) if cost else (),
            stitches=(),
        )

    def _edges(
        self, model: Model, other: Model, prompts: Prompts, means: Means, found: Emergence
    ) -> tuple[HeldEdge, ...]:
        """Those among the strongest nodes of a circuit and its ends; exchanged models give the other's circuit."""
        ranked = sorted(found.nodes, key=lambda each: (-each.effect.estimate, each.node))
        inside = [each.node for each in ranked if each.inherited is not None]
        ends = [node for node in inside if node.kind in OUTER]
        most = EDGE_NODES if self.s.sizes.small else EDGE_NODES // 2 * self.level
        strongest = [node for node in inside if node.kind not in OUTER][:most]
        edges = edge_inheritance(model, other, prompts, means, sorted([*ends, *strongest]), self.s.seed)
        n = len(prompts.last)
        return tuple(
            HeldEdge(
                source=str(edge.source),
                target=str(edge.target),
                effect=interval(edge.effect, n),
                inherited=interval(edge.inherited, n),
            )
            for edge in edges
            if edge.inherited is not None
        )

    def _by_function(self, found: Cluster, circuit: Circuit) -> Mechanisms | NotMeasured:
        successor, sizes, seed = self.s.successor, self.s.sizes, self.s.seed
        if not self._stitches:
            return NotMeasured(reason="too little text without any behaviour to fit a stitch between the models on")
        contexts = for_circuit(found, sizes)
        prompts = prompts_of(contexts if sizes.small else contexts[: CONTEXTS * self.level])
        n = len(prompts.last)
        sides = []
        for who, (model, other, stitch, quality), at, matching in zip(
            ("successor", "parent"),
            self._stitches,
            (prompts, exchanged(prompts)),
            (self._matching, self._matching.exchanged()),
            strict=True,
        ):
            measured = emergence_across(model, other, at, stitch, seed)
            share = _estimate(measured.share, n, who)
            if isinstance(quality.ordinary, NotMeasured) or quality.ordinary.low < LEAST_FORETOLD:
                share = NotMeasured(reason=UNFORETOLD)
            sides.append((measured, share, matching))
        (new, emergent, matching), (gone, lost, turned) = sides
        quiet, cost = self._quiet, None
        every = {str(node): node for node in nodes_of(successor)}
        inner = [node for node in every.values() if node.kind in ("head", "mlp")]
        selected = [every[name] for name in circuit.selected]
        rng = np.random.default_rng(seed)
        count = CONTROLS if sizes.small else 2 * self.level
        given: Carried | NotMeasured = emergent if isinstance(emergent, NotMeasured) else NOTHING_NEW
        if new.carriers(1.0) and isinstance(emergent, Interval):
            given = transplant_across(
                self.s.parent,
                successor,
                prompts,
                circuit.target,
                lambda moved: [matched(moved, inner, rng) for _ in range(count)],
                self._stitches[0][2],
                self._passage,
                seed,
            )
            if given.most.low < LEAST_FORETOLD:
                given = NotMeasured(reason=LOST_ON_THE_WAY)
        if quiet and selected:
            sets = [matched(selected, inner, rng) for _ in range(count)]
            cost = side_effects(successor, quiet, [self.means()] * len(quiet), selected, sets, seed)
        return Mechanisms(
            way="function",
            successor=_held(new, n, matching, trusted=isinstance(emergent, Interval)),
            parent=_held(gone, n, turned, trusted=isinstance(lost, Interval)),
            successor_edges=EDGELESS,
            parent_edges=EDGELESS,
            emergent=emergent,
            lost=lost,
            transplanted=tuple(map(str, given.nodes)) if isinstance(given, Carried) else (),
            transplant=interval(given.share.own, n) if isinstance(given, Carried) else given,
            transplant_controls=tuple(map(tidy, given.share.controls)) if isinstance(given, Carried) else (),
            side_effects=interval(cost.own, sum(len(tokens) for tokens, _ in quiet)) if cost else QUIETLESS,
            side_effect_controls=tuple(map(tidy, cost.controls)) if cost else (),
            stitches=tuple(quality for _, _, _, quality in self._stitches),
        )

    @cached_property
    def _stitch_texts(self) -> list[tuple[Tensor, Tensor]]:
        """Text without the behaviour, of enough tokens; empty where there are too few."""
        s = self.s
        few, tokens = [], 0
        for text in self.quiet:
            few.append(s.successor.encode(text))
            tokens += len(few[-1].ids)
            if tokens >= STITCH_TOKENS:
                break
        return _in_order(few, s.sizes.batch_tokens) if tokens >= LEAST_TOKENS else []

    @cached_property
    def _passage(self) -> Passage:
        return passage(self.s.successor, self.s.parent, self._stitch_texts)

    @cached_property
    def _stitches(self) -> tuple[tuple[Model, Model, Stitch, Stitching], ...]:
        """Of the successor's nodes from the parent's stream, and the other way; fitted where nothing is new."""
        s, texts = self.s, self._stitch_texts
        if not texts:
            return ()
        out = []
        for model, other in ((s.successor, s.parent), (s.parent, s.successor)):
            nodes = [node for node in nodes_of(model) if node.kind in ("head", "mlp")]
            stitch = fit(model, other, texts, nodes)
            at = ordinary(model, texts[-max(1, len(texts) // 5) :], s.seed)
            kept = emergence_across(model, other, at, stitch, s.seed)
            share = _turned(_estimate(kept.share, len(at.last), "model"))
            out.append((model, other, stitch, Stitching(r2=tidy(stitch.r2), ordinary=share)))
        return tuple(out)

    @cached_property
    def _matching(self) -> Matching:
        return match_nodes(self.s.parent, self.s.successor, self.quiet)

    def _measured(self, circuit: Circuit, every: dict[str, Node]) -> list[Node]:
        """All nodes of a small model; else the circuit's, those ranked next, and both ends of the model."""
        if self.s.sizes.small:
            return list(every.values())
        ranked = [*circuit.selected, *(node.id for node in circuit.nodes)]
        inner = [name for name in dict.fromkeys(ranked) if name not in ("embed", "unembed")]
        return sorted(every[name] for name in ["embed", *inner[: NODES * self.level], "unembed"])

    @cached_property
    def _means(self) -> tuple[Means, Means]:
        s = self.s
        few, tokens = [], 0
        for item in self.items:
            few.append(item.successor)
            tokens += len(item.successor.ids)
            if tokens >= MEAN_TOKENS // (1 if s.sizes.small else 4):
                break
        text = _padded(few, s.sizes.batch_tokens)
        nodes = nodes_of(s.successor)
        return (
            mean_writes(s.successor, s.parent, text, nodes),
            mean_writes(s.parent, s.successor, text, nodes),
        )

    @cached_property
    def _quiet(self) -> list[tuple[Tensor, Tensor]]:
        s = self.s
        few = [s.successor.encode(text) for text in self.quiet[: QUIET_TEXTS // (1 if s.sizes.small else 3)]]
        return _padded(few, s.sizes.batch_tokens)


def shares(found: Mechanisms | NotMeasured) -> dict[str, Estimate]:
    """The fields ``inherited``, ``lost`` and ``emergent`` of a behaviour."""
    if isinstance(found, NotMeasured):
        return {"inherited": found, "lost": found, "emergent": found}
    return {"inherited": _turned(found.emergent), "lost": found.lost, "emergent": found.emergent}


def _turned(share: Interval | NotMeasured) -> Interval | NotMeasured:
    """One minus a share."""
    if isinstance(share, NotMeasured):
        return share
    turned = {"estimate": 1 - share.estimate, "low": 1 - share.high, "high": 1 - share.low}
    return share.model_copy(update={name: tidy(value) for name, value in turned.items()})


def with_inherited(circuit: Circuit | NotMeasured, found: Mechanisms | NotMeasured) -> Circuit | NotMeasured:
    """``circuit`` with what is known of each of its nodes' inheritance."""
    if isinstance(circuit, NotMeasured):
        return circuit
    known = {} if isinstance(found, NotMeasured) else {held.id: held.inherited for held in found.successor}
    reason = found if isinstance(found, NotMeasured) else NO_EFFECT
    nodes = [node.model_copy(update={"inherited": known.get(node.id, reason)}) for node in circuit.nodes]
    return circuit.model_copy(update={"nodes": tuple(nodes)})


def _padded(texts: Sequence[Encoded], most: int) -> list[tuple[Tensor, Tensor]]:
    return [pad([texts[i].ids for i in group]) for group in batches(texts, most)]


def _in_order(texts: Sequence[Encoded], most: int) -> list[tuple[Tensor, Tensor]]:
    """As :func:`_padded`, without sorting by length: the last are no other kind of text than the first."""
    each = max(1, most // max(len(text.ids) for text in texts))
    return [pad([text.ids for text in texts[i : i + each]]) for i in range(0, len(texts), each)]


def _held(found: Emergence, n: int, matching: Matching, *, trusted: bool = True) -> tuple[Held, ...]:
    inside = [each for each in found.nodes if each.inherited is not None]
    inside.sort(key=lambda each: (-each.effect.estimate, each.node))
    out = []
    for each in inside:
        assert each.inherited is not None
        match = matching.in_parent(str(each.node))
        outer = matching.way == "identity" and each.node.kind in OUTER
        out.append(
            Held(
                id=str(each.node),
                counterpart=str(each.node) if outer else match.parent if match else None,
                similarity=tidy(match.similarity) if match and matching.way != "identity" else None,
                effect=interval(each.effect, n),
                inherited=interval(each.inherited, n) if trusted else NotMeasured(reason=UNFORETOLD),
            )
        )
    return tuple(out)


def _estimate(share: Measured | None, n: int, model: str) -> Interval | NotMeasured:
    if share is None:
        return NotMeasured(reason=f"no part of the {model} has an effect here that can be told from none")
    return interval(share, n)
