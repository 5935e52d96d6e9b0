"""The causal check: put other values into nodes of the successor and see how much of KL(S‖P) vanishes.

The ranking comes from attribution; everything reported here comes from real interventions on the running model.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from heredity.interp.model import Model

from .attribution import Attribution, Prompts, attribute
from .components import Donor, Node, nodes_of, patched_logits, run_donor
from .writes import check_additive

BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Share:
    """Share of the gap closed, with a percentile bootstrap interval over contexts."""

    estimate: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class MeasuredNode:
    """One node with what was expected of it and what was measured (None: not measured)."""

    node: Node
    attribution: float
    patch: float | None
    ablation: float | None


@dataclass(frozen=True)
class FoundCircuit:
    """The smallest set found, and what it does."""

    method: str
    nodes: tuple[MeasuredNode, ...]
    n_candidates: int
    selected: tuple[Node, ...]
    reversion: Share | None
    ablation: Share
    controls: tuple[float, ...]
    attribution: Attribution


@dataclass(frozen=True)
class Effort:
    """How much is measured: nodes one by one, and random control sets."""

    measured: int
    controls: int
    target: float = 0.85
    """Share of the gap the set must close on the contexts it is chosen on."""


class Bench:
    """Contexts on which sets of nodes are replaced; the parent's predictions and donor values are computed once."""

    def __init__(self, parent: Model, successor: Model, prompts: Prompts, donor: Donor | None) -> None:
        self.successor, self.prompts = successor, prompts
        self.donor = donor or run_donor(parent, prompts.tokens)
        with torch.inference_mode():
            self.target = self._log_probs(parent.logits(prompts.tokens))
        self.base = self.remaining(())

    def remaining(self, replaced: Collection[Node]) -> np.ndarray:
        """KL(S with ``replaced`` exchanged ‖ P) at the diverging position of every context, nats."""
        with torch.inference_mode():
            log_s = self._log_probs(patched_logits(self.successor, self.prompts.tokens, replaced, self.donor))
            size = min(log_s.shape[1], self.target.shape[1])
            kl = (log_s[:, :size].exp() * (log_s[:, :size] - self.target[:, :size])).sum(-1)
        return kl.clamp_min(0).double().numpy()

    def closed(self, replaced: Collection[Node]) -> float:
        """Share of the summed gap that exchanging ``replaced`` closes."""
        return float(1 - self.remaining(replaced).sum() / self.base.sum())

    def share(self, replaced: Collection[Node], rng: np.random.Generator) -> Share:
        """:meth:`closed` with its interval."""
        left, n = self.remaining(replaced), len(self.base)
        draws = rng.integers(n, size=(BOOTSTRAPS, n))
        ratios = 1 - left[draws].sum(1) / self.base[draws].sum(1)
        low, high = np.quantile(ratios, [0.025, 0.975])
        return Share(float(1 - left.sum() / self.base.sum()), float(low), float(high), n)

    def _log_probs(self, logits: Tensor) -> Tensor:
        return torch.log_softmax(logits[self.prompts.rows, self.prompts.last].float(), -1)


def find_circuit(
    parent: Model, successor: Model, prompts: Prompts, means: Donor, *, by_mean: bool, effort: Effort, seed: int
) -> FoundCircuit:
    """Rank, re-measure, take the smallest set found that closes the target share, and compare with random sets.

    ``by_mean`` replaces by means (for models whose nodes do not correspond); otherwise by the parent's values.

    Raises:
        ModelError: the successor's architecture has parts that cannot be exchanged one by one.
    """
    check_additive(successor)
    rng = np.random.default_rng(seed)
    found = attribute(parent, successor, prompts, means if by_mean else None)
    main = Bench(parent, successor, prompts, means if by_mean else None)
    other = None if by_mean else Bench(parent, successor, prompts, means)
    candidates = sorted(found.moved, key=lambda node: (-found.share(node), node))
    unembedding = nodes_of(successor)[-1]
    if not by_mean:
        candidates.append(unembedding)
    single = {node: main.closed([node]) for node in [*candidates[: effort.measured], *candidates[-1:]]}
    ranked = sorted(candidates, key=lambda node: (-single.get(node, -1.0), -found.share(node), node))
    # Measured nodes that help come first, then unmeasured ones by attribution, then measured ones that harm.
    ranked.sort(key=lambda node: 0 if single.get(node, -1.0) > 0 else 1 if node not in single else 2)
    selected = _smallest(main, ranked, effort.target)
    shown = [*selected, *(node for node in ranked if node not in selected)][:60]
    can_ablate = (other or main).donor.values
    measured = []
    for k, node in enumerate(shown):
        ablation = single.get(node) if by_mean else None
        if other is not None and k < effort.measured and node.kind in ("head", "mlp") and can_ablate:
            ablation = other.closed([node])
        measured.append(MeasuredNode(node, found.share(node), None if by_mean else single.get(node), ablation))
    ablated = [node for node in selected if node.kind in ("head", "mlp")]
    return FoundCircuit(
        method="mean" if by_mean else "parent",
        nodes=tuple(measured),
        n_candidates=len(candidates),
        selected=tuple(sorted(selected)),
        reversion=None if by_mean else main.share(selected, rng),
        ablation=(other or main).share(ablated, rng),
        controls=tuple(main.closed(matched(selected, candidates, rng)) for _ in range(effort.controls)),
        attribution=found,
    )


def _smallest(bench: Bench, ranked: Sequence[Node], target: float) -> list[Node]:
    """The shortest prefix of ``ranked`` that closes ``target``, then without the nodes it does not need.

    Prefix lengths are searched by doubling and bisection, which finds the shortest one where the share grows with
    the prefix; the result is a set that reaches the target, not provably the smallest.
    """
    low, high = 0, 1
    while high < len(ranked) and bench.closed(ranked[:high]) < target:
        low, high = high, high * 2
    high = min(high, len(ranked))
    while high - low > 1:
        middle = (low + high) // 2
        if bench.closed(ranked[:middle]) >= target:
            high = middle
        else:
            low = middle
    kept = list(ranked[:high])
    if len(kept) <= 24:
        for node in reversed(ranked[:high]):
            fewer = [other for other in kept if other != node]
            if fewer and bench.closed(fewer) >= target:
                kept = fewer
    return kept


def matched(selected: Sequence[Node], candidates: Sequence[Node], rng: np.random.Generator) -> list[Node]:
    """A random set without any of ``selected`` and with as many nodes of each kind; where a kind has too few others,
    nodes of other kinds stand in, and where there are too few altogether the set is smaller."""
    others = [candidates[i] for i in rng.permutation(len(candidates)) if candidates[i] not in selected]
    out: list[Node] = []
    for kind in ("embed", "head", "mlp", "unembed"):
        need = sum(node.kind == kind for node in selected)
        out += [node for node in others if node.kind == kind][:need]
    return [*out, *(node for node in others if node not in out)][: len(selected)]
