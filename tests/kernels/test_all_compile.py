"""No Triton kernel is left out of the tests that compile them for compute capability 9.0."""

import re
from pathlib import Path

import pytest

import heredity.kernels


def test_every_kernel_that_is_launched_is_compiled_somewhere() -> None:
    pytest.importorskip("triton")
    sources = [path.read_text() for path in Path(heredity.kernels.__path__[0]).rglob("*.py")]
    launched = {name for text in sources for name in re.findall(r"^\s*(\w+)\[[^\]]*\]\(", text, re.M)}
    jitted = {name for text in sources for name in re.findall(r"@triton\.jit\ndef (\w+)", text)}
    tested = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*_compiles.py"))
    kernels = launched & jitted
    assert {"product", "decode_slab", "attribute_tile", "reduce_latent"} <= kernels
    assert {name for name in kernels if not re.search(rf"\b{name}\b", tested)} == set()
