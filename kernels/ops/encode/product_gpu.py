"""The product of activations and encoder, gated and reduced while a tile is still in registers."""

# Triton's launch syntax has no types: a constexpr is given as what it holds.
# pyright: reportArgumentType=false

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

LATENTS = 32
"""Latents of a group."""

GROUP = tl.constexpr(LATENTS)

LARGE = 150_000
"""Bytes of shared memory that the largest tiles take (GPUs for graphics have 100 KB)."""


@dataclass(frozen=True)
class Gated:
    """Pre-activations of some tokens with all but the open entries at -inf.

    Attributes:
        p: [T, F rounded up to whole groups].
        best: [T, groups], the largest score of each group; float32 where scores are not pre-activations.
        norm: [F], what scores are multiplied by, or None.
        n_latents: F.
    """

    p: Tensor
    best: Tensor
    norm: Tensor | None
    n_latents: int


def padded(n_latents: int) -> int:
    """Latents rounded up to whole groups."""
    return -(-n_latents // LATENTS) * LATENTS


def multiply(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    norm: Tensor | None,
    gates: Tensor | None,
    floor: float,
) -> Gated:
    """Gated pre-activations of ``xs`` ([T, D_m], contiguous rows); ``weights`` [D_m, F] have a stride of 1.

    An entry is open if its score, the pre-activation times ``norm`` [F], exceeds ``gates`` (float32 [F]), or ``floor``
    where there are none. Products of float32 are exact to float32 unless ``torch.set_float32_matmul_precision`` allows
    TF32.
    """
    n_tokens, n_latents, dtype = xs[0].shape[0], weights[0].shape[1], xs[0].dtype
    strides = [stride for array in (*xs, *weights) for stride in array.stride() if stride != 1]
    regular = all(size % 64 == 0 for size in (n_latents, *(x.shape[1] for x in xs), *strides))
    interpreted = knobs.runtime.interpret
    # The interpreter takes its time per operation on a tile, and small tests should still have several tiles.
    processors, shared = (1, 0) if interpreted else _processors(xs[0].device)
    large = shared > LARGE and regular
    sizes = {"BT": 32, "BF": 128, "BD": 32} if interpreted else tiling(dtype, n_tokens, len(xs), large)
    n_tiles = triton.cdiv(n_tokens, sizes["BT"]) * triton.cdiv(n_latents, sizes["BF"])
    # Of the smaller tiles, a processor holds two.
    programs = min(n_tiles, processors * (1 if sizes["BF"] == 256 else 2))
    p = torch.empty(n_tokens, padded(n_latents), dtype=dtype, device=xs[0].device)
    n_groups = p.shape[1] // LATENTS
    best = torch.empty(n_tokens, n_groups, dtype=dtype if norm is None else torch.float32, device=p.device)
    product[(programs,)](
        tuple(xs),
        tuple(weights),
        tuple(x.shape[1] for x in xs),
        tuple(x.stride(0) for x in xs),
        tuple(w.stride(0) for w in weights),
        tuple(w.stride(1) for w in weights),
        bias,
        norm,
        gates,
        floor,
        p,
        best,
        n_tokens,
        n_latents,
        p.shape[1],
        SWATH=8,
        EVEN=all(x.shape[1] % sizes["BD"] == 0 for x in xs),
        PRECISION="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        INTERP=interpreted,
        **sizes,
    )
    return Gated(p, best, norm, n_latents)


def tiling(dtype: torch.dtype, n_tokens: int, n_models: int, large: bool) -> dict[str, int]:
    """Tile sizes of the product, its warps and stages: what compiles for sm_90 without spilling.

    ``large``: all sizes and strides are multiples of 64 elements, so that copies are asynchronous, and there is shared
    memory for more than ``LARGE`` bytes of them.
    """
    if dtype == torch.float32:
        return {"BT": 64, "BF": 128, "BD": 16, "num_warps": 8, "num_stages": 3 if large else 4}
    if n_tokens <= 64 or n_models > 2 or not large:
        return {"BT": 64, "BF": 128, "BD": 64, "num_warps": 4, "num_stages": 4}
    return {"BT": 128, "BF": 256, "BD": 64, "num_warps": 8, "num_stages": 3}


@cache
def _processors(device: torch.device) -> tuple[int, int]:
    """Their number, and bytes of shared memory of each."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_multiprocessor


@triton.jit
def product(
    xs, weights, widths, x_strides, weight_row_strides, weight_column_strides, bias, norm, gates, floor, p, best,
    n_tokens, n_latents, n_padded,
    BT: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, SWATH: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Tiles of BT tokens and BF latents, shared out evenly among programs. EVEN: BD divides the widths."""
    down, across = tl.cdiv(n_tokens, BT), tl.cdiv(n_latents, BF)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0)):
        # Tiles side by side share rows of W_enc in the L2 cache while SWATH rows of tiles are worked down.
        first = tile // (SWATH * across) * SWATH
        height = tl.minimum(down - first, SWATH)
        inside = tile % (SWATH * across)
        tokens = (first + inside % height) * BT + tl.arange(0, BT)
        latents = (inside // height) * BF + tl.arange(0, BF)
        acc = tl.zeros((BT, BF), tl.float32)
        for m in tl.static_range(len(xs)):
            within = tl.arange(0, BD)
            x = xs[m] + tokens[:, None] * x_strides[m] + within[None, :]
            column = latents.to(tl.int64) * weight_column_strides[m]
            w = weights[m] + within[:, None].to(tl.int64) * weight_row_strides[m] + column[None, :]
            for d in range(0, widths[m], BD):
                x_mask, w_mask = tokens[:, None] < n_tokens, latents[None, :] < n_latents
                if not EVEN:
                    x_mask &= (within < widths[m] - d)[None, :]
                    w_mask &= (within < widths[m] - d)[:, None]
                a = tl.load(x, mask=x_mask, other=0.0)
                b = tl.load(w, mask=w_mask, other=0.0)
                if INTERP:
                    a, b = a.to(tl.float32), b.to(tl.float32)
                acc = tl.dot(a, b, acc, input_precision=PRECISION)
                x += BD
                w += BD * weight_row_strides[m]
        # In quarters: a thread's share of bias, scale and gate of all columns would not fit the registers.
        left, right = halves(acc, BT, BF)
        first = (inside // height) * BF
        for i in tl.static_range(4):
            quarter = halves(left if i < 2 else right, BT, BF // 2)[i % 2]
            finish(
                quarter, tokens, first + i * (BF // 4), bias, norm, gates, floor, p, best,
                n_tokens, n_latents, n_padded, BT, BF // 4,
            )  # fmt: skip


@triton.jit
def halves(acc, BT: tl.constexpr, BF: tl.constexpr):
    """The left and the right half of a tile [BT, BF]."""
    return tl.split(tl.permute(tl.reshape(acc, (BT, 2, BF // 2)), (0, 2, 1)))


@triton.jit
def finish(
    acc, tokens, first, bias, norm, gates, floor, p, best, n_tokens, n_latents, n_padded,
    BT: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Gate and store a tile whose columns start at latent ``first``."""
    latents = first + tl.arange(0, BF)
    known = latents < n_latents
    if bias is not None:
        acc += tl.load(bias + latents, mask=known, other=0.0).to(tl.float32)[None, :]
    # Selection sees what will be stored, so rounding comes first.
    value = acc.to(p.dtype.element_ty).to(tl.float32)
    score = value
    if norm is not None:
        score *= tl.load(norm + latents, mask=known, other=0.0).to(tl.float32)[None, :]
    if gates is not None:
        gate = tl.load(gates + latents, mask=known, other=float("inf"))
    else:
        gate = tl.where(known, floor, float("inf"))
    is_open = score > gate[None, :]
    value = tl.where(is_open, value, float("-inf")).to(p.dtype.element_ty)
    rows = tokens[:, None].to(tl.int64)
    stored = (tokens < n_tokens)[:, None]
    columns = stored & (latents < n_padded)[None, :]
    tl.store(p + rows * n_padded + latents[None, :], value, mask=columns)
    score = tl.reshape(tl.where(is_open, score, float("-inf")), (BT, BF // GROUP, GROUP))
    groups = first // GROUP + tl.arange(0, BF // GROUP)
    n_groups = n_padded // GROUP
    columns = stored & (groups < n_groups)[None, :]
    tl.store(best + rows * n_groups + groups[None, :], tl.max(score, axis=2), mask=columns)
