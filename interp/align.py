"""Positions of two tokenizations of one text at which the same characters have been read, and tokens both know."""

from typing import Any

import torch
from torch import Tensor

from .model import Encoded


def align(a: Encoded, b: Encoded) -> tuple[list[int], list[int]]:
    """Positions in ``a`` and in ``b``, pairwise, whose spans end at the same character (both strictly increasing).

    At such a pair both models have read the same prefix, so their next-token predictions start at the same character.
    Where one is a beginning of the other (same tokenizer, perhaps cut at another context length) every position is
    paired with itself. Otherwise, of several tokens that share the bytes of one character only the last has read it,
    special tokens before the text are paired from the last backwards, and other tokens with empty spans are left out.

    Raises:
        ValueError: the two are not the same text.
    """
    if a.text != b.text:
        raise ValueError("only two tokenizations of the same text can be aligned")
    n = min(len(a.ids), len(b.ids))
    if a.ids[:n] == b.ids[:n] and a.spans[:n] == b.spans[:n]:
        return list(range(n)), list(range(n))
    leading_a, leading_b = _leading(a), _leading(b)
    k = min(leading_a, leading_b)
    left = list(range(leading_a - k, leading_a))
    right = list(range(leading_b - k, leading_b))
    position_b = _last_ending_at(b)
    for end, i in _last_ending_at(a).items():
        j = position_b.get(end, -1)
        # Offsets of a tokenizer that reorders characters may run backwards; pairs never do.
        if j >= leading_b and (not left or (i > left[-1] and j > right[-1])):
            left.append(i)
            right.append(j)
    return left, right


def same_vocabulary(a: Any, b: Any) -> bool:
    """Whether two tokenizers give every token string the same id, added tokens included."""
    return a.get_vocab() == b.get_vocab()


def shared_vocabulary(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Ids of the token strings that both tokenizers have, int64 [shared] each, ordered by the id in ``a``."""
    vocabulary_a, vocabulary_b = a.get_vocab(), b.get_vocab()
    shared = sorted((i, vocabulary_b[token]) for token, i in vocabulary_a.items() if token in vocabulary_b)
    ids = torch.tensor(shared, dtype=torch.int64).reshape(-1, 2)
    return ids[:, 0].contiguous(), ids[:, 1].contiguous()


def _leading(encoded: Encoded) -> int:
    return next((i for i, (start, end) in enumerate(encoded.spans) if end > start), len(encoded.spans))


def _last_ending_at(encoded: Encoded) -> dict[int, int]:
    last: dict[int, int] = {}
    for i, (start, end) in enumerate(encoded.spans):
        if end > start:
            last.pop(end, None)  # so that the order of keys is that of the positions
            last[end] = i
    return last
