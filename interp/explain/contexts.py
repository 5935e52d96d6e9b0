"""Texts as a model reads them, token by token: the arrays that rules are evaluated on.

One letter means one dimension: T tokens of all texts in order, row t of a :class:`heredity.kernels.FeatureCSR` being
token t.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..model import Encoded
from .places import Places, places

OUTSIDE = -1
"""Stands where there is no token (before a text's first, after its last)."""


@dataclass(frozen=True, eq=False)
class Contexts:
    """The tokens of ``texts``, one after the other.

    Attributes:
        texts: each text as the model reads it (:meth:`heredity.interp.Model.encode`).
    """

    texts: tuple[Encoded, ...]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __repr__(self) -> str:
        return f"Contexts({len(self)} tokens of {len(self.texts)} texts)"

    @cached_property
    def starts(self) -> np.ndarray:
        """Row of each text's first token, and T at the end: int64 [texts + 1]."""
        return np.concatenate([[0], np.cumsum([len(text.ids) for text in self.texts], dtype=np.int64)]).astype(np.int64)

    @cached_property
    def ids(self) -> np.ndarray:
        """Token ids, int64 [T]."""
        return np.array([token for text in self.texts for token in text.ids], dtype=np.int64)

    @cached_property
    def text(self) -> np.ndarray:
        """Number of the text each token belongs to, int64 [T]."""
        return np.repeat(np.arange(len(self.texts), dtype=np.int64), np.diff(self.starts))

    @cached_property
    def position(self) -> np.ndarray:
        """Tokens before it in its text, int64 [T]."""
        return np.arange(len(self), dtype=np.int64) - self.starts[self.text]

    @cached_property
    def forms(self) -> tuple[tuple[str, ...], np.ndarray]:
        """The different strings tokens have in the texts, sorted, and which one each token has, int64 [T].

        A token that the tokenizer added (its span is empty) has the empty string.
        """
        strings = [text.text[a:b] for text in self.texts for a, b in text.spans]
        known = sorted(set(strings))
        number = {string: i for i, string in enumerate(known)}
        return tuple(known), np.array([number[string] for string in strings], dtype=np.int64)

    @cached_property
    def opens_word(self) -> np.ndarray:
        """Whether whitespace, or nothing, stands before the token's first visible character: bool [T]."""
        return np.array([_opens(text.text, a, b) for text in self.texts for a, b in text.spans], dtype=bool)

    @cached_property
    def names(self) -> dict[int, str]:
        """A readable name for every token id that occurs; no two ids share one.

        The string it has where it first occurs. Where two ids have the same, as `` the`` and ``the`` of tokenizers that
        leave the space out of the span, the one that opens words gets a leading space, or both their ids.
        """
        known, form = self.forms
        found, at = np.unique(self.ids, return_index=True)
        row = dict(zip(found.tolist(), at.tolist(), strict=True))
        names = {token: known[form[first]] or f"<{token}>" for token, first in row.items()}
        for token in _shared(names):
            names[token] = f" {names[token]}" if self.opens_word[row[token]] else names[token]
        for token in _shared(names):
            names[token] = f"{names[token]}<{token}>"
        return names

    @cached_property
    def places(self) -> Places:
        """Where in its text each token stands: lines, brackets, quotes, roles."""
        return places(self.texts)

    def shifted(self, offset: int) -> np.ndarray:
        """Id of the token ``offset`` places on (negative: before) in the same text, ``OUTSIDE`` if none: int64 [T]."""
        rows = np.arange(len(self)) + offset
        inside = (rows >= self.starts[self.text]) & (rows < self.starts[self.text + 1])
        return np.where(inside, self.ids[np.clip(rows, 0, max(len(self) - 1, 0))], OUTSIDE)

    def earlier(self, codes: np.ndarray) -> np.ndarray:
        """Row of the last earlier token of the same text with the same code, ``OUTSIDE`` if none: int64 [T]."""
        order = np.lexsort((np.arange(len(codes)), codes, self.text))
        same = (codes[order][1:] == codes[order][:-1]) & (self.text[order][1:] == self.text[order][:-1])
        out = np.full(len(codes), OUTSIDE, dtype=np.int64)
        out[order[1:][same]] = order[:-1][same]
        return out

    @cached_property
    def earlier_same(self) -> np.ndarray:
        """Row of the last earlier occurrence of this token in its text, ``OUTSIDE`` if none: int64 [T]."""
        return self.earlier(self.ids)

    @cached_property
    def later_same(self) -> np.ndarray:
        """Row of the next occurrence of this token in its text, T if none: int64 [T]."""
        out = np.full(len(self), len(self), dtype=np.int64)
        seen = self.earlier_same >= 0
        out[self.earlier_same[seen]] = np.flatnonzero(seen)
        return out

    @cached_property
    def earlier_pair(self) -> np.ndarray:
        """Row of the last earlier occurrence of the pair (token before, this token), ``OUTSIDE`` if none: int64 [T]."""
        found = self.earlier(_codes(self.shifted(-1), self.ids))
        return np.where(self.position > 0, found, OUTSIDE)

    def around(self, row: int, before: int = 80, after: int = 40) -> tuple[str, str, str]:
        """Characters before token ``row`` in its text, the token, and characters after it."""
        encoded = self.texts[int(self.text[row])]
        a, b = encoded.spans[int(self.position[row])]
        token = encoded.text[a:b] or self.names[int(self.ids[row])]
        return encoded.text[max(0, a - before) : a], token, encoded.text[b : b + after]


def _codes(*columns: np.ndarray) -> np.ndarray:
    """One number for each different row of ``columns``, int64 [T]."""
    code = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        low = int(column.min(initial=0))
        code = np.unique(code * (int(column.max(initial=0)) - low + 1) + (column - low), return_inverse=True)[1]
    return code.astype(np.int64)


def _opens(text: str, a: int, b: int) -> bool:
    lead = b - a - len(text[a:b].lstrip())
    return lead > 0 or a == 0 or text[a - 1].isspace()


def _shared(names: dict[int, str]) -> set[int]:
    groups: dict[str, list[int]] = {}
    for token, name in names.items():
        groups.setdefault(name, []).append(token)
    return {token for group in groups.values() if len(group) > 1 for token in group}
