"""Attribution on the GPU: one matrix product per position.

The nodes of a position stand together and share its gradients, so their scores are a product of the two; gathering the
gradients of every node first, as graph builders do, moves each of them as many times as the position has nodes.
"""

# Launch options are no parameters of a kernel.
# pyright: reportCallIssue=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from ...features import FeatureCSR
from ..worklist import worklist

TILES = (16, 32, 64)
"""Edges of a tile of scores: nodes of one position by gradients."""

DEPTH = 128
"""Bytes of a row that are multiplied at a time."""


def attribute(gradients: Sequence[Tensor], features: FeatureCSR, decoders: Sequence[Tensor]) -> Tensor:
    """See :mod:`heredity.kernels.ops.attribute.reference`, which defines it."""
    n_batch, n_positions, _ = gradients[0].shape
    dtype, device = gradients[0].dtype, features.device
    nodes = _tile(-(-features.nnz // max(n_positions, 1)))
    batch = _tile(n_batch)
    work = worklist(features.indptr, nodes, features.nnz)
    n_programs = len(work.group) * -(-n_batch // batch)
    last = len(gradients) - 1
    scores = None
    for i, (gradient, decoder) in enumerate(zip(gradients, decoders, strict=True)):
        gradient = gradient if gradient.stride(2) == 1 else gradient.contiguous()
        decoder = decoder if decoder.stride(1) == 1 else decoder.contiguous()
        previous = scores
        # Sums over several sources are kept in float32 until the last is added.
        kept = dtype if i == last else torch.float32
        scores = torch.empty(n_batch, features.nnz, dtype=kept, device=device)
        if n_programs:
            attribute_tile[(n_programs,)](
                *(work.group, work.start, work.end, features.indices, gradient, decoder, previous, scores),
                *(n_batch, features.nnz, gradient.stride(0), gradient.stride(1), decoder.stride(0)),
                WIDTH=decoder.shape[1],
                BATCH=batch,
                NODES=nodes,
                DEPTH=DEPTH // dtype.itemsize,
                UPCAST=knobs.runtime.interpret,
                num_warps=warps(batch, nodes),
                num_stages=3,
            )
    assert scores is not None
    return scores


def _tile(size: int) -> int:
    """The smallest tile that holds ``size``, or the largest."""
    return next((tile for tile in TILES if tile >= size), TILES[-1])


def warps(batch: int, nodes: int) -> int:
    """Enough for a tile that no register is spilled."""
    return 8 if batch * nodes > 1024 else 4


@triton.jit
def attribute_tile(
    group,
    start,
    end,
    indices,
    gradient,
    decoder,
    previous,
    scores,
    n_batch,
    n_active,
    batch_stride,
    position_stride,
    decoder_stride,
    WIDTH: tl.constexpr,
    BATCH: tl.constexpr,
    NODES: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Scores of some nodes of one position under some of the gradients."""
    # Tiles that share decoder rows run next to each other.
    blocks = tl.cdiv(n_batch, BATCH)
    piece = tl.program_id(0) // blocks
    first = tl.load(start + piece)
    last = tl.load(end + piece)
    if first >= last:
        return
    position = tl.load(group + piece)
    node = first + tl.arange(0, NODES)
    latent = tl.load(indices + node, mask=node < last, other=0).to(tl.int64)
    which = (tl.program_id(0) % blocks).to(tl.int64) * BATCH + tl.arange(0, BATCH)
    gradient_row = gradient + which[:, None] * batch_stride + position * position_stride
    decoder_row = decoder + latent[:, None] * decoder_stride
    place = which[:, None] * n_active + node[None, :]
    wanted = (which < n_batch)[:, None] & (node < last)[None, :]

    total = tl.zeros([BATCH, NODES], tl.float32)
    for left in range(0, WIDTH, DEPTH):
        column = left + tl.arange(0, DEPTH)
        inside = (column < WIDTH)[None, :]
        g = tl.load(gradient_row + column[None, :], mask=inside & (which < n_batch)[:, None], other=0.0)
        w = tl.load(decoder_row + column[None, :], mask=inside & (node < last)[:, None], other=0.0)
        if UPCAST:
            # The interpreter multiplies the bits of bfloat16.
            g = g.to(tl.float32)
            w = w.to(tl.float32)
        total = tl.dot(g, tl.trans(w), total, input_precision="ieee")
    if previous is not None:
        total += tl.load(previous + place, mask=wanted, other=0.0)
    tl.store(scores + place, total.to(scores.dtype.element_ty), mask=wanted)
