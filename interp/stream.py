"""Activations of two models in step: the same characters of the same texts, shuffled, in bounded memory."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from .align import align
from .errors import StoreError
from .model import Encoded
from .store import Store

Tokens = dict[int, tuple[int, Encoded]]
"""The texts of one shard: number to (first row, tokens)."""


def stream(
    a: Store, b: Store, site_a: str, site_b: str, *, batch: int, seed: int, buffer_tokens: int = 131_072
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of aligned tokens, float32 [batch, *site shape] from each store; the last batch may be smaller.

    Row i of both is the same place in the same text (:func:`.align.align`); tokens without a partner are left out and
    every other occurs exactly once. Shards of ``a`` are drawn in random order into a buffer of at most
    ``buffer_tokens`` (at least one shard), whose tokens are then drawn in random order. Memory holds that buffer for
    both models (twice while it is filled) and one open shard of each. ``seed`` fixes the order.

    Raises:
        StoreError: the stores are of different texts; a site is absent; a shard is damaged.
    """
    if a.manifest.corpus != b.manifest.corpus:
        raise StoreError(
            f"captured on other texts than {a.directory}", where=str(b.directory), remedy="Capture both on one corpus."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(a.n_shards, generator=generator).tolist()
    home = homes(b)
    kept: tuple[Tensor, Tensor] | None = None
    for group in _groups(a, order, buffer_tokens):
        pieces = [piece for shard in group for piece in _aligned(a, b, site_a, site_b, shard, home)]
        if kept is not None:
            pieces.append(kept)
        if not pieces:
            continue
        left, right = torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])
        del pieces
        shuffled = torch.randperm(len(left), generator=generator)
        whole = len(left) - len(left) % batch
        for start in range(0, whole, batch):
            rows = shuffled[start : start + batch]
            yield left[rows].float(), right[rows].float()
        # The rest joins the next buffer, so that only the last batch of the epoch is short.
        kept = left[shuffled[whole:]], right[shuffled[whole:]]
    if kept is not None and len(kept[0]):
        yield kept[0].float(), kept[1].float()


def _aligned(
    a: Store, b: Store, site_a: str, site_b: str, shard: int, home: dict[int, int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The aligned values of one shard of ``a``, in one piece for each shard of ``b`` that has its texts."""
    tokens, values = shard_texts(a, shard), a.read(site_a, shard)
    for other in sorted({home[text] for text in tokens if text in home}):
        rows_a, rows_b = aligned_rows(tokens, shard_texts(b, other))
        yield values[rows_a], b.read(site_b, other)[rows_b]


def aligned_rows(a: Tokens, b: Tokens) -> tuple[Tensor, Tensor]:
    """Rows of two shards that hold aligned tokens, int64 [pair] each."""
    rows: list[tuple[int, int]] = []
    for text, (first_a, encoded_a) in a.items():
        if text in b:
            first_b, encoded_b = b[text]
            rows += [(first_a + i, first_b + j) for i, j in zip(*align(encoded_a, encoded_b), strict=True)]
    pairs = torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def shard_texts(store: Store, shard: int) -> Tokens:
    """The texts of one shard.

    Raises:
        StoreError: the index is damaged.
    """
    table = store.index(shard)
    ids, start, end = (table[name].to_pylist() for name in ("token", "start", "end"))
    texts = table["text"].to_numpy()
    firsts = np.flatnonzero(np.diff(texts, prepend=texts[0] - 1)).tolist()
    found: Tokens = {}
    for i, j in zip(firsts, [*firsts[1:], len(ids)], strict=True):
        # The text itself is not in the store; the corpus digest has vouched that it is the same.
        found[int(texts[i])] = i, Encoded("", tuple(ids[i:j]), tuple(zip(start[i:j], end[i:j], strict=True)))
    return found


def homes(store: Store) -> dict[int, int]:
    """The shard of each text.

    Raises:
        StoreError: the index is damaged.
    """
    found: dict[int, int] = {}
    for shard in range(store.n_shards):
        found.update(dict.fromkeys(np.unique(store.index(shard)["text"].to_numpy()).tolist(), shard))
    return found


def _groups(store: Store, order: Sequence[int], buffer_tokens: int) -> Iterator[list[int]]:
    group: list[int] = []
    room = 0
    for shard in order:
        n = store.index(shard).num_rows
        if group and n > room:
            yield group
            group = []
        if not group:
            room = buffer_tokens
        room -= n
        group.append(shard)
    yield group
