"""Running a model over a corpus: batches of like length, and activations written to a store as they come."""

from collections.abc import Sequence

from .model import Encoded


def batches(encoded: Sequence[Encoded], max_tokens: int) -> list[list[int]]:
    """Indices into ``encoded`` grouped so that a batch padded to its longest text has at most ``max_tokens`` tokens.

    Shortest first, equal lengths in the order given. A text longer than ``max_tokens`` is a batch by itself; one
    without tokens is in no batch.
    """
    return by_length([len(text.ids) for text in encoded], max_tokens)


def by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """:func:`batches` from token counts alone."""
    groups: list[list[int]] = []
    for i in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[i] <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
