"""The Triton kernel of decode compiles for compute capability 9.0 without spilling registers."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("with_target", [False, True])
@pytest.mark.parametrize("width", ["i32", "i32:16"])
def test_decode_slab(dtype: str, with_target: bool, width: str, compiled: Callable[..., Any]) -> None:
    from heredity.kernels.ops.decode.gpu import COLUMNS, ROWS, decode_slab

    signature = {"indptr": "*i64", "indices": "*i32", "n_tokens": "i32", "width": width, "table_stride": width}
    signature |= dict.fromkeys(("values", "table", "bias", "out"), f"*{dtype}")
    constants: dict[str, Any] = {"ROWS": ROWS, "COLUMNS": COLUMNS}
    if with_target:
        signature |= {"target": f"*{dtype}", "target_stride": width, "errors": "*fp32"}
    else:
        signature |= {"target_stride": "i32"}
        constants |= {"target": None, "errors": None}
    used = compiled(decode_slab, signature, constants, num_warps=4)
    assert used.spilled == 0
    # Eight blocks of 128 threads fit a multiprocessor's 65,536 registers.
    assert used.registers <= 64
