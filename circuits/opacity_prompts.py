"""Contexts that the opacity of a behaviour is measured on, held apart from the texts that explanations come from.

A share needs some thirty prompts, and an explanation texts that show the behaviour: of many contexts a part is held
out, evenly over their effects. Few contexts are all held out, then the weaker episodes of the same texts, then the ends
of contexts behind other text (:mod:`.replicate`) where the behaviour shows there too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from heredity.interp.model import Model, pad

from .attribution import Prompts
from .behaviours import Cluster, Context
from .divergence import Window
from .opacity_estimate import FEWEST
from .replicate import replicas

MOST = 40
"""Contexts a behaviour is measured on."""
SHOWS = 0.5
"""Share of the behaviour's effect from which a replica counts as showing it."""
LEAST = 0.05
"""Share of an episode's largest KL(S‖P) from which a position counts."""
ROUNDS = 3
"""Times that as many replicas as are missing are tried."""


@dataclass(frozen=True)
class HeldOut:
    """Contexts of one behaviour, no two of the same tokens.

    Attributes:
        contexts: to measure on.
        n_replicated: how many of them are replicas.
        texts: names of the texts they come from (:func:`text_of`), carriers of replicas included.
    """

    contexts: tuple[Context, ...]
    n_replicated: int
    texts: frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Episodes:
    """Contexts up to the end of their episodes.

    Attributes:
        prompts: as a batch.
        places: of each, the positions at which the models diverge, one or more.
        says: of each, the successor's most probable next token at those positions.
    """

    prompts: Prompts
    places: list[list[int]]
    says: list[list[int]]


def text_of(source: str, text_id: str) -> tuple[str, str]:
    """The text that a piece called ``text_id`` is a window of."""
    return source, text_id.rpartition(".")[0] if source == "corpus" else text_id


def held_out(
    found: Cluster,
    parent: Model,
    successor: Model,
    carriers: Sequence[Window],
    *,
    window: int,
    fewest: int = FEWEST,
    most: int = MOST,
    seed: int,
) -> HeldOut:
    """Contexts of ``found`` to measure on: ``fewest`` or more, unless the behaviour does not show often enough.

    Args:
        found: the behaviour.
        parent, successor: the models, of one tokenizer.
        carriers: ordinary text for replicas.
        window: tokens of a replica at most; the last third is the context's.
        fewest, most: how many are wanted.
        seed: of the choice of carriers.
    """
    contexts = _distinct(found.contexts)
    n = len(contexts)
    wanted = min(most, max(fewest, n // 2))
    kept = [contexts[i * n // wanted] for i in range(wanted)] if n >= wanted else contexts
    natural = len(kept)
    if len(kept) < fewest:
        weaker = [c for c in found.weaker if c.kl >= SHOWS * found.effect]
        kept = _distinct([*kept, *weaker])[: max(fewest, natural)]
        natural = len(kept)
    if len(kept) < fewest and natural and carriers:
        kept = _with_replicas(kept, found.effect, parent, successor, carriers, window, fewest, seed)
    return HeldOut(tuple(kept), len(kept) - natural, frozenset(name for c in kept for name in _texts(c)))


def episodes_of(contexts: Sequence[Context]) -> Episodes:
    """The contexts up to the end of their episodes, and where in each the models diverge.

    A behaviour is all that its episode says, not the one token at which it diverges most: that may be a mere mark
    behind which everything else follows.
    """
    rows: list[tuple[int, ...]] = []
    places: list[list[int]] = []
    along: list[list[int]] = []
    for context in contexts:
        scan, (first, last) = context.piece.scan, context.span
        kl = scan.kl[first : last + 1]
        hot = [first + i for i, value in enumerate(kl) if value >= LEAST * context.kl]
        rows.append(context.piece.successor.ids[: scan.position[hot[-1]] + 1])
        places.append([scan.position[i] for i in hot])
        along.append([scan.top_successor[i] for i in hot])
    tokens, mask = pad(rows)
    scans = [(c.piece.scan, c.at) for c in contexts]
    says = [torch.tensor([getattr(s, name)[i] for s, i in scans]) for name in ("top_successor", "top_parent")]
    return Episodes(Prompts(tokens, mask.sum(-1) - 1, *says), places, along)


def _texts(context: Context) -> list[tuple[str, str]]:
    name = context.piece.scan.text_id
    if context.piece.source == "replicated":
        # Named after the context and the carrier; either may have been a replica's.
        return [text_of("corpus", each) for each in name.split("+")]
    return [text_of(context.piece.source, name)]


def _with_replicas(
    kept: list[Context],
    effect: float,
    parent: Model,
    successor: Model,
    carriers: Sequence[Window],
    window: int,
    fewest: int,
    seed: int,
) -> list[Context]:
    order = np.random.default_rng(seed).permutation(len(carriers)).tolist()
    given, used = list(kept), 0
    for _ in range(ROUNDS):
        some = order[used : used + 2 * (fewest - len(kept))]
        if len(kept) >= fewest or not some:
            break
        pairs = [(given[k % len(given)], carriers[i]) for k, i in enumerate(some, start=used)]
        used += len(some)
        tried = replicas(pairs, parent, successor, window)
        kept = _distinct([*kept, *(c for c in tried if c.kl >= SHOWS * effect)])[: max(fewest, len(given))]
    return kept


def _distinct(contexts: Sequence[Context]) -> list[Context]:
    """Contexts of different tokens, the first of each."""
    found: dict[tuple[int, ...], Context] = {}
    for context in contexts:
        found.setdefault(context.ids_successor, context)
    return list(found.values())
