"""What is kept of gated pre-activations, found by way of the groups that can hold it; the result in compressed rows.

A token is one program. It works through its row in pieces as often as needed, so neither k nor the number of open
entries nor that of latents is limited; pieces come from the caches but for the first time. Entries are counted before
they are written, so nothing can overflow. The k-th largest of a row is found by bisection, as in RTop-K (Xie et al.
2024, arXiv:2409.00822), but on the bits of the numbers, which as integers have the same order: exactly, and in as many
steps as there are bits in which candidates differ.
"""

# Triton's functions have no types: a constexpr is given as what it holds, a pair is not seen to be returned.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl

from ...features import FeatureCSR, starts
from .product_gpu import GROUP, Gated

BITS = {torch.bfloat16: 15, torch.float16: 18, torch.float32: 31}
"""Leading bits of a positive float32 in which numbers of this dtype can differ."""

SPAN = 1024
"""Groups in a piece of a row."""

FEW, MANY = {"NUMBER": 16, "num_warps": 1}, {"NUMBER": 64, "num_warps": 4}
"""Listed groups in a piece: those of a threshold are as many as come, those of k are passed over at every step."""


def above(gated: Gated, floor: float) -> FeatureCSR:
    """Every open entry whose score is not below ``floor``."""
    return _select(gated, floor, 0)


def top(gated: Gated, k: int) -> FeatureCSR:
    """Each token's k largest open entries of positive score; ties go to the lowest latent."""
    return _select(gated, 0.0, k)


def _select(gated: Gated, floor: float, k: int) -> FeatureCSR:
    """The k largest, or if k is 0 everything that is not below ``floor``."""
    p, best = gated.p, gated.best
    n_tokens, n_groups = best.shape
    capacity = min(k, n_groups) if k else n_groups
    listed = torch.empty(n_tokens, capacity, dtype=torch.int32, device=p.device)
    n_listed, counts, kths, ends, rooms = torch.empty(5, n_tokens, dtype=torch.int32, device=p.device)
    way = {"TOP": k > 0, "BITS": BITS[best.dtype]}
    grid = (n_tokens,)
    groups[grid](best, floor, listed, n_listed, kths, ends, n_groups, k, capacity, SPAN=SPAN, **way)
    row = (p, gated.norm, floor, listed, n_listed, capacity, gated.n_latents, p.shape[1])
    way |= MANY if k else FEW
    measure[grid](*row, counts, kths, ends, rooms, k, **way)
    indptr = starts(counts)
    indices = torch.empty(int(indptr[-1]), dtype=torch.int32, device=p.device)
    values = torch.empty(len(indices), dtype=p.dtype, device=p.device)
    write[grid](*row, indptr, kths, rooms, indices, values, **way)
    return FeatureCSR(indptr, indices, values, gated.n_latents)


@triton.jit
def keys_of(score, BITS: tl.constexpr):
    """Positive numbers as integers below 2**BITS of the same order, everything else as 0."""
    return tl.where(score > 0, score, 0.0).to(tl.int32, bitcast=True) >> (31 - BITS)


@triton.jit
def best_scores(best, token, start, n_groups, SPAN: tl.constexpr):
    """Best scores [SPAN] of a token's groups from ``start`` on; -inf where there is none."""
    group = start + tl.arange(0, SPAN)
    score = tl.load(best + token * n_groups + group, mask=group < n_groups, other=float("-inf"))
    return group, score.to(tl.float32)


@triton.jit
def groups(
    best, floor, listed, n_listed, kths, ends, n_groups, k, capacity,
    SPAN: tl.constexpr, TOP: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """List a token's groups whose best score is open and not below ``floor``; TOP: is among the k largest.

    TOP: also the key of the k-th best score (0 if fewer than k are positive), and one more than the largest key.
    """
    token = tl.program_id(0).to(tl.int64)
    kth = 0
    room = 0
    if TOP:
        end = 1
        for start in range(0, n_groups, SPAN):
            _, score = best_scores(best, token, start, n_groups, SPAN)
            end = tl.maximum(end, tl.max(keys_of(score, BITS), 0) + 1)
        tl.store(ends + token, end)
        n_larger = 0
        while end - kth > 1:
            middle = kth + (end - kth) // 2
            n = 0
            for start in range(0, n_groups, SPAN):
                _, score = best_scores(best, token, start, n_groups, SPAN)
                n += tl.sum((keys_of(score, BITS) >= middle).to(tl.int32), 0)
            n_larger = tl.where(n >= k, n_larger, n)
            end = tl.where(n >= k, end, middle)
            kth = tl.where(n >= k, middle, kth)
        tl.store(kths + token, kth)
        # Of groups that tie at the k-th place the first are enough, if there are k groups in all.
        room = capacity - n_larger
    total = 0
    for start in range(0, n_groups, SPAN):
        group, score = best_scores(best, token, start, n_groups, SPAN)
        if TOP:
            keys = keys_of(score, BITS)
            equal = ((keys == kth) & (keys > 0)).to(tl.int32)
            chosen = (keys > kth) | ((equal > 0) & (tl.cumsum(equal, 0) <= room))
            room -= tl.sum(equal, 0)
        else:
            chosen = (score > float("-inf")) & (score >= floor)
        place = total + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(listed + token * capacity + place, group, mask=chosen)
        total += tl.sum(chosen.to(tl.int32), 0)
    tl.store(n_listed + token, total)


@triton.jit
def entries(p, norm, listed, token, start, n, capacity, n_latents, n_padded, NUMBER: tl.constexpr):
    """Latents, values and scores [NUMBER * 32] of a token's listed groups from ``start`` on; -inf: there is none."""
    place = start + tl.arange(0, NUMBER)
    group = tl.load(listed + token * capacity + place, mask=place < n, other=0)
    latent = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    known = (place < n)[:, None] & (latent < n_latents)
    value = tl.load(p + token * n_padded + latent, mask=known, other=float("-inf"))
    score = value.to(tl.float32)
    if norm is not None:
        scale = tl.load(norm + latent, mask=known, other=1.0).to(tl.float32)
        # -inf times a norm of 0 would be no number.
        is_open = score > float("-inf")
        score = tl.where(is_open, tl.where(is_open, score, 0.0) * scale, score)
    size: tl.constexpr = NUMBER * GROUP
    return tl.reshape(latent, (size,)), tl.reshape(value, (size,)), tl.reshape(score, (size,))


@triton.jit
def measure(
    p, norm, floor, listed, n_listed, capacity, n_latents, n_padded, counts, kths, ends, rooms, k,
    TOP: tl.constexpr, BITS: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """Number of entries to keep; TOP: also the key of the k-th, and how many of those that tie with it are kept."""
    token = tl.program_id(0).to(tl.int64)
    end = tl.load(n_listed + token)
    if TOP:
        # The k best scores of groups are scores, so the k-th of all scores is no smaller.
        kth = tl.load(kths + token)
        last = tl.load(ends + token)
        n_larger = 0
        while last - kth > 1:
            middle = kth + (last - kth) // 2
            n = 0
            start = 0
            while start < end:
                _, _, score = entries(p, norm, listed, token, start, end, capacity, n_latents, n_padded, NUMBER)
                n += tl.sum((keys_of(score, BITS) >= middle).to(tl.int32), 0)
                start += NUMBER
            n_larger = tl.where(n >= k, n_larger, n)
            last = tl.where(n >= k, last, middle)
            kth = tl.where(n >= k, middle, kth)
        tl.store(counts + token, tl.where(kth > 0, k, n_larger))
        tl.store(kths + token, kth)
        tl.store(rooms + token, k - n_larger)
    else:
        total = 0
        start = 0
        while start < end:
            _, _, score = entries(p, norm, listed, token, start, end, capacity, n_latents, n_padded, NUMBER)
            total += tl.sum(((score > float("-inf")) & (score >= floor)).to(tl.int32), 0)
            start += NUMBER
        tl.store(counts + token, total)


@triton.jit
def write(
    p, norm, floor, listed, n_listed, capacity, n_latents, n_padded, indptr, kths, rooms, indices, values,
    TOP: tl.constexpr, BITS: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """Store what ``measure`` counted, in ascending order of latents."""
    token = tl.program_id(0).to(tl.int64)
    end = tl.load(n_listed + token)
    place = tl.load(indptr + token)
    if TOP:
        kth = tl.load(kths + token)
        room = tl.load(rooms + token)
    start = 0
    while start < end:
        latent, value, score = entries(p, norm, listed, token, start, end, capacity, n_latents, n_padded, NUMBER)
        if TOP:
            keys = keys_of(score, BITS)
            equal = ((keys == kth) & (keys > 0)).to(tl.int32)
            chosen = (keys > kth) | ((equal > 0) & (tl.cumsum(equal, 0) <= room))
            room -= tl.sum(equal, 0)
        else:
            chosen = (score > float("-inf")) & (score >= floor)
        places = place + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(indices + places, latent, mask=chosen)
        tl.store(values + places, value, mask=chosen)
        place += tl.sum(chosen.to(tl.int32), 0)
        start += NUMBER
