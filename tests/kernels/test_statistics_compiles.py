"""The Triton kernel of statistics compiles for compute capability 9.0 without spilling registers."""

from collections.abc import Callable
from typing import Any


def test_reduce_latent(compiled: Callable[..., Any]) -> None:
    from heredity.kernels.ops.statistics.gpu import LOWEST, N_BINS, reduce_latent

    pointers = {"values": "*fp32", "starts": "*i64", "total": "*fp64", "squares": "*fp64", "histogram": "*i64"}
    used = compiled(reduce_latent, pointers, {"LOWEST": LOWEST, "N_BINS": N_BINS, "BLOCK": 64}, num_warps=1)
    assert used.spilled == 0
    # Sixteen blocks of one warp fit a multiprocessor's 65,536 registers.
    assert used.registers <= 128
