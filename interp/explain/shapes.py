"""Forms of a token that can be seen without knowing the word: capitals, digits, punctuation, how it starts and ends."""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np

from .contexts import Contexts

Form = Literal[
    "starts with a capital",
    "is in capitals",
    "is made of lower-case letters",
    "is made of letters",
    "holds a digit",
    "is punctuation",
    "is whitespace",
    "holds a line break",
    "holds a character beyond ASCII",
    "is a single character",
    "was added by the tokenizer",
    "is a word or number after a space",
    "is a word or number with no space before it",
]
SHAPES: tuple[Form, ...] = get_args(Form)
_TESTS: dict[Form, Callable[[str], bool]] = {
    "starts with a capital": lambda s: s.lstrip()[:1].isupper(),
    "is in capitals": lambda s: len(s.strip()) > 1 and s.isupper(),
    "is made of lower-case letters": lambda s: s.strip().isalpha() and s.islower(),
    "is made of letters": lambda s: s.strip().isalpha(),
    "holds a digit": lambda s: any(c.isdigit() for c in s),
    "is punctuation": lambda s: bool(s.strip()) and not any(c.isalnum() or c.isspace() for c in s.strip()),
    "is whitespace": lambda s: bool(s) and s.isspace(),
    "holds a line break": lambda s: "\n" in s,
    "holds a character beyond ASCII": lambda s: not s.isascii(),
    "is a single character": lambda s: len(s.strip()) == 1,
    "was added by the tokenizer": lambda s: not s,
}
AFFIX_LENGTHS = (1, 2, 3)


def shape(contexts: Contexts, name: Form) -> np.ndarray:
    """Whether each token has the form ``name`` of SHAPES: bool [T]."""
    known, form = contexts.forms
    if name not in _TESTS:
        letters = np.array([s.strip()[:1].isalnum() for s in known], dtype=bool)[form]
        return letters & (contexts.opens_word if name == "is a word or number after a space" else ~contexts.opens_word)
    return np.array([_TESTS[name](s) for s in known], dtype=bool)[form]


def affix(string: str, end: str, length: int) -> str:
    """The first or last ``length`` letters of a token, in lower case; empty where that would be all of it or more."""
    bare = string.strip().casefold()
    if len(bare) <= length or not bare.isalnum():
        return ""
    return bare[:length] if end == "starts" else bare[-length:]


def affixed(contexts: Contexts, end: str, texts: Sequence[str]) -> np.ndarray:
    """Whether each token ``starts`` or ``ends`` with one of ``texts`` and goes on beyond it: bool [T]."""
    known, form = contexts.forms
    lengths = {len(text) for text in texts}
    held = [any(affix(s, end, n) in texts for n in lengths) for s in known]
    return np.array(held, dtype=bool)[form]
