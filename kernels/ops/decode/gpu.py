"""Decode on the GPU: one slab of the decoder's columns at a time, so that it stays in the L2 cache.

The grid runs over tokens first and over slabs last: a slab of 128 columns of 65,536 latents takes 17 MB in bfloat16, so
the many reads of one decoder row by different tokens hit the cache and the decoder is read from memory once.

Where many latents are active, a dense product of some tokens at a time takes over.
"""

# Launch options are no parameters of a kernel.
# pyright: reportCallIssue=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...features import FeatureCSR
from . import reference

ROWS = 16
"""Decoder rows in flight per program."""

COLUMNS = 128
"""Width of a slab."""

DENSE_FROM = {2: 0.0085, 4: 0.055}
"""Share of active latents from which the dense product should be faster, by bytes of an element. Not measured: reading
them all at 5.5 TB/s, the assumed rate of an H100's L2 cache, takes as long as products at 650 TFLOP/s in 16 bits or 50
in float32. ``benchmarks/kernels_gpu.py`` measures it."""

CHUNK = 512 * 2**20
"""Bytes of dense activations at a time (one token's, if those are more)."""


def decode(
    features: FeatureCSR,
    decoders: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    targets: Sequence[Tensor] | None,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """See :func:`heredity.kernels.decode` and, with ``targets``, :func:`heredity.kernels.residual`."""
    if features.mean_active > DENSE_FROM[features.dtype.itemsize] * features.n_latents:
        return _dense(features, decoders, biases, targets)
    if targets is None:
        return [rows(features, table, bias) for table, bias in zip(decoders, biases, strict=True)], None
    out, errors = [], []
    for table, bias, target in zip(decoders, biases, targets, strict=True):
        # A sum of its own per slab, added below, keeps the order of additions fixed.
        parts = torch.empty(_slabs(table), features.n_tokens, dtype=torch.float32, device=table.device)
        out.append(rows(features, table, bias, target, parts))
        errors.append(parts.sum(0))
    return out, errors


def _dense(
    features: FeatureCSR,
    decoders: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    targets: Sequence[Tensor] | None,
) -> tuple[list[Tensor], list[Tensor] | None]:
    n_rows = max(CHUNK // (features.n_latents * features.dtype.itemsize), 1)
    parts = [slice(first, first + n_rows) for first in range(0, features.n_tokens, n_rows)]
    done = [
        reference.decode(features[part], decoders, biases, None if targets is None else [t[part] for t in targets])
        for part in parts
    ]
    outs = [torch.cat(each) for each in zip(*(out for out, _ in done), strict=True)]
    errors = [torch.cat(each) for each in zip(*(error or () for _, error in done), strict=True)]
    return outs, None if targets is None else errors


def rows(
    features: FeatureCSR,
    table: Tensor,
    bias: Tensor | None = None,
    target: Tensor | None = None,
    errors: Tensor | None = None,
) -> Tensor:
    """Each token's sum of rows of ``table`` [F, D] times its activations, plus ``bias``: [T, D] in the table's dtype.

    With ``target`` [T, D], that minus the sum, and the squares of each slab's difference added up in ``errors``
    (float32 [slabs, T]).
    """
    n_tokens, width = features.n_tokens, table.shape[1]
    out = torch.empty(n_tokens, width, dtype=table.dtype, device=table.device)
    table = along_columns(table)
    target = None if target is None else along_columns(target)
    n_programs = n_tokens * _slabs(table)
    if n_programs:
        decode_slab[(n_programs,)](
            features.indptr,
            features.indices,
            features.values.contiguous(),
            table,
            None if bias is None else bias.contiguous(),
            target,
            out,
            errors,
            n_tokens,
            width,
            table.stride(0),
            0 if target is None else target.stride(0),
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=4,
        )
    return out


def along_columns(matrix: Tensor) -> Tensor:
    """The matrix with the entries of a row side by side; a copy only where they are not."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _slabs(table: Tensor) -> int:
    return -(-table.shape[1] // COLUMNS)


@triton.jit
def decode_slab(
    indptr,
    indices,
    values,
    table,
    bias,
    target,
    out,
    errors,
    n_tokens,
    width,
    table_stride,
    target_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One slab of one token."""
    token = (tl.program_id(0) % n_tokens).to(tl.int64)
    slab = tl.program_id(0) // n_tokens
    column = slab * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    end = tl.load(indptr + token + 1)
    start = tl.load(indptr + token)

    # Which rows come next is read while the present ones arrive.
    place = start + tl.arange(0, ROWS)
    latent = tl.load(indices + place, mask=place < end, other=0)
    value = tl.load(values + place, mask=place < end, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    while start < end:
        offset = latent.to(tl.int64)[:, None] * table_stride + column[None, :]
        row = tl.load(table + offset, mask=(place < end)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        start += ROWS
        place += ROWS
        latent = tl.load(indices + place, mask=place < end, other=0)
        next_value = tl.load(values + place, mask=place < end, other=0.0).to(tl.float32)
        total += value[:, None] * row
        value = next_value

    result = tl.sum(total, 0)
    if bias is not None:
        result += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if target is not None:
        wanted = tl.load(target + token * target_stride + column, mask=inside, other=0.0).to(tl.float32)
        result = wanted - result
        tl.store(errors + slab.to(tl.int64) * n_tokens + token, tl.sum(result * result, 0))
    tl.store(out + token * width + column, result.to(out.dtype.element_ty), mask=inside)
