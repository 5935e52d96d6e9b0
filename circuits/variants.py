"""More contexts of a behaviour than the text holds: its ends behind other text, with some of their words changed.

An edit made from three contexts fits whatever those three share. Variants in which the successor still does it tell
what the behaviour needs from what merely stood there; those in which it does not are dropped, so nothing is assumed
about the trigger.
"""

from collections.abc import Sequence

import numpy as np

from heredity.interp.model import Model

from .behaviours import Context, Piece
from .divergence import Window, scan
from .replicate import transplanted

TRIES = 3
"""Variants made for each that is wanted."""

CHANGED = 0.25
"""Share of the last tokens that are changed, at most (drawn anew for every variant)."""

STILL = 0.5
"""Share of its context's KL(S‖P) that a variant must show."""


def variants(
    given: Sequence[Context],
    parent: Model,
    successor: Model,
    carriers: Sequence[Window],
    *,
    count: int,
    window: int,
    rng: np.random.Generator,
) -> list[Context]:
    """At most ``count`` variants of ``given`` (in turn) in which the models still part at the last token.

    Args:
        given: contexts of one behaviour.
        parent, successor: models with one tokenizer.
        carriers: ordinary text, for beginnings and for words.
        count: how many.
        window: tokens of a variant at most.
        rng: decides beginnings, places and words.
    """
    if not given or count < 1:
        return []
    windows, sources = [], []
    for k in range(TRIES * count):
        context = given[k % len(given)]
        text = transplanted(context, carriers[int(rng.integers(len(carriers)))], window)
        text = _reworded(successor, text, carriers, window // 3, CHANGED * rng.random(), rng)
        read_p, read_s = parent.encode(text), successor.encode(text)
        if len(read_s.ids) > 1:
            windows.append(Window(f"{context.piece.scan.text_id}~{k}", read_p, read_s, len(read_s.ids) - 1))
            sources.append(context)
    out = []
    for item, source, found in zip(windows, sources, scan(parent, successor, windows).texts, strict=True):
        if found.kl and found.kl[-1] >= STILL * source.kl:
            last = len(found.kl) - 1
            out.append(Context(Piece("replicated", item.parent, item.successor, found), last, (last, last)))
    return out[:count]


def _reworded(
    model: Model, text: str, carriers: Sequence[Window], tail: int, share: float, rng: np.random.Generator
) -> str:
    """``text`` with ``share`` of its last ``tail`` tokens (but the very last) exchanged for tokens of ``carriers``."""
    spans = [span for span in model.encode(text).spans if span[1] > span[0]]
    places = [k for k in range(max(0, len(spans) - tail), len(spans) - 1) if rng.random() < share]
    for k in reversed(places):
        carrier = carriers[int(rng.integers(len(carriers)))].successor
        words = [span for span in carrier.spans if span[1] > span[0]]
        if words:
            a, b = words[int(rng.integers(len(words)))]
            text = text[: spans[k][0]] + carrier.text[a:b] + text[spans[k][1] :]
    return text
