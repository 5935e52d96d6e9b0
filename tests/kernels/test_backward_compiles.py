"""The Triton kernels of backward compile for compute capability 9.0 without spilling registers."""

from collections.abc import Callable
from typing import Any

import pytest

SUMS = ("out_decoder", "out_weight", "out_bias")
PUT_BY = ("put_by_decoder", "put_by_weight", "put_by_bias")


@pytest.mark.parametrize("width", [2304, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("given", ["both", "decoder", "x"])
def test_backward_piece(given: str, dtype: str, width: int, compiled: Callable[..., Any]) -> None:
    from heredity.kernels.ops.backward.gpu import ROWS, SLAB, backward_piece

    stride = "i32:16" if width % 16 == 0 else "i32"
    signature = dict.fromkeys(("group", "start", "end", "slot", "order", "tokens"), "*i64")
    signature |= {"values": f"*{dtype}", "active": "*i1", "da": "*fp32", "grad": f"*{dtype}", "n_latents": "i32"}
    signature |= dict.fromkeys(("grad_stride", "x_stride", "decoder_stride"), stride)
    constants: dict[str, Any] = {"WIDTH": width, "ROWS": ROWS, "COLUMNS": SLAB // (4 if dtype == "fp32" else 2)}
    of_sums = dict.fromkeys(("x", *SUMS), f"*{dtype}") | dict.fromkeys(PUT_BY, "*fp32")
    if given == "decoder":
        constants |= dict.fromkeys(of_sums)
    else:
        signature |= of_sums
    if given == "x":
        constants |= {"decoder": None}
    else:
        signature |= {"decoder": f"*{dtype}"}
    used = compiled(backward_piece, signature, constants, num_warps=4)
    assert used.spilled == 0
    # Four blocks of 128 threads fit a multiprocessor's 65,536 registers.
    assert used.registers <= 128


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_add_pieces(dtype: str, compiled: Callable[..., Any]) -> None:
    from heredity.kernels.ops.backward.gpu import ROWS, SLAB, add_pieces

    signature = {"divided": "*i64", "slots": "*i64", "n_latents": "i32"}
    signature |= dict.fromkeys(PUT_BY, "*fp32") | dict.fromkeys(SUMS, f"*{dtype}")
    used = compiled(add_pieces, signature, {"WIDTH": 2304, "ROWS": ROWS, "COLUMNS": SLAB // 4}, num_warps=4)
    assert used.spilled == 0
    assert used.registers <= 128
