"""Places where a latent is active, cut out of their texts, token by token as strongly marked as it is active there."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..explain.contexts import Contexts
from ..model import Encoded
from .notes import LatentNotes

BEFORE, AFTER = 24, 10
"""Tokens shown on either side."""
LEFT, RIGHT = 60, 30
"""Characters shown on either side in a line."""


@dataclass(frozen=True)
class Part:
    """Consecutive characters of a text; ``activation`` is 0 where the latent is inactive or what it is, unknown."""

    text: str
    activation: float = 0.0
    marked: bool = False


@dataclass(frozen=True)
class Snippet:
    """A token where a latent is active, and the text around it.

    Attributes:
        row: which of all tokens (row of the features).
        activation: there.
        parts: the characters, in order; exactly one is marked.
        begins, ends: whether the text does where the snippet does.
    """

    row: int
    activation: float
    parts: tuple[Part, ...]
    begins: bool
    ends: bool

    @property
    def token(self) -> str:
        """The marked characters."""
        return next(part.text for part in self.parts if part.marked)

    @property
    def text(self) -> str:
        """The marked characters between » and «, and enough of those around for a line."""
        at = next(i for i, part in enumerate(self.parts) if part.marked)
        before, after = ("".join(part.text for part in parts) for parts in (self.parts[:at], self.parts[at + 1 :]))
        left = "…" if len(before) > LEFT or not self.begins else ""
        right = "…" if len(after) > RIGHT or not self.ends else ""
        return f"{left}{before[-LEFT:]}»{self.token}«{after[:RIGHT]}{right}"


def strongest(notes: LatentNotes, latent: int, count: int) -> tuple[Snippet, ...]:
    """Where it is most active, each in another text, strongest first; ``count`` at most."""
    rows, values = _known(notes, latent)
    order = np.argsort(-values, kind="stable")
    _, first = np.unique(notes.contexts.text[rows[order]], return_index=True)
    return _cut(notes, latent, rows, values, order[np.sort(first)[:count]])


def weaker(notes: LatentNotes, latent: int, count: int, than: tuple[Snippet, ...]) -> tuple[Snippet, ...]:
    """``count`` places in other texts than ``than``, at even distances in the ranking of each text's strongest.

    What a latent does where it is most active is not what it mostly does. None where only the strongest were kept.
    """
    if latent not in notes.explanations:
        return ()
    rows, values = _known(notes, latent)
    order = np.argsort(-values, kind="stable")
    shown = np.isin(notes.contexts.text[rows[order]], [notes.contexts.text[each.row] for each in than])
    left = order[~shown]
    _, first = np.unique(notes.contexts.text[rows[left]], return_index=True)
    left = left[np.sort(first)]
    # Whole texts are left, so two snippets never show one place.
    at = ((np.arange(count) + 0.5) / count * len(left)).astype(np.int64) if len(left) >= count else np.arange(len(left))
    return _cut(notes, latent, rows, values, left[at])


def snippet(contexts: Contexts, row: int, activation: Mapping[int, float]) -> Snippet:
    """The text around token ``row``; ``activation`` by row, where it is known."""
    text = contexts.texts[int(contexts.text[row])]
    start, at = int(contexts.starts[contexts.text[row]]), int(contexts.position[row])
    a, b = text.spans[at]
    first, last = max(0, at - BEFORE), min(len(text.ids), at + AFTER + 1)
    marked = text.text[a:b] or contexts.names[int(contexts.ids[row])]
    parts = _run(text, text.spans[first][0], a, range(first, at), start, activation)
    parts.append(Part(marked, activation.get(row, 0.0), marked=True))
    # Bytes of one character can be several tokens with one span; each character is shown once.
    parts += _run(text, b, max(b, text.spans[last - 1][1]), range(at + 1, last), start, activation)
    return Snippet(row, activation.get(row, 0.0), tuple(parts), first == 0, last == len(text.ids))


def _run(
    text: Encoded, begin: int, end: int, positions: range, start: int, activation: Mapping[int, float]
) -> list[Part]:
    """Characters ``begin`` to ``end``, those of active tokens apart; the text's first token is row ``start``."""
    parts: list[Part] = []
    for position in positions:
        a, b = text.spans[position]
        a, b = max(a, begin), min(b, end)
        if start + position not in activation or a >= b:
            continue
        parts += [Part(text.text[begin:a])] if begin < a else []
        parts.append(Part(text.text[a:b], activation[start + position]))
        begin = b
    return [*parts, Part(text.text[begin:end])] if begin < end else parts


def _known(notes: LatentNotes, latent: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows where it is active and values there: all of them if it was explained, else the strongest."""
    if latent in notes.explanations:
        view = notes.features.by_latent
        part = slice(int(view.indptr[latent]), int(view.indptr[latent + 1]))
        return view.tokens[part].numpy(), notes.features.values[view.order[part]].numpy()
    rows, values = (array[latent].numpy() for array in (notes.statistics.top_tokens, notes.statistics.top_values))
    return rows[rows >= 0], values[rows >= 0]


def _cut(
    notes: LatentNotes, latent: int, rows: np.ndarray, values: np.ndarray, chosen: np.ndarray
) -> tuple[Snippet, ...]:
    activation = dict(zip(rows.tolist(), values.tolist(), strict=True))
    return tuple(snippet(notes.contexts, int(row), activation) for row in rows[chosen])
