"""How much of a behaviour a circuit keeps when everything outside it carries something else, over circuit sizes.

    f(C) = ( m(C) − m(∅) ) / ( m(M) − m(∅) )

M is the whole model, ∅ no edge; a circuit of nodes has all edges out of them. CPR is the area under f, with edges
taken by signed score; CMD the area under |1 − f|, with edges taken by absolute score (MIB, Mueller et al. 2504.13151).
Both are over the **measured** size of the circuits as a share of all edges, after edges that lie on no path from the
embedding to the logits are dropped; published tables that use the requested share differ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .edge_patching import Ablation, CircuitRunner
from .intervals import Interval, ratio
from .layout import LOGITS, NodeLayout

Unit = Literal["edges", "nodes"]
GRID = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Point:
    """One circuit of a curve."""

    requested: float
    """Share of edges or nodes asked for."""
    share: float
    """Share it has."""
    size: int
    """Edges or nodes it has."""
    faithfulness: Interval


@dataclass(frozen=True)
class Curve:
    """Faithfulness over sizes."""

    ablation: Ablation
    unit: Unit
    signed: bool
    points: tuple[Point, ...]

    @property
    def area(self) -> float:
        """CPR if edges were taken by signed score, CMD otherwise: the trapezoid over measured shares, from 0 to 1."""
        at = np.array([0.0, *(p.share for p in self.points)])
        f = np.array([0.0, *(p.faithfulness.estimate for p in self.points)])
        height = f if self.signed else np.abs(1 - f)
        order = np.argsort(at, kind="stable")
        return float(np.trapezoid(height[order], at[order]))


def top(scores: Tensor, layout: NodeLayout, n: int, *, signed: bool = False) -> Tensor:
    """The ``n`` edges of largest score (absolute unless ``signed``) that lie on a path, bool [sources, destinations].

    Edges on no path from the embedding to the logits are dropped, so there may be fewer.
    """
    height = (scores if signed else scores.abs()).masked_fill(~layout.edges, -torch.inf)
    chosen = torch.zeros_like(layout.edges)
    best = height.flatten().topk(min(n, layout.n_edges)).indices
    chosen.view(-1)[best] = True
    return connected(chosen & layout.edges, layout)


def top_nodes(scores: Tensor, layout: NodeLayout, n: int, *, signed: bool = False) -> Tensor:
    """All edges out of the ``n`` sources of largest summed score, bool [sources, destinations]."""
    height = scores.sum(1) if signed else scores.sum(1).abs()
    circuit = torch.zeros_like(layout.edges)
    circuit[height.topk(min(n, len(height))).indices] = True
    return circuit & layout.edges


def connected(circuit: Tensor, layout: NodeLayout) -> Tensor:
    """The edges of ``circuit`` that lie on a path from the embedding to the logits within it.

    Others change nothing when the rest carries counterfactual values: what has no input in the circuit computes the
    counterfactual's value, and what leads nowhere is not seen.
    """
    circuit = circuit.clone()
    owners = {name: layout.owner(name) for name in layout.destinations}
    fed: dict[str, list[int]] = {name: [] for name in layout.sources}
    for column, name in enumerate(layout.destinations):
        owner = owners[name]
        for source in (owner,) if isinstance(owner, str) else owner:
            if source != LOGITS:
                fed[source].append(column)
    columns = {row: fed[name] for row, name in enumerate(layout.sources)}
    # A head needs an input that is fed; sources come after their inputs, so one pass each way is enough.
    for row in range(1, len(layout.sources)):
        if not circuit[:, columns[row]].any():
            circuit[row] = False
    for row in reversed(range(1, len(layout.sources))):
        if circuit[row].any():
            continue
        for column in columns[row]:
            owner = owners[layout.destinations[column]]
            others = () if isinstance(owner, str) else owner
            # A shared key or value still leads somewhere while another head of its group does.
            if not any(circuit[layout.source_index[other]].any() for other in others):
                circuit[:, column] = False
    return circuit


class Faithfulness:
    """f of circuits on the same pairs.

    Args:
        runner: measures them.
        seed: of the bootstrap over pairs.

    Attributes:
        whole, nothing: the metric with all edges and with none, float64 [N].
    """

    def __init__(self, runner: CircuitRunner, seed: int = 0) -> None:
        self.runner, self.seed, self.layout = runner, seed, runner.layout
        self.whole = runner(self.layout.edges)
        self.nothing = runner(torch.zeros_like(self.layout.edges))

    def __call__(self, circuit: Tensor) -> Interval:
        """f(C) of edges ``circuit`` [sources, destinations]."""
        return self.of(self.runner(circuit))

    def of(self, values: Tensor) -> Interval:
        """f, given the metric with the circuit, float64 [N]."""
        return self.share(values - self.nothing)

    def share(self, change: Tensor) -> Interval:
        """A change of the metric, float64 [N], as a share of m(M) − m(∅)."""
        return ratio(change.numpy(), (self.whole - self.nothing).numpy(), self.seed)


def faithfulness_curve(
    faithfulness: Faithfulness,
    scores: Tensor,
    *,
    signed: bool = False,
    unit: Unit = "edges",
    grid: Sequence[float] = GRID,
    progress: Callable[[int, int], None] | None = None,
) -> Curve:
    """The curve of circuits taken from ``scores`` [sources, destinations] at shares ``grid`` of all edges or nodes.

    Args:
        faithfulness: of pairs other than those the scores come from.
        scores: of :func:`.edges.attribute_edges`.
        signed: take edges by signed score (for CPR), else by absolute score (for CMD).
        unit: what circuits are made of.
        grid: shares asked for.
        progress: called with circuits done and in all.
    """
    layout = faithfulness.layout
    total = layout.n_edges if unit == "edges" else len(layout.sources)
    points = []
    for i, share in enumerate(grid):
        n = max(1, round(share * total))
        if share >= 1:
            circuit, kept = layout.edges, faithfulness.of(faithfulness.whole)
        else:
            circuit = (top if unit == "edges" else top_nodes)(scores, layout, n, signed=signed)
            kept = faithfulness(circuit)
        size = int(circuit.sum()) if unit == "edges" else int(circuit.any(1).sum())
        points.append(Point(share, size / total, size, kept))
        if progress is not None:
            progress(i + 1, len(grid))
    return Curve(faithfulness.runner.ablation, unit, signed, tuple(points))


def smallest(
    faithfulness: Faithfulness, scores: Tensor, target: float, *, precision: float = 1.05
) -> tuple[int, Tensor]:
    """How many edges of largest absolute score it takes for f ≥ ``target``, and the circuit, by bisection.

    Faithfulness need not grow with size; what is found is a size that reaches the target while one smaller by the
    factor ``precision`` does not. All edges where nothing less reaches it.
    """
    layout = faithfulness.layout
    low, high, circuit = 0, layout.n_edges, layout.edges
    while high - low > 1 and high > precision * low:
        n = round((max(low, 1) * high) ** 0.5)
        n = min(max(n, low + 1), high - 1)
        tried = top(scores, layout, n)
        if faithfulness(tried).estimate >= target:
            high, circuit = n, tried
        else:
            low = n
    return high, circuit
