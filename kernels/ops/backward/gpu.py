"""Backward on the GPU: one program per latent yields its rows of all gradients.

A program goes twice over its activations, which stand together once ordered by latent. The gradient of an activation is
a dot product over the whole width, so the first sweep computes those, and the second, slab by slab of the width, what
is summed over tokens; what it reads is then in the cache. Latents with many activations are cut into pieces whose sums
a second kernel adds, so no result depends on the order in which programs run.

Gradients of the decoder and of the activations in one pass are from sparsify (EleutherAI), ``xformers.py``.
"""

# Launch options are no parameters of a kernel.
# pyright: reportCallIssue=false

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...features import FeatureCSR, starts
from ..decode.gpu import along_columns, rows
from ..worklist import Worklist, worklist
from .gradients import Gradients

PIECE = 256
"""Activations of one program, or more where there would be more than ``MOST_PIECES`` of this size."""

MOST_PIECES = 4096
"""Several times what a GPU runs at once; bounds the memory for sums of pieces."""

ROWS = 8
"""Activations in flight per program."""

SLAB = 512
"""Bytes of a row in a slab: a warp's widest load."""


def backward(
    features: FeatureCSR,
    active: Tensor | None,
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    decoders: Sequence[Tensor],
    extra: Tensor | None,
    want_x: bool,
) -> Gradients:
    """See :mod:`heredity.kernels.ops.backward.reference`, which defines it."""
    n_latents, device = features.n_latents, features.device
    values = features.values.contiguous()
    active = values > 0 if active is None else active.contiguous()
    if extra is None:
        da = torch.zeros(features.nnz, dtype=torch.float32, device=device)
    else:
        da = extra.to(torch.float32, copy=True).contiguous()
    pieces = _pieces(features)
    # Sums over tokens need the gradient of an activation from all models: the first model's comes last, with its sums.
    for grad, decoder in zip(grads[1:], decoders[1:], strict=True):
        _launch(pieces, features, values, active, da, grad, decoder, None, None)
    out_bias = torch.empty(n_latents, dtype=weights[0].dtype, device=device)
    outs = []
    for m, (grad, x, weight, decoder) in enumerate(zip(grads, xs, weights, decoders, strict=True)):
        sums = _Sums(
            torch.empty(decoder.shape, dtype=decoder.dtype, device=device),
            torch.empty(decoder.shape, dtype=weight.dtype, device=device),
            out_bias,
        )
        _launch(pieces, features, values, active, da, grad, decoder if m == 0 else None, x, sums)
        outs.append(sums)
    out_xs = None
    if want_x:
        masked = features.with_values(torch.where(active, da, 0.0))
        out_xs = [rows(masked, weight.T) for weight in weights]
    return Gradients(
        decoders=[sums.decoder for sums in outs],
        values=da.to(values.dtype),
        weights=[sums.weight.T for sums in outs],
        bias=out_bias,
        xs=out_xs,
    )


class _Sums(NamedTuple):
    """Over tokens, of one model: [F, D], [F, D] and, the same for all models, [F]."""

    decoder: Tensor
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, eq=False)
class _Pieces:
    """How latents are divided among programs. Sums of a piece that is not all of its latent are put by in a slot.

    Attributes:
        work: the pieces.
        slot: int64 [pieces], the slot of each, or -1.
        slots: int64 [F + 1], latent f has slots ``slots[f]:slots[f + 1]``.
        divided: int64, latents that have slots, then F.
        n_slots: as many as there can be.
    """

    work: Worklist
    slot: Tensor
    slots: Tensor
    divided: Tensor
    n_slots: int


def _pieces(features: FeatureCSR) -> _Pieces:
    n_active = features.nnz
    size = max(PIECE, 1 << (n_active // MOST_PIECES).bit_length())
    work = worklist(features.by_latent.indptr, size, n_active)
    counts = work.first.diff()
    counts = torch.where(counts > 1, counts, 0)
    slots = starts(counts)
    each = torch.arange(len(work.group), device=features.device)
    # Pieces beyond the last latent are left over and look at none.
    padded = torch.nn.functional.pad(counts, (0, 1))
    slot = torch.where(padded[work.group] > 0, slots[work.group] + each - work.first[work.group], -1)
    # Bounds, because counting would stop for the device. A latent is active at most once per token.
    n_divided = n_active // (size + 1) if features.n_tokens > size else 0
    n_slots = n_active // size + n_divided if n_divided else 0
    nth = torch.arange(1, n_divided + 1, device=features.device)
    return _Pieces(work, slot, slots, torch.searchsorted((counts > 0).cumsum(0), nth), n_slots)


def _launch(
    pieces: _Pieces,
    features: FeatureCSR,
    values: Tensor,
    active: Tensor,
    da: Tensor,
    grad: Tensor,
    decoder: Tensor | None,
    x: Tensor | None,
    outs: _Sums | None,
) -> None:
    """For one model, add to ``da`` if ``decoder`` is given, then fill ``outs`` if given, of which ``x`` is part."""
    work, view = pieces.work, features.by_latent
    n_programs, n_latents, width = len(work.group), features.n_latents, grad.shape[1]
    if n_programs == 0:
        return
    matrices = [None if each is None else along_columns(each) for each in (grad, x, decoder)]
    put_by: list[Tensor | None] = [None, None, None]
    if outs is not None:
        shapes = [(pieces.n_slots, width), (pieces.n_slots, width), (pieces.n_slots,)]
        put_by = [torch.empty(shape, dtype=torch.float32, device=da.device) for shape in shapes]
    strides = [0 if each is None else each.stride(0) for each in matrices]
    backward_piece[(n_programs,)](
        *(work.group, work.start, work.end, pieces.slot, view.order, view.tokens, values, active, da),
        *matrices,
        *(outs or (None, None, None)),
        *put_by,
        *(n_latents, *strides),
        WIDTH=width,
        ROWS=ROWS,
        COLUMNS=SLAB // grad.dtype.itemsize,
        num_warps=4,
    )
    n_divided, columns = len(pieces.divided), SLAB // torch.float32.itemsize
    if outs is not None and n_divided:
        add_pieces[(n_divided, -(-width // columns))](
            *(pieces.divided, pieces.slots, *put_by, *outs, n_latents),
            WIDTH=width,
            ROWS=ROWS,
            COLUMNS=columns,
            num_warps=4,
        )


@triton.jit
def backward_piece(
    group,
    start,
    end,
    slot,
    order,
    tokens,
    values,
    active,
    da,
    grad,
    x,
    decoder,
    out_decoder,
    out_weight,
    out_bias,
    put_by_decoder,
    put_by_weight,
    put_by_bias,
    n_latents,
    grad_stride,
    x_stride,
    decoder_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One piece of one latent: dot products where ``decoder`` is given, sums over tokens where ``x`` is."""
    piece = tl.program_id(0)
    latent = tl.load(group + piece)
    if latent >= n_latents:
        return
    first = tl.load(start + piece)
    last = tl.load(end + piece)
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, COLUMNS)

    if decoder is not None:
        at = first
        while at < last:
            there = at + row < last
            token = tl.load(tokens + at + row, mask=there, other=0)
            place = tl.load(order + at + row, mask=there, other=0)
            before = tl.load(da + place, mask=there, other=0.0)
            dot = tl.zeros([ROWS, COLUMNS], tl.float32)
            for left in range(0, WIDTH, COLUMNS):
                column = left + lane
                inside = column < WIDTH
                both = there[:, None] & inside[None, :]
                g = tl.load(grad + token[:, None] * grad_stride + column[None, :], mask=both, other=0.0)
                w = tl.load(decoder + latent * decoder_stride + column, mask=inside, other=0.0)
                dot += g.to(tl.float32) * w.to(tl.float32)[None, :]
            tl.store(da + place, before + tl.sum(dot, 1), mask=there)
            at += ROWS
        # Other threads of this program wrote what is read below.
        tl.debug_barrier()

    if x is not None:
        put_by = tl.load(slot + piece)
        for left in range(0, WIDTH, COLUMNS):
            column = left + lane
            inside = column < WIDTH
            sum_g = tl.zeros([ROWS, COLUMNS], tl.float32)
            sum_x = tl.zeros([ROWS, COLUMNS], tl.float32)
            sum_d = tl.zeros([ROWS], tl.float32)
            at = first
            while at < last:
                there = at + row < last
                token = tl.load(tokens + at + row, mask=there, other=0)
                place = tl.load(order + at + row, mask=there, other=0)
                chosen = tl.load(active + place, mask=there, other=0) != 0
                a = tl.load(values + place, mask=chosen, other=0.0).to(tl.float32)
                d = tl.load(da + place, mask=chosen, other=0.0)
                both = there[:, None] & inside[None, :]
                g = tl.load(grad + token[:, None] * grad_stride + column[None, :], mask=both, other=0.0)
                sum_g += a[:, None] * g.to(tl.float32)
                x_row = tl.load(x + token[:, None] * x_stride + column[None, :], mask=both, other=0.0)
                sum_x += d[:, None] * x_row.to(tl.float32)
                sum_d += d
                at += ROWS
            for_decoder = tl.sum(sum_g, 0)
            for_weight = tl.sum(sum_x, 0)
            for_bias = tl.sum(sum_d, 0)
            if put_by < 0:
                to = latent * WIDTH + column
                tl.store(out_decoder + to, for_decoder.to(out_decoder.dtype.element_ty), mask=inside)
                tl.store(out_weight + to, for_weight.to(out_weight.dtype.element_ty), mask=inside)
                tl.store(out_bias + latent, for_bias.to(out_bias.dtype.element_ty))
            else:
                to = put_by * WIDTH + column
                tl.store(put_by_decoder + to, for_decoder, mask=inside)
                tl.store(put_by_weight + to, for_weight, mask=inside)
                tl.store(put_by_bias + put_by, for_bias)


@triton.jit
def add_pieces(
    divided,
    slots,
    put_by_decoder,
    put_by_weight,
    put_by_bias,
    out_decoder,
    out_weight,
    out_bias,
    n_latents,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One slab of the sums of one latent that was divided."""
    latent = tl.load(divided + tl.program_id(0))
    if latent >= n_latents:
        return
    at = tl.load(slots + latent)
    last = tl.load(slots + latent + 1)
    row = tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    sum_decoder = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_bias = tl.zeros([ROWS], tl.float32)
    while at < last:
        there = at + row < last
        both = there[:, None] & inside[None, :]
        place = (at + row)[:, None] * WIDTH + column[None, :]
        sum_decoder += tl.load(put_by_decoder + place, mask=both, other=0.0)
        sum_weight += tl.load(put_by_weight + place, mask=both, other=0.0)
        sum_bias += tl.load(put_by_bias + at + row, mask=there, other=0.0)
        at += ROWS
    to = latent * WIDTH + column
    tl.store(out_decoder + to, tl.sum(sum_decoder, 0).to(out_decoder.dtype.element_ty), mask=inside)
    tl.store(out_weight + to, tl.sum(sum_weight, 0).to(out_weight.dtype.element_ty), mask=inside)
    tl.store(out_bias + latent, tl.sum(sum_bias, 0).to(out_bias.dtype.element_ty))
