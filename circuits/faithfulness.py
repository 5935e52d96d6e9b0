"""How much of a behaviour a circuit keeps when everything outside it carries something else, over circuit sizes.

    f(C) = ( m(C) − m(∅) ) / ( m(M) − m(∅) )

M is the whole model, ∅ no edge. CPR is the area under f, with edges taken by signed score; CMD the area under |1 − f|,
with edges taken by absolute score (MIB, Mueller et al. 2504.13151). Both are over the **measured** size of the circuits
as a share of all edges, after edges that lie on no path from the embedding to the logits are dropped; published tables
that use the requested share differ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from heredity.interp.model import Model

from .edge_patching import Ablation, CircuitRunner
from .layout import LOGITS, NodeLayout
from .pairs import Metric, Pairs

GRID = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
BOOTSTRAPS = 1000


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its 95 % percentile bootstrap interval over pairs."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """One circuit of a curve."""

    requested: float
    """Share of edges asked for."""
    share: float
    """Share of edges it has."""
    edges: int
    faithfulness: Interval


@dataclass(frozen=True)
class Curve:
    """Faithfulness over sizes."""

    ablation: Ablation
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


def faithfulness_curve(
    model: Model,
    layout: NodeLayout,
    pairs: Pairs,
    metric: Metric,
    scores: Tensor,
    *,
    signed: bool = False,
    ablation: Ablation = "counterfactual",
    grid: Sequence[float] = GRID,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Curve:
    """The curve of circuits taken from ``scores`` [sources, destinations] at shares ``grid`` of all edges.

    Args:
        model, layout, pairs, metric: as elsewhere; use other pairs than those the scores come from.
        scores: of :func:`.edges.attribute_edges`.
        signed: take edges by signed score (for CPR), else by absolute score (for CMD).
        ablation: what edges outside carry.
        grid: shares of all edges asked for.
        seed: of the bootstrap.
        progress: called with circuits done and in all.
    """
    runner = CircuitRunner(model, layout, pairs, metric, ablation)

    def run(circuit: Tensor) -> np.ndarray:
        return runner(circuit).numpy()

    whole, nothing = run(layout.edges), run(torch.zeros_like(layout.edges))
    points = []
    for i, share in enumerate(grid):
        circuit = (
            layout.edges if share >= 1 else top(scores, layout, max(1, round(share * layout.n_edges)), signed=signed)
        )
        values = whole if share >= 1 else run(circuit)
        edges = int(circuit.sum())
        kept = ratio(values - nothing, whole - nothing, seed)
        points.append(Point(share, edges / layout.n_edges, edges, kept))
        if progress is not None:
            progress(i + 1, len(grid))
    return Curve(ablation, signed, tuple(points))


def ratio(above: np.ndarray, below: np.ndarray, seed: int) -> Interval:
    """Σ above / Σ below over pairs (a ratio of means), with its interval."""
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(above), size=(BOOTSTRAPS, len(above)))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = above[draws].sum(1) / below[draws].sum(1)
        estimate = float(above.sum() / below.sum())
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(estimate, float(low), float(high))
