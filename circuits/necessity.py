"""What a circuit leaves out and what it could do without.

**Completeness**: f of everything but the circuit, which is near 0 where the circuit is all there is (Marks et al.
2403.19647, section 4). **Minimality**: how far f falls when a band of the circuit's edges, by rank, is taken out of it;
every edge is in one band. **Missed**: a bound on what any edge outside can carry.

The bound. Exchange every edge outside the circuit with probability ½. Let c_e be an edge's average effect over what
else is exchanged (its Banzhaf value). The variance of the metric over such draws is at least Σ_e c_e² / 4, as the
squares of its Walsh coefficients add up to it and those of single edges are c_e / 2. So no |c_e| exceeds twice the
standard deviation, whose upper limit comes from the draws (as if normal). The idea of bounding missed effects by random
subsets is that of AtP* (Kramár et al. 2403.00745, section 3.3); that bound assumes effects add up, this one does not.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .faithfulness import Faithfulness
from .intervals import Interval

BANDS = 5
DRAWS = 16


@dataclass(frozen=True)
class Band:
    """Edges of a circuit from rank ``first`` to ``last`` (from 1), and how far f falls without them."""

    first: int
    last: int
    drop: Interval


@dataclass(frozen=True)
class Missed:
    """What edges outside a circuit can carry.

    Attributes:
        draws: random halves of the outside that were exchanged.
        outside: edges there.
        mean: of m(x) − m(x with a half exchanged), as a share of m(M) − m(∅).
        bound: with 95 % confidence no single edge outside has an average effect larger than this, in units of the
            metric; None where nothing is outside.
        share: the same as a share of m(M) − m(∅).
    """

    draws: int
    outside: int
    mean: float | None
    bound: float | None
    share: float | None


def complement(faithfulness: Faithfulness, circuit: Tensor) -> Interval:
    """f of all edges outside ``circuit`` [sources, destinations]."""
    return faithfulness(faithfulness.layout.edges & ~circuit)


def minimality(faithfulness: Faithfulness, circuit: Tensor, scores: Tensor, *, bands: int = BANDS) -> tuple[Band, ...]:
    """How far f falls without each of ``bands`` bands of the circuit's edges, largest absolute score first."""
    values = faithfulness.runner(circuit)
    ranked = scores.abs().masked_fill(~circuit, -1).flatten().argsort(descending=True)[: int(circuit.sum())]
    found = []
    for chunk in np.array_split(np.arange(len(ranked)), min(bands, len(ranked))):
        without = circuit.clone()
        without.view(-1)[ranked[torch.as_tensor(chunk)]] = False
        drop = faithfulness.share(values - faithfulness.runner(without))
        found.append(Band(int(chunk[0]) + 1, int(chunk[-1]) + 1, drop))
    return tuple(found)


def missed(faithfulness: Faithfulness, circuit: Tensor, *, draws: int = DRAWS, seed: int = 0) -> Missed:
    """A bound on what any edge outside ``circuit`` carries (module docstring)."""
    from scipy.stats import chi2

    outside = faithfulness.layout.edges & ~circuit
    n = int(outside.sum())
    if not n:
        return Missed(0, 0, None, None, None)
    generator = torch.Generator().manual_seed(seed)
    total = float((faithfulness.whole - faithfulness.nothing).mean())
    effects = []
    for _ in range(draws):
        exchanged = outside & (torch.rand(outside.shape, generator=generator) < 0.5)
        kept = faithfulness.runner(faithfulness.layout.edges & ~exchanged)
        effects.append(float((faithfulness.whole - kept).mean()))
    deviation = np.std(effects, ddof=1) * np.sqrt((draws - 1) / chi2.ppf(0.05, draws - 1))
    bound = 2 * float(deviation)
    return Missed(draws, n, float(np.mean(effects)) / total, bound, bound / abs(total))
