"""Statistics on the GPU: activations sorted by latent, then one program per latent, without atomics.

Sums therefore come out the same in every run. A latent that is active everywhere costs one program a loop over all its
values, which for the parts a stream is done in is short.
"""

# Launch options are no parameters of a kernel.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl

from ...features import FeatureCSR
from .order import ranked
from .record import LOWEST, N_BINS, Statistics


def statistics(features: FeatureCSR, first_token: int, top: int) -> Statistics:
    """See :func:`heredity.kernels.statistics`."""
    n_latents, device = features.n_latents, features.device
    by_value = ranked(features, first_token)
    top_values, top_tokens = by_value.top(top)
    total = torch.empty(n_latents, dtype=torch.float64, device=device)
    squares = torch.empty(n_latents, dtype=torch.float64, device=device)
    histogram = torch.empty(n_latents, N_BINS, dtype=torch.int64, device=device)
    if n_latents:
        reduce_latent[(n_latents,)](
            by_value.values, by_value.starts, total, squares, histogram, LOWEST, N_BINS, BLOCK=64, num_warps=1
        )
    return Statistics(
        count=by_value.count,
        sum=total,
        sum_of_squares=squares,
        max=top_values[:, 0].clone(),
        histogram=histogram,
        top_values=top_values,
        top_tokens=top_tokens,
        n_tokens=features.n_tokens,
    )


@triton.jit
def reduce_latent(
    values,
    starts,
    total,
    squares,
    histogram,
    LOWEST: tl.constexpr,
    N_BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums and histogram of the values of one latent, which stand together."""
    latent = tl.program_id(0)
    at = tl.load(starts + latent)
    end = tl.load(starts + latent + 1)
    sums = tl.zeros([BLOCK], tl.float64)
    sums_of_squares = tl.zeros([BLOCK], tl.float64)
    each_bin = tl.arange(0, N_BINS)
    counts = tl.zeros([N_BINS], tl.int32)
    # Not `for … in range(at, end)`: Triton 3.6 does not interpret loaded bounds.
    while at < end:
        place = at + tl.arange(0, BLOCK)
        inside = place < end
        value = tl.load(values + place, mask=inside, other=0.0)
        precise = value.to(tl.float64)
        sums += precise
        sums_of_squares += precise * precise
        exponent = (value.to(tl.int32, bitcast=True) >> 23) - 127
        its_bin = tl.minimum(tl.maximum(exponent - LOWEST + 1, 0), N_BINS - 1)
        its_bin = tl.where(value != value, N_BINS - 1, its_bin)
        its_bin = tl.where(inside, its_bin, -1)
        counts += tl.sum((its_bin[:, None] == each_bin[None, :]).to(tl.int32), 0)
        at += BLOCK
    tl.store(total + latent, tl.sum(sums, 0))
    tl.store(squares + latent, tl.sum(sums_of_squares, 0))
    tl.store(histogram + latent * N_BINS + each_bin, counts.to(tl.int64))
