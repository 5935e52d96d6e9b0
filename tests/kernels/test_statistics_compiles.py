"""The Triton kernel of statistics compiles for compute capability 9.0 without spilling registers."""

from collections.abc import Callable
from typing import Any


def test_reduce_latent(compiled: Callable[..., Any]) -> None:
    from heredity.kernels.ops.statistics.gpu import reduce_latent

    pointers = {"values": "*fp32", "starts": "*i64", "total": "*fp64", "squares": "*fp64", "histogram": "*i64"}
    used = compiled(reduce_latent, pointers, {"LOWEST": -10, "N_BINS": 32, "BLOCK": 64}, num_warps=1)
    assert used.spilled == 0
