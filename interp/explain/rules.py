"""The rules an explanation is made of: each says of every token whether it holds there, and says itself in words.

A rule is data (a frozen record, JSON both ways) and is evaluated on any texts of the same tokenizer. Token sets keep
the tokens' names beside their ids, so that a rule can be read without the tokenizer.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ..errors import one_line
from .contexts import OUTSIDE, Contexts
from .places import ENCLOSURES, LINES, ROLES, Enclosure, Line, Speaker
from .shapes import Form, affixed, shape

_SHOWN = 12
"""Items of a list that are put into words."""


class Record(BaseModel):
    """Frozen, and closed to fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenIn(Record):
    """The token ``offset`` places on (0: this one, -1: the one before, 1: the next) is one of ``ids``."""

    kind: Literal["token"] = "token"
    offset: int
    ids: tuple[int, ...]
    names: tuple[str, ...]

    def holds(self, contexts: Contexts) -> np.ndarray:
        """Whether it holds at each token: bool [T]."""
        return _member(contexts.shifted(self.offset), self.ids)

    def in_words(self) -> str:
        """As a phrase."""
        subject = {0: "this token", -1: "the token before", 1: "the next token"}
        after = f"the token {self.offset} on" if self.offset > 0 else f"the token {-self.offset} before"
        return f"{subject.get(self.offset, after)} is {_listed(self.names)}"


class Ngram(Record):
    """One of several sequences of tokens ends here; all of one length."""

    kind: Literal["ngram"] = "ngram"
    grams: tuple[tuple[int, ...], ...]
    names: tuple[tuple[str, ...], ...]

    def holds(self, contexts: Contexts) -> np.ndarray:
        """Whether it holds at each token: bool [T]."""
        n = len(self.grams[0])
        columns = [contexts.shifted(offset) for offset in range(1 - n, 1)]
        out = np.zeros(len(contexts), dtype=bool)
        for gram in self.grams:
            out |= np.logical_and.reduce([c == token for c, token in zip(columns, gram, strict=True)])
        return out

    def in_words(self) -> str:
        """As a phrase."""
        return f"here ends {_listed([' + '.join(gram) for gram in self.names])}"


class Shape(Record):
    """This token has a form that can be seen without knowing the word."""

    kind: Literal["shape"] = "shape"
    shape: Form

    def holds(self, contexts: Contexts) -> np.ndarray:
        """Whether it holds at each token: bool [T]."""
        return shape(contexts, self.shape)

    def in_words(self) -> str:
        """As a phrase."""
        return f"this token {self.shape}"


class Affix(Record):
    """This token starts or ends with one of ``texts`` (spaces around it and case left out)."""

    kind: Literal["affix"] = "affix"
    end: Literal["starts", "ends"]
    texts: tuple[str, ...]

    def holds(self, contexts: Contexts) -> np.ndarray:
        """Whether it holds at each token: bool [T]."""
        return affixed(contexts, self.end, self.texts)

    def in_words(self) -> str:
        """As a phrase."""
        return f"this token {self.end} with {_listed(self.texts)}"


class Position(Record):
    """At least ``first`` and at most ``last`` tokens (None: any number) stand before it in the text."""

    kind: Literal["position"] = "position"
    first: int
    last: int | None

    def holds(self, contexts: Contexts) -> np.ndarray:
        """Whether it holds at each token: bool [T]."""
        last = np.iinfo(np.int64).max if self.last is None else self.last
        return (contexts.position >= self.first) & (contexts.position <= last)

    def in_words(self) -> str:
        """As a phrase."""
        if self.last is None:
            return f"after the first {self.first} tokens of the text"
        if self.first == self.last:
            return f"it is token {self.first + 1} of the text"
        if self.first == 0:
            return f"among the first {self.last + 1} tokens of the text"
        return f"it is one of tokens {self.first + 1} to {self.last + 1} of the text"


class Inside(Record):
    """Inside brackets, quotes, a line of some kind, after a colon of its line, or at a line's start."""

    kind: Literal["inside"] = "inside"
    place: Enclosure | Line | Literal["after a colon", "a line's first token"]

    def holds(self, contexts: Contexts) -> np.ndarray:
        """Whether it holds at each token: bool [T]."""
        found = contexts.places
        if self.place in ENCLOSURES:
            return found.enclosed[ENCLOSURES.index(self.place)]
        if self.place in LINES:
            return found.line_kind[LINES.index(self.place)]
        return found.after_colon if self.place == "after a colon" else found.line == np.arange(len(contexts))

    def in_words(self) -> str:
        """As a phrase."""
        if self.place == "after a colon":
            return "after a colon in the same line"
        return f"it is {self.place}" if self.place == "a line's first token" else f"inside {self.place}"


class Role(Record):
    """In a turn of a chat, or one of the template's own tokens."""

    kind: Literal["role"] = "role"
    role: Speaker

    def holds(self, contexts: Contexts) -> np.ndarray:
        """Whether it holds at each token: bool [T]."""
        return contexts.places.role == ROLES.index(self.role)

    def in_words(self) -> str:
        """As a phrase."""
        return "part of the chat template" if self.role == "template" else f"in the {self.role}'s turn"


class Repeat(Record):
    """What earlier text says of this token or the next.

    ``seen``: this token occurs earlier in the text. ``induced``: an earlier occurrence of the token before was followed
    by this one. ``next seen`` and ``next induced``: the same of the next token.
    """

    kind: Literal["repeat"] = "repeat"
    what: Literal["seen", "induced", "next seen", "next induced"]

    def holds(self, contexts: Contexts) -> np.ndarray:
        """Whether it holds at each token: bool [T]."""
        found = (contexts.earlier_same if self.what.endswith("seen") else contexts.earlier_pair) >= 0
        if not self.what.startswith("next"):
            return found
        return np.append(found[1:], False) & (contexts.shifted(1) != OUTSIDE)

    def in_words(self) -> str:
        """As a phrase."""
        return {
            "seen": "this token occurred earlier in the text",
            "induced": "the token before was followed by this one earlier in the text",
            "next seen": "the next token occurred earlier in the text",
            "next induced": "this token was followed by the next one earlier in the text (a copy)",
        }[self.what]


class Recent(Record):
    """One of ``ids`` stands among the ``within`` tokens before this one (None: earlier in the same line)."""

    kind: Literal["recent"] = "recent"
    within: int | None
    ids: tuple[int, ...]
    names: tuple[str, ...]

    def holds(self, contexts: Contexts) -> np.ndarray:
        """Whether it holds at each token: bool [T]."""
        rows = np.arange(len(contexts))
        last = np.maximum.accumulate(np.where(_member(contexts.ids, self.ids), rows, OUTSIDE))
        last = np.concatenate([[OUTSIDE], last])[:-1]
        start = contexts.starts[contexts.text]
        begin = contexts.places.line if self.within is None else np.maximum(start, rows - self.within)
        return (last >= begin) & (last >= 0)

    def in_words(self) -> str:
        """As a phrase."""
        where = "earlier in the line" if self.within is None else f"among the {self.within} tokens before"
        return f"{_listed(self.names)} stands {where}"


class Promoted(Record):
    """The next token is one of those that the latent makes more likely."""

    kind: Literal["promoted"] = "promoted"
    ids: tuple[int, ...]
    names: tuple[str, ...]

    def holds(self, contexts: Contexts) -> np.ndarray:
        """Whether it holds at each token: bool [T]."""
        return _member(contexts.shifted(1), self.ids)

    def in_words(self) -> str:
        """As a phrase."""
        return f"the next token is one that it promotes: {_listed(self.names)}"


class Not(Record):
    """A rule does not hold."""

    kind: Literal["not"] = "not"
    rule: "Rule"

    def holds(self, contexts: Contexts) -> np.ndarray:
        """Whether it holds at each token: bool [T]."""
        return ~self.rule.holds(contexts)

    def in_words(self) -> str:
        """As a phrase."""
        return f"not: {self.rule.in_words()}"


class All(Record):
    """Every one of ``rules`` holds."""

    kind: Literal["all"] = "all"
    rules: tuple["Rule", ...]

    def holds(self, contexts: Contexts) -> np.ndarray:
        """Whether it holds at each token: bool [T]."""
        return np.logical_and.reduce([rule.holds(contexts) for rule in self.rules])

    def in_words(self) -> str:
        """As a phrase."""
        return ", and ".join(rule.in_words() for rule in self.rules)


class Any(Record):
    """At least one of ``rules`` holds; with none, it never does."""

    kind: Literal["any"] = "any"
    rules: tuple["Rule", ...]

    def holds(self, contexts: Contexts) -> np.ndarray:
        """Whether it holds at each token: bool [T]."""
        return np.logical_or.reduce([np.zeros(len(contexts), dtype=bool), *(r.holds(contexts) for r in self.rules)])

    def in_words(self) -> str:
        """As a phrase."""
        return "; or ".join(rule.in_words() for rule in self.rules) or "never"


Rule = Annotated[
    TokenIn | Ngram | Shape | Affix | Position | Inside | Role | Repeat | Recent | Promoted | Not | All | Any,
    Field(discriminator="kind"),
]
for _combined in (Not, All, Any):
    _combined.model_rebuild()


def _member(ids: np.ndarray, chosen: Sequence[int]) -> np.ndarray:
    table = np.zeros(max(int(ids.max(initial=0)), *chosen, 0) + 2, dtype=bool)
    table[list(chosen)] = True
    return table[ids]  # OUTSIDE is -1, the last entry, which is always False


def _listed(names: Sequence[str]) -> str:
    shown = [f"“{one_line(name, 40)}”" for name in names[:_SHOWN]]
    rest = f" or {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return " or ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 and not rest else [", ".join(shown)]) + rest
