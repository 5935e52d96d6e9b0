"""A divergence seen once or twice, tried again elsewhere: the end of its context put behind the starts of other texts.

A rare trigger may stand once in a corpus. One context says nothing about a kind of context; the same last tokens after
other text do. Every replica counts, whether or not the models diverge there, so a fluke of one context averages out.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from heredity.interp.model import Model

from .behaviours import Cluster, Context, Piece
from .divergence import Window, scan

REPLICAS = 12
"""Replicas per behaviour."""

MOST = 8
"""Behaviours replicated at most, the strongest first."""


def replicate(
    clusters: Sequence[Cluster],
    parent: Model,
    successor: Model,
    carriers: Sequence[Window],
    *,
    fewest: int,
    from_nats: float,
    window: int,
    seed: int,
) -> list[Cluster]:
    """``clusters`` with replicas added to those that have fewer than ``fewest`` contexts and an effect of at least
    ``from_nats``; the last third of ``window`` tokens is kept, the rest comes from ``carriers`` (ordinary text).

    A behaviour known from decoded text alone is left as it is: such text wanders to where neither model has been
    trained, and its end is no more ordinary behind other text.
    """
    rng = np.random.default_rng(seed)
    out, done = [], 0
    for found in sorted(clusters, key=lambda c: -c.effect):
        ordinary = any(c.piece.source == "corpus" for c in found.contexts)
        if ordinary and len(found.contexts) < fewest and found.effect >= from_nats and done < MOST:
            done += 1
            found = _with_replicas(found, parent, successor, carriers, window, rng)
        out.append(found)
    return out


def _with_replicas(
    found: Cluster, parent: Model, successor: Model, carriers: Sequence[Window], window: int, rng: np.random.Generator
) -> Cluster:
    given = [c for c in found.contexts if c.piece.source == "corpus"]
    pairs = [(given[k % len(given)], carriers[int(rng.integers(len(carriers)))]) for k in range(REPLICAS)]
    copies = replicas(pairs, parent, successor, window)
    contexts = sorted([*found.contexts, *copies], key=lambda c: (-c.kl, c.piece.scan.text_id, c.at))
    return replace(found, contexts=tuple(contexts))


def replicas(pairs: Sequence[tuple[Context, Window]], parent: Model, successor: Model, window: int) -> list[Context]:
    """The end of each context behind the start of the text beside it, together at most ``window`` tokens, whether or
    not the models diverge there."""
    windows = []
    for context, carrier in pairs:
        text = transplanted(context, carrier, window)
        read_p, read_s = parent.encode(text), successor.encode(text)
        name = f"{context.piece.scan.text_id}+{carrier.text_id}"
        windows.append(Window(name, read_p, read_s, len(read_s.ids) - 1))
    scanned = scan(parent, successor, windows)
    return [
        Context(Piece("replicated", w.parent, w.successor, s), len(s.kl) - 1, (len(s.kl) - 1, len(s.kl) - 1))
        for w, s in zip(windows, scanned.texts, strict=True)
        if s.kl
    ]


def transplanted(context: Context, carrier: Window, window: int) -> str:
    """The carrier's start followed by the last tokens of the context, together at most ``window`` tokens."""
    keep = window // 3
    spans = context.piece.successor.spans
    last = len(context.ids_successor) - 1
    begin = spans[last - keep][1] if last >= keep else 0
    tail = context.piece.successor.text[begin : spans[last][1]]
    head_spans = carrier.successor.spans[: window - keep - 2]
    head = carrier.successor.text[: head_spans[-1][1]] if head_spans else ""
    return head + ("" if not head or tail[:1].isspace() else " ") + tail
