"""Encode on the CPU: a product tile by tile, each tile searched for what can still be kept while it is in cache.

TopK tightens a floor per token as it goes: once k candidates are known, only larger ones (and, their latents being
lower, no equal ones of later tiles) can take their place. The idea is LiteTopK's (sglang pull request 40461). Tiles of
bfloat16 and float16 inputs are multiplied in float32, which these CPUs do faster, and rounded.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from ...features import FeatureCSR, starts

TOKENS, LATENTS = 1024, 2048
"""A tile: 8 MB of float32."""

WORD = 8
"""Flags that are looked at together when a tile is searched; almost all are zero."""


class Found(NamedTuple):
    """Entries [n] of some tokens, row by row, latents ascending within a row."""

    rows: Tensor
    latents: Tensor
    values: Tensor
    scores: Tensor


def encode(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    activation: Activation,
    norm: Tensor | None,
    window: float,
) -> FeatureCSR:
    """See :func:`heredity.kernels.encode`; ``window`` lowers JumpReLU's gate, for its pseudo-derivative."""
    n_tokens, n_latents = xs[0].shape[0], weights[0].shape[1]
    tiles = _Tiles(xs, weights, bias, norm)
    if isinstance(activation, BatchTopK) and activation.k is not None:
        found = _batch_top(tiles, activation.k * n_tokens)
    else:
        blocks = []
        for first in range(0, n_tokens, TOKENS):
            rows = slice(first, min(first + TOKENS, n_tokens))
            block = (
                _top(tiles, rows, activation.k)
                if isinstance(activation, TopK)
                else _above(tiles, rows, activation, window)
            )
            blocks.append(block._replace(rows=block.rows + first))
        found = _joined(blocks, xs[0])
    counts = torch.bincount(found.rows, minlength=n_tokens)
    return FeatureCSR(starts(counts), found.latents.int(), found.values.to(xs[0].dtype), n_latents)


class _Tiles:
    """Pre-activations and scores of a block of tokens on a run of latents."""

    def __init__(
        self, xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None, norm: Tensor | None
    ) -> None:
        self.xs, self.weights, self.bias, self.norm = xs, weights, bias, norm
        self.dtype = torch.promote_types(xs[0].dtype, torch.float32)
        self.n_tokens, self.n_latents = xs[0].shape[0], weights[0].shape[1]
        shape = min(TOKENS, self.n_tokens), -(-min(LATENTS, self.n_latents) // WORD) * WORD
        self.pre = torch.empty(shape, dtype=self.dtype)
        self.score = self.pre if norm is None else torch.empty_like(self.pre)
        self.flags = torch.empty(shape, dtype=torch.bool)

    def columns(self) -> list[slice]:
        """The runs of latents, ascending."""
        return [slice(a, min(a + LATENTS, self.n_latents)) for a in range(0, self.n_latents, LATENTS)]

    def fill(self, rows: slice, columns: slice) -> Tensor:
        """Compute a tile; return its scores, valid until the next."""
        width = columns.stop - columns.start
        pre = self.pre[: rows.stop - rows.start, :width]
        for m, (x, weight) in enumerate(zip(self.xs, self.weights, strict=True)):
            a, b = x[rows].to(self.dtype), weight[:, columns].to(self.dtype)
            if m:
                pre.addmm_(a, b)
            elif self.bias is None:
                torch.mm(a, b, out=pre)
            else:
                torch.addmm(self.bias[columns].to(self.dtype), a, b, out=pre)
        if self.xs[0].dtype != self.dtype:
            pre.copy_(pre.to(self.xs[0].dtype))
        if self.norm is None:
            return pre
        return torch.mul(pre, self.norm[columns].to(self.dtype), out=self.score[: pre.shape[0], :width])

    def search(self, score: Tensor, floor: Tensor | float, columns: slice) -> Found:
        """Entries of the tile last filled whose score is above ``floor`` ([rows, 1], [width] or one number)."""
        n_rows, width = score.shape
        stride = self.flags.shape[1]
        flags = self.flags[:n_rows]
        flags[:, width:] = False
        torch.gt(score, floor, out=flags[:, :width])
        words = flags.view(torch.int64).view(-1).nonzero().squeeze(1)
        word, place = flags.view(-1, WORD)[words].nonzero(as_tuple=True)
        flat = words[word] * WORD + place
        rows = flat.div(stride, rounding_mode="floor")
        values = self.pre.view(-1)[flat]
        scores = values if self.norm is None else self.score.view(-1)[flat]
        return Found(rows, flat - rows * stride + columns.start, values, scores)


def _above(tiles: _Tiles, rows: slice, activation: Activation, window: float) -> Found:
    """Entries above a threshold that is known beforehand."""
    floor: Tensor | float = 0.0
    if isinstance(activation, JumpReLU):
        threshold = torch.as_tensor(activation.threshold).to(tiles.dtype)
        floor = (threshold.clamp(min=0) - window).expand(tiles.n_latents)
    elif isinstance(activation, BatchTopK):
        floor = max(float(activation.threshold or 0.0), 0.0)
    elif not isinstance(activation, ReLU):
        raise TypeError(f"no such activation: {activation!r}")
    parts = []
    for columns in tiles.columns():
        score = tiles.fill(rows, columns)
        parts.append(tiles.search(score, floor[columns] if isinstance(floor, Tensor) else floor, columns))
    return _by_row(parts, rows.stop - rows.start, tiles.pre)


def _top(tiles: _Tiles, rows: slice, k: int) -> Found:
    """The k largest of each row."""
    n_rows = rows.stop - rows.start
    floor = tiles.pre.new_zeros(n_rows, 1)
    parts: list[Found] = []
    for columns in tiles.columns():
        score = tiles.fill(rows, columns)
        if not parts:
            floor = _first_floor(score, k)
        parts.append(tiles.search(score, floor, columns))
        if sum(len(part.rows) for part in parts) > 4 * k * n_rows or columns.stop == tiles.n_latents:
            best, floor = _best_of_rows(_by_row(parts, n_rows, tiles.pre), n_rows, k)
            parts = [best]
    return parts[0] if parts else _nothing(tiles.pre)


def _first_floor(score: Tensor, k: int) -> Tensor:
    """Per row a number [rows, 1] that at least k of these scores exceed (0, where fewer are known to be above it).

    The k-th largest of the maxima of groups: each of k groups then holds one score at least as large.
    """
    n_rows, width = score.shape
    size = max((s for s in (8, 4, 2, 1) if width // s >= 2 * k), default=0)
    if not size or not n_rows:
        return score.new_zeros(n_rows, 1)
    groups = width // size
    maxima = score[:, : groups * size].unflatten(1, (size, groups)).amax(1)
    kth = maxima.topk(k, dim=1).values[:, -1:]
    return torch.nextafter(kth, kth.new_full((), -torch.inf)).clamp_(min=0)


def _best_of_rows(found: Found, n_rows: int, k: int) -> tuple[Found, Tensor]:
    """At most the k largest per row, ties to the lowest latent, and per row the score [rows, 1] to beat from now on."""
    counts = torch.bincount(found.rows, minlength=n_rows)
    most = int(counts.max()) if n_rows else 0
    if most < k:
        return found, found.scores.new_zeros(n_rows, 1)
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(found.rows)) - starts[found.rows]
    padded = found.scores.new_zeros(n_rows, most).index_put_((found.rows, place), found.scores)
    # Rows with fewer than k candidates end in zeros, which nothing kept is equal to.
    kth = padded.topk(k, dim=1).values[:, -1:]
    above, equal = padded > kth, (padded == kth) & (padded > 0)
    keep = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    chosen = keep[found.rows, place].nonzero().squeeze(1)
    return Found(*(column[chosen] for column in found)), kth


def _batch_top(tiles: _Tiles, count: int) -> Found:
    """The ``count`` largest of all rows together, ties to the lowest latent, then to the first row."""
    parts: list[Found] = []
    floor = 0.0
    for first in range(0, tiles.n_tokens, TOKENS):
        rows = slice(first, min(first + TOKENS, tiles.n_tokens))
        for columns in tiles.columns():
            score = tiles.fill(rows, columns)
            if not parts:
                floor = _floor_of_all(score, count)
            found = tiles.search(score, floor, columns)
            parts.append(found._replace(rows=found.rows + first))
            if sum(len(part.rows) for part in parts) > 4 * count:
                parts = [_best_of_all(_joined(parts, tiles.pre), count)]
                # Equal scores stay in the running: theirs may be the lower latent.
                floor = float(torch.nextafter(parts[0].scores.min(), torch.tensor(0.0, dtype=tiles.dtype)))
    best = _best_of_all(_joined(parts, tiles.pre), count)
    order = torch.argsort(best.rows * tiles.n_latents + best.latents)
    return Found(*(column[order] for column in best))


def _floor_of_all(score: Tensor, count: int) -> float:
    """A number that at least ``count`` of these scores exceed (0, where fewer are known to be above it).

    As :func:`_first_floor`, for all rows together.
    """
    n_rows, width = score.shape
    size = max((s for s in (16, 8, 4, 2) if n_rows * (width // s) >= 2 * count), default=0)
    if not size:
        return 0.0
    groups = width // size
    maxima = score[:, : groups * size].unflatten(1, (size, groups)).amax(1).flatten()
    kth = maxima.kthvalue(len(maxima) - count + 1).values
    return max(0.0, float(torch.nextafter(kth, kth.new_full((), -torch.inf))))


def _best_of_all(found: Found, count: int) -> Found:
    if len(found.rows) <= count:
        return found
    kth = found.scores.topk(count, sorted=False).values.min()
    above = (found.scores > kth).nonzero().squeeze(1)
    equal = (found.scores == kth).nonzero().squeeze(1)
    by_row = equal[torch.argsort(found.rows[equal], stable=True)]
    order = by_row[torch.argsort(found.latents[by_row], stable=True)]
    chosen = torch.cat([above, order[: count - len(above)]])
    return Found(*(column[chosen] for column in found))


def _by_row(parts: list[Found], n_rows: int, like: Tensor) -> Found:
    """Parts with ascending latents, each row by row, as one such part. No sorting: each entry's place is known."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return _nothing(like)
    counts = torch.stack([torch.bincount(part.rows, minlength=n_rows) for part in parts], dim=1)
    ends = counts.flatten().cumsum(0).view_as(counts)
    inside = counts.cumsum(0) - counts
    joined = _joined(parts, like)
    shift = (ends - counts - inside).T
    places = [torch.arange(len(part.rows)) + shift[i][part.rows] for i, part in enumerate(parts)]
    place = torch.cat(places)
    return Found(*(torch.empty_like(column).index_put_((place,), column) for column in joined))


def _joined(parts: list[Found], like: Tensor) -> Found:
    if not parts:
        return _nothing(like)
    return Found(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _nothing(like: Tensor) -> Found:
    none = torch.empty(0, dtype=torch.int64)
    empty = torch.empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
    return Found(none, none, empty, empty)
