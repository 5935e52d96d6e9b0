"""From a task to a circuit with its evidence, in steps that can be recalled.

Edges are scored and the circuit's size is chosen on one half of the prompts; everything said of the circuit is measured
on the other half.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from heredity.interp.model import Model

from .circuit_record import (
    Attribution,
    CircuitRecord,
    CurveRecord,
    Edge,
    GridPoint,
    ModelAbout,
    Node,
    Proof,
    Sizes,
    TaskAbout,
)
from .edge_patching import Ablation, CircuitRunner, patch_edges
from .edges import Method, attribute_edges
from .faithfulness import Faithfulness, faithfulness_curve, smallest, top
from .intervals import mean
from .layout import NodeLayout, layout_of
from .necessity import complement, minimality, missed
from .node_patching import patch_nodes
from .stability import stability
from .tasks import Prepared, Task, prepare, screen

CONFIRMED_EDGES = 20
"""Edges of largest absolute score that are re-measured."""
CONFIRMED_NODES = 16
"""Nodes of largest absolute score that are re-measured."""
_SHOWN = 0.01
"""Share of the largest attribution from which a node has a point at a position."""

Progress = Callable[[str, int, int], None]
"""(stage, done, total)"""


@runtime_checkable
class Steps(Protocol):
    """Runs or recalls named steps."""

    def step(self, name: str, compute: Callable[[], Any]) -> Any:
        """A JSON value."""
        ...

    def arrays(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Named arrays."""
        ...


class Unkept:
    """Steps that run every time."""

    def step(self, name: str, compute: Callable[[], Any]) -> Any:
        """What ``compute`` returns, as JSON would give it back."""
        return json.loads(json.dumps(compute()))

    def arrays(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``compute`` returns."""
        return compute()


@dataclasses.dataclass(frozen=True)
class Discovered:
    """The record of a circuit, and its arrays.

    Attributes:
        record: what was found; its digest of the arrays is filled in when it is saved.
        scores: float64 [sources, destinations].
        circuit: bool, likewise.
    """

    record: CircuitRecord
    scores: np.ndarray
    circuit: np.ndarray


def discover(
    model: Model,
    task: Task,
    *,
    pairs: int = 64,
    method: Method = "eap-ig",
    target: float = 0.8,
    tolerance: float = 0.02,
    seed: int = 0,
    steps: Steps | None = None,
    progress: Progress | None = None,
) -> Discovered:
    """Find the circuit of ``task`` in ``model`` and measure what it is worth.

    Args:
        model: the model.
        task: of :func:`.tasks.load_task`.
        pairs: prompts in both halves together.
        method: how edges are scored.
        target: faithfulness that the circuit is to reach on the discovery half.
        tolerance: largest miss of completeness.
        seed: of prompts, intervals and random sets.
        steps: recalls what an interrupted run did.
        progress: called with (stage, done, total).

    Raises:
        TaskError: the task does not fit the tokenizer, or the model does not do it.
        ModelError: the architecture's edges cannot be told apart.
    """
    started = time.monotonic()
    run = _Discovery(model, prepare(model, task, max(1, pairs // 2), seed=seed), seed, steps or Unkept(), progress)
    task_about = run.screened()
    scores, parts, places, attribution = run.attributed(method, tolerance)
    size = run.sized(scores, target)
    circuit = top(scores, run.layout, size)
    curves = tuple(run.curve(scores, kind) for kind in ("CMD", "CPR"))
    proof = run.proven(scores, circuit, parts, size)
    nodes, edges, others = run.confirmed(scores, circuit, task_about.effect.estimate)
    first = run.prepared.discovery.pairs
    record = CircuitRecord(
        model=ModelAbout(
            spec=model.spec, architecture=model.shape.architecture, sha256=model.digest, n_params=model.n_params
        ),
        task=task_about,
        attribution=attribution,
        sizes=Sizes(**{field.name: getattr(run.layout, field.name) for field in dataclasses.fields(NodeLayout)}),
        target=target,
        requested=size,
        size=int(circuit.sum()),
        share=int(circuit.sum()) / run.layout.n_edges,
        proof=proof,
        curves=curves,
        nodes=nodes,
        edges=edges,
        others=others,
        tokens=tuple(model.decode([token]) for token in first.clean[0, : int(first.last[0]) + 1].tolist()),
        grid=_grid(run.layout, places, {node.name for node in nodes}),
        seed=seed,
        arrays_sha256="",
        seconds=round(time.monotonic() - started, 1),
        versions={name: importlib.metadata.version(name) for name in ("heredity", "torch", "transformers")},
    )
    return Discovered(record, scores.numpy(), circuit.numpy())


class _Discovery:
    """The steps over one prepared task."""

    def __init__(self, model: Model, prepared: Prepared, seed: int, steps: Steps, progress: Progress | None) -> None:
        self.model, self.prepared, self.seed, self.steps, self._progress = model, prepared, seed, steps, progress
        self.layout = layout_of(model)
        self._testing: Faithfulness | None = None

    def bar(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self._progress(stage, done, total) if self._progress else None

    @property
    def testing(self) -> Faithfulness:
        """Faithfulness on the testing half, what it needs computed once."""
        if self._testing is None:
            self._testing = self._faithfulness("testing", "counterfactual")
        return self._testing

    def _faithfulness(self, half: str, ablation: Ablation) -> Faithfulness:
        own = getattr(self.prepared, half)
        return Faithfulness(CircuitRunner(self.model, self.layout, own.pairs, own.metric, ablation), self.seed)

    def screened(self) -> TaskAbout:
        """How well the model does both halves."""
        task, halves = self.prepared.task, (self.prepared.discovery, self.prepared.testing)
        found = self.steps.step(
            "screen", lambda: [dataclasses.asdict(screen(self.model, task, half, seed=self.seed)) for half in halves]
        )
        whole = hashlib.sha256()
        for half in halves:
            for array in (half.pairs.clean, half.pairs.corrupt, half.pairs.last):
                whole.update(array.numpy().tobytes())
        known = [one["accuracy"] for one in found]
        return TaskAbout(
            name=task.name,
            about=task.about,
            sha256=task.sha256,
            metric=task.metric,
            discovery_pairs=len(halves[0].pairs),
            testing_pairs=len(halves[1].pairs),
            data_sha256=whole.hexdigest(),
            dropped=self.prepared.dropped,
            accuracy=None if None in known else sum(known) / len(known),
            clean=found[1]["clean"],
            corrupt=found[1]["corrupt"],
            effect=found[1]["effect"],
            examples=tuple((example.clean, example.counterfactual) for example in halves[0].examples[:4]),
        )

    def attributed(self, method: Method, tolerance: float) -> tuple[Tensor, Tensor, Tensor, Attribution]:
        """Scores, scores by pair, and scores by position of the first pair."""
        half = self.prepared.discovery

        def compute() -> dict[str, Tensor]:
            found = attribute_edges(
                self.model,
                half.pairs,
                half.metric,
                method=method,
                tolerance=tolerance,
                parts=True,
                progress=self.bar("attribution"),
            )
            assert found.parts is not None and found.places is not None
            about = torch.tensor([found.steps, found.completeness], dtype=torch.float64)
            return {"scores": found.scores, "parts": found.parts, "places": found.places, "about": about}

        found = self.steps.arrays("attribution", compute)
        steps, completeness = found["about"].tolist()
        about = Attribution(method=method, steps=int(steps), completeness=completeness, tolerance=tolerance)
        return found["scores"], found["parts"], found["places"], about

    def sized(self, scores: Tensor, target: float) -> int:
        """How many edges reach the target on the discovery half."""

        def compute() -> int:
            bar = self.bar("size")
            bar(0, 1)
            size, _ = smallest(self._faithfulness("discovery", "counterfactual"), scores, target)
            bar(1, 1)
            return size

        return self.steps.step("size", compute)

    def curve(self, scores: Tensor, kind: str) -> CurveRecord:
        """A faithfulness curve on the testing half."""

        def compute() -> dict[str, Any]:
            curve = faithfulness_curve(self.testing, scores, signed=kind == "CPR", progress=self.bar(f"{kind} curve"))
            return {"kind": kind, "area": curve.area, "curve": dataclasses.asdict(curve)}

        return CurveRecord.model_validate(self.steps.step(f"curve-{kind}", compute))

    def proven(self, scores: Tensor, circuit: Tensor, parts: Tensor, size: int) -> Proof:
        """What the circuit keeps, leaves out and could do without."""
        bar = self.bar("proof")
        tests: dict[str, Callable[[], Any]] = {
            "faithfulness": lambda: self.testing(circuit),
            "faithfulness_mean": lambda: self._faithfulness("testing", "mean")(circuit),
            "faithfulness_zero": lambda: self._faithfulness("testing", "zero")(circuit),
            "complement": lambda: complement(self.testing, circuit),
            "minimality": lambda: minimality(self.testing, circuit, scores),
            "missed": lambda: missed(self.testing, circuit, seed=self.seed),
            "stability": lambda: stability(parts, self.layout, size, seed=self.seed),
        }
        found: dict[str, Any] = {}
        for i, (name, test) in enumerate(tests.items(), 1):
            found[name] = self.steps.step(name, lambda test=test: _plain(test()))
            bar(i, len(tests))
        return Proof.model_validate(found)

    def confirmed(
        self, scores: Tensor, circuit: Tensor, effect: float
    ) -> tuple[tuple[Node, ...], tuple[Edge, ...], tuple[Edge, ...]]:
        """Nodes and edges, the top ones of each with what exchanging them does."""
        layout, half = self.layout, self.prepared.testing
        totals = scores.sum(1)
        width = scores.shape[1]
        ranked = scores.abs().masked_fill(~layout.edges, -1).flatten().argsort(descending=True)
        edges = [divmod(int(k), width) for k in ranked[: min(CONFIRMED_EDGES, layout.n_edges)]]
        nodes = totals.abs().argsort(descending=True)[:CONFIRMED_NODES].tolist()
        bar = self.bar("confirmation")

        def again(name: str, compute: Callable[[], Tensor]) -> list[dict[str, float]]:
            return self.steps.step(
                name, lambda: [dataclasses.asdict(mean(own, self.seed)) for own in compute().numpy()]
            )

        bar(0, 2)
        by_edge = again("confirm-edges", lambda: patch_edges(self.model, layout, half.pairs, half.metric, edges))
        bar(1, 2)
        by_node = again("confirm-nodes", lambda: patch_nodes(self.model, layout, half.pairs, half.metric, nodes))
        bar(2, 2)
        seen_edges = dict(zip(edges, by_edge, strict=True))
        seen_nodes = dict(zip(nodes, by_node, strict=True))

        def edge(k: int) -> Edge:
            row, column = divmod(k, width)
            value = float(scores[row, column])
            return Edge(
                source=layout.sources[row],
                destination=layout.destinations[column],
                score=value,
                **_measured(value, seen_edges.get((row, column))),
            )

        inside = [k for k in ranked[: layout.n_edges].tolist() if circuit.view(-1)[k]]
        outside = [row * width + column for row, column in edges if not circuit[row, column]]
        found = []
        for row in circuit.any(1).nonzero().flatten().tolist():
            value, again_measured = float(totals[row]), _measured(float(totals[row]), seen_nodes.get(row))
            share = None if row not in seen_nodes else seen_nodes[row]["estimate"] / effect
            name = layout.sources[row]
            found.append(Node(name=name, layer=layer_of(name), attribution=value, share=share, **again_measured))
        return tuple(found), tuple(map(edge, inside)), tuple(map(edge, outside))


def layer_of(name: str) -> int:
    """Layer of a source, −1 for the embedding."""
    place = name.partition("@")[2]
    return int(place.split(".")[0]) if place else -1


def _measured(score: float, again: dict[str, float] | None) -> dict[str, Any]:
    if again is None:
        return {}
    low, high = again["low"], again["high"]
    return {"effect": again["estimate"], "low": low, "high": high, "confirmed": low > 0 if score > 0 else high < 0}


def _grid(layout: NodeLayout, places: Tensor, names: set[str]) -> tuple[GridPoint, ...]:
    least = _SHOWN * float(places.abs().max())
    return tuple(
        GridPoint(
            node=layout.sources[row],
            layer=layer_of(layout.sources[row]),
            position=position,
            attribution=float(places[row, position]),
        )
        for row, position in (places.abs() >= max(least, 1e-30)).nonzero().tolist()
        if layout.sources[row] in names
    )


def _plain(value: Any) -> Any:
    return [dataclasses.asdict(one) for one in value] if isinstance(value, tuple) else dataclasses.asdict(value)
