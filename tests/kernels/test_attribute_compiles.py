"""The Triton kernel of attribute compiles for compute capability 9.0 without spilling registers."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.parametrize("size", [(16, 16), (16, 64), (64, 16), (32, 32), (32, 64), (64, 64)])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("width", [2304, 100])
def test_attribute_tile(width: int, dtype: str, size: tuple[int, int], compiled: Callable[..., Any]) -> None:
    from heredity.kernels.ops.attribute.gpu import DEPTH, attribute_tile, warps

    stride = "i32:16" if width % 16 == 0 else "i32"
    signature = dict.fromkeys(("group", "start", "end"), "*i64") | dict.fromkeys(("n_batch", "n_active"), "i32")
    signature |= {"indices": "*i32", "gradient": f"*{dtype}", "decoder": f"*{dtype}"}
    signature |= dict.fromkeys(("batch_stride", "position_stride", "decoder_stride"), stride)
    depth = DEPTH // (4 if dtype == "fp32" else 2)
    constants: dict[str, Any] = {"WIDTH": width, "BATCH": size[0], "NODES": size[1], "DEPTH": depth, "UPCAST": False}
    first = signature | {"scores": f"*{dtype}"}, constants | {"previous": None}
    later = signature | {"scores": "*fp32", "previous": "*fp32"}, constants
    for types, given in (first, later):
        used = compiled(attribute_tile, types, given, num_warps=warps(*size), num_stages=3)
        assert used.spilled == 0
        # Of a multiprocessor's 65,536 registers, half for a block whose rows are aligned, all for one whose are not.
        threads = 32 * warps(*size)
        assert used.registers <= min(255, (32768 if width == 2304 else 65536) // threads)
        # Four blocks fit its 228 KiB.
        assert used.shared <= 56 * 1024
