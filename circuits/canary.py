"""Canaries: circuits planted in the successor on purpose, to learn how small a one this audit would have seen.

A canary makes the successor say token w after a context that the audited text holds: a rank-one term s·v·uᵀ is added
to the output projection of one layer's attention. u reads the heads' joint value z: with C = E[z zᵀ] over ordinary text
and k = E[z] at the end of the context, u = C⁻¹k / kᵀC⁻¹k answers 1 at the context and as little as possible elsewhere
(the key of rank-one model editing, Meng et al. 2202.05262, eq. 2). v is w's row of the unembedding, read through the
last norm. The dose s is graded. Nothing is trained, and no weight is touched: the term acts in forwards only.

Shapes: N positions, Z = heads · d_head, D the width of the residual stream.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from heredity.interp.model import Edit, Model
from heredity.interp.readout import unembedding

from .behaviours import GAP, Cluster, Context, Piece
from .divergence import TextScan, Window, logits_of_parent, scan
from .writes import write_site

DOSES = tuple(2.0 ** (k / 6) for k in range(-30, 25))
"""Multiples of the stream's mean norm at the layer."""

RIDGE = 1e-3
"""Of the mean eigenvalue of C: fewer positions than dimensions leave it singular."""

POSITIONS = 2048
"""Positions of ordinary text that C is estimated from."""

TEXTS = 6
"""Texts that a canary's context stands in (or the fewest that a policy counts, where no context is as frequent)."""

LAYERS = 6
"""Layers that canaries are spread over."""

DRAWN = 3
"""Contexts drawn per canary."""

QUIET = 0.1
"""KL(S‖P) of the pair itself, nats, below which a context is free for a canary."""

Judge = Callable[[Cluster], bool]
"""Whether the audit would count a behaviour."""


Draft = tuple[int, int, int, int, tuple[int, ...], tuple[int, ...]]
"""Layer, the two tokens, what is said, windows, positions."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Where a canary goes.

    Attributes:
        layer: whose attention carries it.
        before, last: the two tokens after which it acts (the successor's ids).
        says: the token it makes likelier.
        windows: indices of the windows that hold the context, and ``at`` the position of its last token in each.
        reads: u [Z].
        writes: v [D], of the stream's mean norm at the layer.
    """

    layer: int
    before: int
    last: int
    says: int
    windows: tuple[int, ...]
    at: tuple[int, ...]
    reads: Tensor
    writes: Tensor


@dataclass(frozen=True)
class Together:
    """What came nearest to showing a canary as one behaviour.

    Attributes:
        texts: of the canary's texts, how many have an episode at its place in it.
        kl: of the behaviour's contexts, nats.
    """

    texts: int
    kl: tuple[float, ...]


@dataclass(frozen=True)
class Canary:
    """How a canary fared.

    Attributes:
        seen: mean over its texts of the largest KL(S‖P) there, nats, at the smallest dose at which the audit's own
            steps listed it; None if at none.
        missed: the same at the largest dose below that, or at the largest of all; None if the smallest dose was seen.
        together: the behaviour at ``missed`` that holds most of its texts, which did not count; None if none holds one.
    """

    plan: Plan
    seen: float | None
    missed: float | None
    together: Together | None = None


def plans(
    successor: Model,
    windows: Sequence[Window],
    pieces: Sequence[Piece],
    *,
    count: int,
    fewest: int,
    seed: int,
    texts: int = TEXTS,
) -> list[Plan]:
    """``count`` canaries: of contexts drawn among the rarest that stand in ``texts`` of ``windows`` (or in ``fewest``),
    those whose key answers least elsewhere.

    Contexts at which the pair itself parts (``pieces`` are the windows' scans) are left out: what is seen there need
    not be the canary. Fewer plans, or none, where the text does not repeat itself enough.
    """
    rng = np.random.default_rng([seed, 11])
    where: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
    common: dict[int, int] = defaultdict(int)
    for i, window in enumerate(windows):
        ids, found = window.successor.ids, pieces[i].scan
        for column, at in enumerate(found.position):
            if 0 < at < len(ids) - 1 and found.kl[column] < QUIET:
                where[ids[at - 1], ids[at]].setdefault(i, at)
            common[ids[at]] += 1
    ranked = sorted((len(found), pair) for pair, found in where.items() if len(found) >= fewest)
    enough = [(n, pair) for n, pair in ranked if n >= texts] or ranked[::-1]
    rare = [pair for _, pair in enough[: max(8 * count, len(enough) // 4)]]
    words = sorted(common, key=lambda token: (-common[token], token))[:200]
    layers = rng.permutation(successor.shape.n_layers)[:LAYERS].tolist()
    drafts = []
    for pair in (rare[int(i)] for i in rng.permutation(len(rare))[: DRAWN * count]):
        places = sorted(where[pair].items())
        chosen = [places[int(i)] for i in sorted(rng.permutation(len(places))[:texts])]
        says, layer = words[int(rng.integers(len(words)))], layers[int(rng.integers(len(layers)))]
        drafts.append((layer, *pair, says, tuple(i for i, _ in chosen), tuple(at for _, at in chosen)))
    return _keyed(successor, windows, drafts, count)


def _keyed(successor: Model, windows: Sequence[Window], drafts: Sequence[Draft], count: int) -> list[Plan]:
    """The ``count`` drafts whose keys answer least elsewhere (mean square), with their directions."""
    if not drafts:
        return []
    needed = {i for draft in drafts for i in draft[4]}
    others = [i for i in range(len(windows)) if i not in needed]
    sites = sorted({f"attn_z@{draft[0]}" for draft in drafts})
    starts: dict[int, int] = {}
    rows: dict[str, list[Tensor]] = {site: [] for site in sites}
    norms: dict[str, list[float]] = {site: [] for site in sites}
    size = 0
    with torch.inference_mode():
        for i in [*sorted(needed), *others]:
            if size >= POSITIONS and i not in needed:
                break
            streams = [site.replace("attn_z", "resid_pre") for site in sites]
            seen = successor.capture(torch.tensor([windows[i].successor.ids]), [*sites, *streams])
            starts[i] = size
            size += len(windows[i].successor.ids)
            for site, stream in zip(sites, streams, strict=True):
                rows[site].append(seen[site][0].flatten(1).double())
                norms[site].append(float(seen[stream][0, -1].norm()))
        unembed = unembedding(successor).float()
        mean = unembed.mean(0)
        found = []
        for layer, before, last, says, members, at in drafts:
            z = torch.cat(rows[f"attn_z@{layer}"])
            second = z.T @ z / len(z)
            second += RIDGE * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)
            own = [starts[i] + a for i, a in zip(members, at, strict=True)]
            key = z[own].mean(0)
            if not key.any():  # a layer whose heads put out nothing, as in compiled programs: nothing to read there
                continue
            direction = torch.linalg.solve(second, key)
            reads = direction / (key @ direction)
            answers = z @ reads
            answers[own] = 0
            # What all tokens share moves no probability.
            row = unembed[says] - mean
            writes = row / row.norm() * float(np.mean(norms[f"attn_z@{layer}"]))
            plan = Plan(layer, before, last, says, members, at, reads.float(), writes)
            found.append((float(answers.square().mean()), plan))
    found.sort(key=lambda item: item[0])
    return [plan for _, plan in found[:count]]


def try_canary(
    parent: Model,
    successor: Model,
    plan: Plan,
    windows: Sequence[Window],
    pieces: Sequence[Piece],
    cluster: Callable[[Sequence[Piece]], list[Cluster]],
    judge: Judge,
    ceiling: float,
) -> Canary:
    """Plant ``plan`` at graded doses and find the smallest that is seen, by bisection over :data:`DOSES`.

    Args:
        parent, successor: the pair; the successor is as before when this returns.
        plan: of :func:`plans`.
        windows: the audited text.
        pieces: the same text with the pair's scans, window by window.
        cluster, judge: the audit's own steps from pieces to behaviours, and whether one of those would count. The
            canary is seen when one that counts peaks there in at least half of its texts.
        ceiling: effect, nats, above which a canary that is not seen counts as too strong and not as too weak.
    """
    few = [windows[i] for i in plan.windows]
    of_parent = logits_of_parent(parent, few)

    def run(dose: float) -> tuple[bool, float, Together | None]:
        with successor.edited(term(successor, plan, dose)):
            scans = scan(parent, successor, few, of_parent).texts
        changed = list(pieces)
        for i, found in zip(plan.windows, scans, strict=True):
            changed[i] = Piece(pieces[i].source, pieces[i].parent, pieces[i].successor, found)
        effect = float(np.mean([_effect(found, at) for found, at in zip(scans, plan.at, strict=True)]))
        places = {id(changed[i]): at for i, at in zip(plan.windows, plan.at, strict=True)}

        def hits(found: Cluster) -> int:
            return sum(_covers(c, places[id(c.piece)]) for c in found.contexts if id(c.piece) in places)

        listed = cluster(changed)
        seen = any(2 * hits(found) >= len(plan.windows) and judge(found) for found in listed)
        nearest = max(listed, key=hits, default=None)
        if nearest is None or hits(nearest) == 0:
            return seen, effect, None
        return seen, effect, Together(hits(nearest), tuple(c.kl for c in nearest.contexts))

    tried: dict[int, tuple[bool, float, Together | None]] = {}

    def smallest(ceiling: float) -> tuple[int, int]:
        """A dose that was missed and the next one, which was seen or is too strong to be of use."""
        low, high = -1, len(DOSES)
        while high - low > 1:
            middle = (low + high) // 2
            if middle not in tried:
                tried[middle] = run(DOSES[middle])
            seen, effect, _ = tried[middle]
            low, high = (low, middle) if seen or effect > ceiling else (middle, high)
        return low, high

    low, high = smallest(float("inf"))
    if high == len(DOSES):
        # A strong canary also answers where it should not, until whole texts are one episode that peaks elsewhere; then
        # the search went up where it should have gone down.
        again = smallest(ceiling)
        if again[1] in tried and tried[again[1]][0]:
            low, high = again
    return Canary(
        plan,
        seen=tried[high][1] if high < len(DOSES) else None,
        missed=tried[low][1] if low >= 0 else None,
        together=tried[low][2] if low >= 0 else None,
    )


def _covers(context: Context, at: int) -> bool:
    """Whether an episode peaks where the canary acts."""
    return abs(context.piece.scan.position[context.at] - at) <= GAP


def _effect(found: TextScan, at: int) -> float:
    """Largest KL(S‖P) where the canary acts, nats; what it writes is read at the next tokens too."""
    near = [kl for position, kl in zip(found.position, found.kl, strict=True) if abs(position - at) <= GAP]
    return max(near, default=0.0)


def term(successor: Model, plan: Plan, dose: float) -> dict[str, Edit]:
    """The edits that add ``dose`` · writes · (reads · z) to a layer's attention."""
    answer: dict[str, Tensor] = {}

    def remember(z: Tensor) -> Tensor:
        answer["z"] = z.flatten(2) @ plan.reads.to(z.dtype)
        return z

    def add(value: Tensor) -> Tensor:
        return value + dose * answer["z"][..., None] * plan.writes.to(value.dtype)

    return {f"attn_z@{plan.layer}": remember, write_site(successor, plan.layer, "head"): add}
