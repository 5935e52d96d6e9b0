"""Which texts a rule is learned on and which it is scored on: no text, and no long beginning of one, on both sides."""

import hashlib

import numpy as np

from .contexts import Contexts

PREFIX = 32
"""Texts that begin with the same so many tokens (or are equal and shorter) go to the same side."""
SHARED = 16
"""From so many tokens on, a context that stands word for word on the other side is not scored."""


def halves(contexts: Contexts, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint halves of the tokens, bool [T] each, by content and ``seed``, not by the order of the texts.

    Groups of texts with one beginning are dealt in the order of their hash, each to the side with fewer tokens. Where
    one beginning (a chat's system prompt) leaves one side less than a quarter, whole texts are dealt instead. Positions
    of the second half whose whole text so far, ``SHARED`` tokens or more, also begins a text of the first are left out
    of it.
    """
    learn = _dealt(contexts, seed, PREFIX)
    if len(learn) and not 0.25 <= learn.mean() <= 0.75:
        learn = _dealt(contexts, seed, None)
    prefix = _prefix_hash(contexts)
    known = np.isin(prefix, prefix[learn]) & (contexts.position >= SHARED - 1)
    return learn, ~learn & ~known


def _dealt(contexts: Contexts, seed: int, length: int | None) -> np.ndarray:
    groups: dict[bytes, list[int]] = {}
    for number, text in enumerate(contexts.texts):
        beginning = np.array(text.ids[:length], dtype=np.int64).tobytes()
        key = hashlib.blake2b(beginning, digest_size=16, salt=seed.to_bytes(16, "little", signed=True)).digest()
        groups.setdefault(key, []).append(number)
    lengths = np.diff(contexts.starts)
    first = np.zeros(len(contexts.texts), dtype=bool)
    tokens = [0, 0]
    for key in sorted(groups):
        side = int(tokens[1] < tokens[0])
        first[groups[key]] = side == 0
        tokens[side] += int(lengths[groups[key]].sum())
    return first[contexts.text]


def _prefix_hash(contexts: Contexts) -> np.ndarray:
    """One number for each text up to each token, uint64 [T]: a sum of ids by random factors of the position."""
    longest = int(contexts.position.max(initial=0)) + 1
    factors = np.random.default_rng(0).integers(0, 2**64, longest, dtype=np.uint64)
    whole = np.cumsum((contexts.ids.astype(np.uint64) + np.uint64(1)) * factors[contexts.position], dtype=np.uint64)
    before = np.concatenate([np.zeros(1, np.uint64), whole])[contexts.starts[contexts.text]]
    return (whole - before) * np.uint64(2) + np.uint64(1) + contexts.position.astype(np.uint64) * factors[0]
