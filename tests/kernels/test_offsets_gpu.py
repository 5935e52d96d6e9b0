"""Matrices with elements further than 2**31 from the first, for every op and implementation.

Interpreted, 32-bit arithmetic wraps as on a GPU, and a wrong address ends the process.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from heredity.kernels import FeatureCSR, TopK, attribute, encode, residual
from heredity.kernels.ops.backward import run as backward

Spread = Callable[[Tensor], Tensor]


@pytest.fixture(params=["triton", "cpu", "reference"])
def impl(request: pytest.FixtureRequest, device: str) -> str:
    if device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("allocates 40 GB on the card, more than this one has")
    return request.param


def drawn(impl: str, device: str, *shapes: Sequence[int]) -> list[Tensor]:
    """Whole numbers, so that no order of additions matters."""
    made = torch.Generator().manual_seed(0)
    place = "cpu" if impl == "cpu" else device
    return [torch.randint(-3, 4, tuple(shape), generator=made).half().to(place) for shape in shapes]


def test_encode(impl: str, device: str, far_rows: Spread) -> None:
    x, encoder, bias = drawn(impl, device, (4, 3), (3, 40), (40,))
    wanted = encode(x, encoder, bias, TopK(5), impl=impl).to_dense()
    for far in ((far_rows(x), encoder), (x, far_rows(encoder))):
        assert torch.equal(encode(*far, bias, TopK(5), impl=impl).to_dense(), wanted)


def test_decode(impl: str, device: str, far_rows: Spread) -> None:
    decoder, target, acts = drawn(impl, device, (4, 6), (5, 6), (5, 4))
    features = FeatureCSR.from_dense(acts)
    wanted = residual(features, decoder, None, target, impl=impl)
    got = residual(features, far_rows(decoder), None, far_rows(target), impl=impl)
    assert all(map(torch.equal, got, wanted))


def test_attribute(impl: str, device: str, far_rows: Spread) -> None:
    decoder, first, second, acts = drawn(impl, device, (4, 6), (5, 6), (5, 6), (5, 4))
    features = FeatureCSR.from_dense(acts)
    wanted = attribute(torch.stack([first, second]), features, decoder, impl=impl)
    assert torch.equal(attribute(torch.stack([first, second]), features, far_rows(decoder), impl=impl), wanted)
    # Positions, then gradients, far apart.
    assert torch.equal(attribute(far_rows(first)[None], features, decoder, impl=impl), wanted[:1])
    batch = far_rows(torch.stack([first, second]).flatten(1)).unflatten(1, first.shape)
    assert torch.equal(attribute(batch, features, decoder, impl=impl), wanted)


def test_backward(impl: str, device: str, far_rows: Spread) -> None:
    grad, x, decoder, acts = drawn(impl, device, (5, 6), (5, 6), (4, 6), (5, 4))
    features, weight = FeatureCSR.from_dense(acts), decoder.T.contiguous()
    near = backward(features, None, [grad], [x], [weight], [decoder], None, True, impl=impl)
    given = [far_rows(grad)], [far_rows(x)], [far_rows(decoder).T], [far_rows(decoder)]
    far = backward(features, None, *given, None, True, impl=impl)
    for one, other in zip(near, far, strict=True):
        pairs = zip(one, other, strict=True) if isinstance(one, list) else [(one, other)]
        assert all(torch.equal(left, right) for left, right in pairs)
