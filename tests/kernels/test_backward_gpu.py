"""The Triton kernels of backward against the reference in float64."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from heredity.kernels.features import FeatureCSR
from heredity.kernels.ops.backward import gpu, run
from heredity.kernels.ops.backward.gradients import Gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("poisoned")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def case(
    n_tokens: int,
    widths: Sequence[int],
    n_latents: int,
    share: float,
    dtype: torch.dtype = torch.float32,
    masked: bool = True,
    want_x: bool = True,
) -> tuple[Any, ...]:
    """Arguments of backward; some stored values are not above zero."""
    kept = torch.rand(n_tokens, n_latents, generator=torch.Generator().manual_seed(1)) < share
    features = FeatureCSR.from_dense(normal(n_tokens, n_latents, dtype=dtype) * kept)
    active = normal(features.nnz, seed=2) > -0.5 if masked else None
    extra = normal(features.nnz, dtype=dtype, seed=3) if masked else None
    grads, xs = ([normal(n_tokens, width, dtype=dtype, seed=width + i) for width in widths] for i in (4, 5))
    weights = [normal(width, n_latents, dtype=dtype, seed=width + 6) for width in widths]
    decoders = [normal(n_latents, width, dtype=dtype, seed=width + 7) for width in widths]
    return features, active, grads, xs, weights, decoders, extra, want_x


def changed(args: tuple[Any, ...], **to: Any) -> tuple[Any, ...]:
    """On another device, or with floating tensors of another dtype."""

    def change(value: Any) -> Any:
        if isinstance(value, list):
            return [change(each) for each in value]
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            return value.to(**{name: place for name, place in to.items() if name != "dtype"})
        return value.to(**to) if isinstance(value, torch.Tensor | FeatureCSR) else value

    return tuple(change(value) for value in args)


def flat(found: Gradients) -> list[torch.Tensor]:
    return [*found.decoders, found.values, *found.weights, found.bias, *(found.xs or [])]


def assert_right(args: tuple[Any, ...], device: str) -> None:
    """Relative to each norm; twice the rounding unit, since stores truncate to bfloat16 under the interpreter."""
    dtype = args[0].dtype
    expected = flat(run(*changed(args, dtype=torch.float64), impl="reference"))
    got = flat(run(*changed(args, device=device), impl="triton"))
    assert len(got) == len(expected)
    for left, right in zip(got, expected, strict=True):
        assert left.dtype == dtype
        assert left.shape == right.shape
        assert (left.cpu().double() - right).norm() <= 2 * torch.finfo(dtype).eps * right.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n_tokens", "widths", "n_latents", "share"),
    [(1, [3], 1, 1.0), (63, [33], 31, 0.2), (30, [300], 65, 0.1), (20, [100, 7, 257], 9, 0.5)],
)
def test_reference(
    n_tokens: int, widths: list[int], n_latents: int, share: float, dtype: torch.dtype, device: str
) -> None:
    assert_right(case(n_tokens, widths, n_latents, share, dtype), device)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("want_x", [True, False])
def test_options(masked: bool, want_x: bool, device: str) -> None:
    args = case(40, [20], 10, 0.4, masked=masked, want_x=want_x)
    assert_right(args, device)
    assert (run(*changed(args, device=device), impl="triton").xs is None) == (not want_x)


def test_latents_of_several_pieces(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two latents active at more tokens than one program takes, amid others."""
    monkeypatch.setattr(gpu, "PIECE", 16)
    n_tokens = 50
    features, _, *rest = case(n_tokens, [40, 6], 7, 0.02)
    dense = features.to_dense()
    dense[:, 2] = normal(n_tokens, seed=9).abs() + 0.1
    dense[5:, 5] = dense[5:, 2]
    features = FeatureCSR.from_dense(dense)
    assert (features.by_latent.indptr.diff() > gpu.PIECE).sum() == 2
    rest[4] = normal(features.nnz, seed=3)
    assert_right((features, normal(features.nnz) > -1, *rest), device)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_nearly_all_latents_of_several_pieces(share: float, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PIECE", 4)
    assert_right(case(37, [10], 12, share), device)


def test_pieces_grow_with_the_number_of_activations(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PIECE", 1)
    monkeypatch.setattr(gpu, "MOST_PIECES", 16)
    args = case(30, [10], 12, 0.4)
    assert len(gpu._pieces(args[0]).work.group) <= 16 + 12
    assert_right(args, device)


@pytest.mark.parametrize(("n_tokens", "n_latents"), [(0, 5), (4, 5)])
def test_nothing_active(n_tokens: int, n_latents: int, device: str) -> None:
    got = run(*changed(case(n_tokens, [6, 3], n_latents, 0.0), device=device), impl="triton")
    for each in flat(got):
        assert not each.any()
    assert got.decoders[0].shape == (5, 6)
    assert got.weights[1].shape == (3, 5)
    assert got.values.shape == (0,)


def test_arrays_that_are_not_contiguous(device: str) -> None:
    features, active, grads, xs, weights, decoders, extra, want_x = changed(case(25, [18], 14, 0.3), device=device)
    # As from a sum over tokens, and from an encoder kept as the transpose of [F, D].
    grads = [grads[0][:1].expand(25, 18)]
    plain = features, active, [grads[0].contiguous()], xs, weights, decoders, extra, want_x
    weights = [weights[0].T.contiguous().T]
    decoders, xs = [decoders[0].T.contiguous().T], [torch.cat([xs[0], xs[0]], 1)[:, 18:]]
    extra, active = (torch.stack([each, each], 1)[:, 1] for each in (extra, active))
    strided = features, active, grads, xs, weights, decoders, extra, want_x
    left, right = (flat(run(*args, impl="triton")) for args in (plain, strided))
    assert all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def test_every_run_gives_the_same_gradients(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PIECE", 8)
    args = changed(case(40, [30], 5, 0.6), device=device)
    before = args[6].clone()
    one, other = (flat(run(*args, impl="triton")) for _ in range(2))
    assert all(torch.equal(left, right) for left, right in zip(one, other, strict=True))
    assert torch.equal(args[6], before)
