"""Paired activations whose features are known: which are the parent's, the successor's, or both.

    x_m = Σ_i z_i · s_i,m · u_i,m + noise,   m = parent, successor

z_i ≥ 0 is how strongly concept i is present at a token, s its size in a model, u its direction there. Concepts fire
with frequencies that fall off like Zipf's law. Exclusive ones have s = 0 in one model. What is *shared* includes what a
dictionary is easily wrong about:

* ``weak``: s of one model is 0.05–0.3 of the other's. A sparsity penalty drives the smaller decoder row to zero.
* ``split``: present in both models, but on part of the tokens in one of them only. A dictionary may make a parent-only
  and a successor-only latent of it.
* ``rotated``: on the same tokens in both, along unrelated directions (the distractor).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SHARED, PARENT, SUCCESSOR, WEAK, SPLIT, ROTATED = "shared", "parent", "successor", "weak", "split", "rotated"


@dataclass(frozen=True)
class Scenario:
    """How a pair is drawn.

    Attributes:
        widths: of the parent's and the successor's activations.
        counts: how many concepts of each kind; the rest is shared.
        concepts: in all.
        basis: whether the two models share directions (``same``) or are rotated against each other (``rotated``).
        scale: of the successor's activations over the parent's.
        latents: of the dictionaries trained on it.
        tokens, held_out: to train on, and to judge on.
        noise: standard deviation of each coordinate.
        active: concepts present at a token, on average.
    """

    name: str
    widths: tuple[int, int] = (64, 64)
    counts: tuple[tuple[str, int], ...] = ((PARENT, 6), (SUCCESSOR, 6))
    concepts: int = 160
    basis: str = "same"
    scale: float = 1.0
    tokens: int = 100_000
    held_out: int = 50_000
    noise: float = 0.02
    active: float = 6.0
    latents: int = 192


PLAIN = Scenario("plain")
SCENARIOS = (
    PLAIN,
    replace(PLAIN, name="shrinkage trap", counts=(*PLAIN.counts, (WEAK, 12))),
    replace(PLAIN, name="decoupling trap", counts=(*PLAIN.counts, (SPLIT, 8))),
    replace(PLAIN, name="distractor rotation", counts=(*PLAIN.counts, (ROTATED, 8))),
    replace(PLAIN, name="rotated basis", basis="rotated", counts=(*PLAIN.counts, (WEAK, 6))),
    replace(PLAIN, name="unequal widths", widths=(48, 72), scale=3.0, counts=(*PLAIN.counts, (WEAK, 6))),
    replace(PLAIN, name="too few latents", latents=96),
    replace(PLAIN, name="self-diff", counts=()),
)


@dataclass(frozen=True, eq=False)
class Pair:
    """Activations with their truth.

    Attributes:
        parent, successor: [T, D_m], to train on.
        held_out: both, on other tokens.
        kinds: kind of each concept.
        directions: per model [concepts, D_m], of length 1.
        sizes: [2, concepts].
    """

    parent: Tensor
    successor: Tensor
    held_out: tuple[Tensor, Tensor]
    kinds: tuple[str, ...]
    directions: tuple[Tensor, Tensor]
    sizes: Tensor


def draw(scenario: Scenario, seed: int) -> Pair:
    """A pair, from ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed)
    n = scenario.concepts
    kinds = [SHARED] * n
    # Spread over all frequencies but the rarest, which no dictionary of this size would learn.
    places = torch.randperm(n * 3 // 4, generator=generator).tolist()
    for kind, count in scenario.counts:
        for _ in range(count):
            kinds[places.pop()] = kind
    rate = 1 / (torch.arange(n) + 8.0)
    rate = (rate * scenario.active / rate.sum()).clamp_max(0.5)
    directions = _directions(scenario, kinds, generator)
    sizes = torch.ones(2, n)
    for i, kind in enumerate(kinds):
        if kind in (PARENT, SUCCESSOR):
            sizes[int(kind == PARENT), i] = 0
        if kind == WEAK:
            smaller = int(torch.rand((), generator=generator) < 0.5)
            sizes[smaller, i] = 0.05 + 0.25 * torch.rand((), generator=generator)
    total = scenario.tokens + scenario.held_out
    identical = scenario.name == "self-diff"
    split = torch.tensor([kind == SPLIT for kind in kinds])
    out = [torch.empty(total, width) for width in scenario.widths]
    for start in range(0, total, 8192):
        rows = min(8192, total - start)
        z = (torch.rand(rows, n, generator=generator) < rate) * (0.5 + torch.rand(rows, n, generator=generator))
        # A third of a split concept's tokens in both models, a third in each alone.
        where = torch.randint(3, (rows, n), generator=generator)
        noise = [torch.randn(rows, width, generator=generator) for width in scenario.widths]
        for m in range(2):
            kept = z * ~(split & (where == 1 - m))
            x = (kept * sizes[m]) @ directions[m]
            out[m][start : start + rows] = x + scenario.noise * noise[0 if identical else m]
    if scenario.scale != 1:
        out[1] *= scenario.scale
    cut = scenario.tokens
    return Pair(out[0][:cut], out[1][:cut], (out[0][cut:], out[1][cut:]), tuple(kinds), directions, sizes)


def _directions(scenario: Scenario, kinds: list[str], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    def fresh(width: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(len(kinds), width, generator=generator), dim=1)

    parent = fresh(scenario.widths[0])
    if scenario.widths[0] != scenario.widths[1]:
        return parent, fresh(scenario.widths[1])
    successor = parent.clone()
    turned = torch.tensor([kind == ROTATED for kind in kinds])
    successor[turned] = fresh(scenario.widths[1])[turned]
    if scenario.basis == "rotated":
        rotation, _ = torch.linalg.qr(torch.randn(scenario.widths[0], scenario.widths[0], generator=generator))
        successor = successor @ rotation
    return parent, successor
