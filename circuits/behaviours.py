"""From single divergent positions to behaviours: kinds of context in which the two models say different things.

Neighbouring divergent positions of a text form an episode; episodes whose predictions and preceding tokens are alike
(TF-IDF cosine, average linkage) form a behaviour. Its effect is the mean over texts of the largest KL(S‖P): a behaviour
often announces itself faintly, earlier in the text that it is about to show in, and that is not another instance of it.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from heredity.interp.model import Encoded

from .divergence import TextScan
from .intervals import student

GAP = 2
"""Divergent positions at most this far apart belong to one episode."""

BEFORE = 6
"""Tokens before an episode that describe its context."""

DISTANCE = 0.75
"""Cosine distance at which episodes stop being alike."""

SURPRISES = 2
"""Tokens of a generated text, before an episode, that the successor itself may find unlikely ..."""

UNLIKELY = 0.01
"""... that is, less probable than this. More, and the context is nothing the successor would ever write: two models
may differ there without that being a behaviour."""

MOST_EPISODES = 600
"""Episodes clustered at most (the strongest): bounds the pairwise distances."""

SURER = 0.25
"""Difference of top probability from which one model counts as surer than the other."""


Natural = Literal["corpus", "sampled", "amplified"]
Source = Natural | Literal["replicated"]


@dataclass(frozen=True)
class Piece:
    """A stretch of text as both models read it, with its scan."""

    source: Source
    """``corpus`` (given), ``sampled`` (written by the successor), ``amplified`` or ``replicated``."""
    parent: Encoded
    successor: Encoded
    scan: TextScan


@dataclass(frozen=True)
class Context:
    """An episode: where in a piece the models part most."""

    piece: Piece
    at: int
    """Index into the scan's columns: the position of the largest KL(S‖P)."""
    span: tuple[int, int]
    """First and last index of the episode."""

    @property
    def kl(self) -> float:
        """KL(S‖P) at the peak, nats."""
        return self.piece.scan.kl[self.at]

    @property
    def reverse(self) -> float:
        """KL(P‖S) at the peak, nats."""
        return self.piece.scan.reverse[self.at]

    @property
    def ids_successor(self) -> tuple[int, ...]:
        """The successor's tokens up to and including the peak."""
        return self.piece.successor.ids[: self.piece.scan.position[self.at] + 1]

    @property
    def ids_parent(self) -> tuple[int, ...]:
        """The parent's tokens up to and including the peak."""
        return self.piece.parent.ids[: self.piece.scan.position_parent[self.at] + 1]


@dataclass(frozen=True)
class Cluster:
    """Contexts that are alike, of different texts, strongest first."""

    contexts: tuple[Context, ...]
    weaker: tuple[Context, ...] = ()
    """Further, weaker episodes of the same texts."""

    @property
    def effect(self) -> float:
        """Mean over contexts of KL(S‖P) at the peak, nats."""
        return float(np.mean([c.kl for c in self.contexts]))

    @property
    def kind(self) -> Literal["emergent", "lost", "replaced"]:
        """``emergent`` where only the successor is sure, ``lost`` where only the parent is, else ``replaced``."""
        sure_s = np.mean([c.piece.scan.p_successor[c.at] for c in self.contexts])
        sure_p = np.mean([c.piece.scan.p_parent[c.at] for c in self.contexts])
        if sure_s - sure_p > SURER:
            return "emergent"
        return "lost" if sure_p - sure_s > SURER else "replaced"


def episodes(piece: Piece, threshold: float) -> list[Context]:
    """Stretches of a piece whose KL, either way, reaches ``threshold`` nats."""
    scan = piece.scan
    reach = _plausible_until(piece)
    hot = [i for i in range(reach) if max(scan.kl[i], scan.reverse[i]) >= threshold]
    out: list[Context] = []
    start = 0
    for k in range(1, len(hot) + 1):
        if k == len(hot) or hot[k] - hot[k - 1] > GAP:
            members = hot[start:k]
            peak = max(members, key=lambda i: scan.kl[i])
            out.append(Context(piece, peak, (members[0], members[-1])))
            start = k
    return out


def _plausible_until(piece: Piece) -> int:
    """How many scanned positions come before the successor has been surprised once too often."""
    if piece.source == "corpus":
        return len(piece.scan.kl)
    surprises = 0
    for i, value in enumerate(piece.scan.surprise):
        surprises += value > -np.log(UNLIKELY)
        if surprises > SURPRISES:
            return i + 1
    return len(piece.scan.kl)


def cluster(pieces: Sequence[Piece], threshold: float) -> list[Cluster]:
    """Behaviours among ``pieces``, largest total effect first; clusters of one context included."""
    contexts = [context for piece in pieces for context in episodes(piece, threshold)]
    contexts = sorted(contexts, key=lambda c: (-c.kl, c.piece.scan.text_id, c.at))[:MOST_EPISODES]
    if not contexts:
        return []
    labels = _labels([_features(c) for c in contexts], _rarity(pieces))
    groups: dict[int, list[Context]] = {}
    for label, context in zip(labels, contexts, strict=True):
        groups.setdefault(label, []).append(context)
    return sorted((_of_texts(group) for group in groups.values()), key=lambda c: -c.effect * len(c.contexts))


def _of_texts(contexts: Sequence[Context]) -> Cluster:
    """A cluster of ``contexts``, strongest first, in which each text stands once."""
    strongest: dict[int, Context] = {}
    for context in contexts:
        strongest.setdefault(id(context.piece), context)
    kept = tuple(strongest.values())
    return Cluster(kept, tuple(c for c in contexts if strongest[id(c.piece)] is not c))


def largest_effect(clusters: Sequence[Cluster], fewest: int) -> float:
    """The largest effect that a behaviour with at least ``fewest`` contexts surely has, nats; 0 where there is none.

    Surely: the lower end of Student's 95 % interval over contexts, by which a behaviour is judged as well. Means would
    let three contexts that scatter widely stand against two hundred that agree.
    """
    enough = (found for found in clusters if len(found.contexts) >= fewest)
    return max((student([c.kl for c in found.contexts]).low for found in enough), default=0.0)


def _features(context: Context) -> set[tuple[str, int]]:
    scan, (first, last) = context.piece.scan, context.span
    before = context.piece.successor.ids[max(0, scan.position[first] - BEFORE + 1) : scan.position[first] + 1]
    return (
        {("S", token) for token in scan.top_successor[first : last + 1]}
        | {("P", token) for token in scan.top_parent[first : last + 1]}
        | {("C", token) for token in before}
    )


def _rarity(pieces: Sequence[Piece]) -> Callable[[tuple[str, int]], float]:
    """Inverse document frequency of a feature over all positions scanned."""
    counts: Counter[tuple[str, int]] = Counter()
    total = 0
    for piece in pieces:
        total += len(piece.scan.kl)
        counts.update(("S", token) for token in piece.scan.top_successor)
        counts.update(("P", token) for token in piece.scan.top_parent)
        counts.update(("C", token) for token in piece.successor.ids)
    # Tokens before the scanned part count too, so a token can be commoner than there are positions.
    return lambda feature: max(0.0, float(np.log((total + 1) / (counts[feature] + 1)))) + 0.1


def _labels(features: Sequence[set[tuple[str, int]]], rarity: Callable[[tuple[str, int]], float]) -> list[int]:
    if len(features) == 1:
        return [1]
    names = {feature: k for k, feature in enumerate(sorted(set().union(*features)))}
    rows = np.zeros((len(features), len(names)), dtype=np.float32)
    for i, present in enumerate(features):
        for feature in present:
            rows[i, names[feature]] = rarity(feature)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    distance = np.clip(1 - rows @ rows.T, 0, None)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), method="average")
    return [int(label) for label in fcluster(tree, DISTANCE, criterion="distance")]
