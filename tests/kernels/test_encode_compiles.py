"""Every kernel of encode, launched as for real dictionaries, compiles for sm_90 without spilling."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from heredity.kernels.ops.encode import product_gpu, select_gpu

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
SMALL = 101_376
"""Bytes of shared memory that a block can have on any GPU from compute capability 8.0 on."""

dtypes = pytest.mark.parametrize("dtype", TYPES, ids=str)
norms = pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])


@dtypes
@pytest.mark.parametrize("n_tokens", [1, 8192])
@pytest.mark.parametrize(
    ("gates", "norm", "transposed", "models", "regular"),
    [
        pytest.param(False, False, False, 1, True, id="topk"),
        pytest.param(True, False, True, 1, True, id="jumprelu"),
        pytest.param(False, True, False, 2, True, id="crosscoder topk"),
        pytest.param(True, False, True, 2, True, id="crosscoder jumprelu"),
        pytest.param(True, True, True, 4, True, id="four models"),
        pytest.param(True, True, False, 3, False, id="odd sizes"),
    ],
)
def test_product(
    compiled: Callable[..., Any],
    dtype: torch.dtype,
    n_tokens: int,
    gates: bool,
    norm: bool,
    transposed: bool,
    models: int,
    regular: bool,
) -> None:
    if models > 1 and dtype == torch.float16:
        pytest.skip("several models are compiled in bfloat16, the other 16-bit type; left out for time")
    kind, size = TYPES[dtype], "i32:16" if regular else "i32"
    signature = {
        "xs": (kind,) * models,
        "weights": (kind,) * models,
        "widths": (size,) * models,
        "x_strides": (size,) * models,
        "weight_row_strides": (1 if transposed else size,) * models,
        "weight_column_strides": (size if transposed else 1,) * models,
        "bias": kind,
        "norm": kind,
        "gates": "*fp32",
        "floor": "fp32",
        "p": kind,
        "best": "*fp32" if norm else kind,
        "n_tokens": "i32",
        "n_latents": size,
        "n_padded": "i32:16",
    }
    constants: dict[str, Any] = {"SWATH": 8, "EVEN": regular, "PRECISION": "ieee", "INTERP": False}
    for name, given in (("gates", gates), ("norm", norm)):
        if not given:
            del signature[name]
            constants[name] = None
    sizes = product_gpu.tiling(dtype, n_tokens, models, regular)
    launch = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    taken = compiled(product_gpu.product, signature, constants | sizes, **launch)
    assert taken.spilled == 0
    # Of a multiprocessor's 65,536 registers: what one model of regular sizes takes, and for all others what there is.
    usual = {(256, 8): 232, (128, 4): 168, (128, 8): 128}[sizes["BF"], launch["num_warps"]]
    assert taken.registers <= (usual if models == 1 and regular else 255)
    assert taken.shared <= (product_gpu.LARGE if sizes["BF"] == 256 else SMALL)


@dtypes
@pytest.mark.parametrize("top", [False, True], ids=["threshold", "top"])
def test_groups(compiled: Callable[..., Any], dtype: torch.dtype, top: bool) -> None:
    signature = {"best": TYPES[dtype], "floor": "fp32", "listed": "*i32", "n_listed": "*i32"}
    signature |= {"kths": "*i32", "ends": "*i32"} | dict.fromkeys(("n_groups", "k", "capacity"), "i32")
    constants = {"SPAN": select_gpu.SPAN, "TOP": top, "BITS": select_gpu.BITS[dtype]}
    taken = compiled(select_gpu.groups, signature, constants)
    assert taken.spilled == 0
    assert taken.registers <= 64


@dtypes
@norms
@pytest.mark.parametrize("top", [False, True], ids=["threshold", "top"])
def test_measure_and_write(compiled: Callable[..., Any], dtype: torch.dtype, top: bool, norm: bool) -> None:
    kind = TYPES[dtype]
    row = {"p": kind, "norm": kind, "floor": "fp32", "listed": "*i32", "n_listed": "*i32"}
    row |= dict.fromkeys(("capacity", "n_latents"), "i32") | {"n_padded": "i32:16"}
    way = dict(select_gpu.MANY if top else select_gpu.FEW)
    n_warps = way.pop("num_warps")
    constants = way | {"TOP": top, "BITS": 31 if norm else select_gpu.BITS[dtype]}
    if not norm:
        del row["norm"]
        constants |= {"norm": None}
    kept = {"kths": "*i32", "rooms": "*i32"}
    for kernel, more in (
        (select_gpu.measure, {"counts": "*i32", "ends": "*i32", "k": "i32"}),
        (select_gpu.write, {"indptr": "*i64", "indices": "*i32", "values": kind}),
    ):
        taken = compiled(kernel, row | kept | more, constants, n_warps)
        assert taken.spilled == 0
        assert taken.registers <= 168
