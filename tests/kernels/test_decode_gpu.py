"""The Triton kernel of decode against the reference in float64."""

import pytest
import torch

from heredity.kernels.features import FeatureCSR
from heredity.kernels.ops.decode import decode, gpu, residual

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DENSE_FROM = gpu.DENSE_FROM

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def never_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel serves however many latents are active."""
    monkeypatch.setattr(gpu, "DENSE_FROM", {2: 1.0, 4: 1.0})


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def features_of(n_tokens: int, n_latents: int, share: float, dtype: torch.dtype) -> FeatureCSR:
    kept = torch.rand(n_tokens, n_latents, generator=torch.Generator().manual_seed(1)) < share
    return FeatureCSR.from_dense(normal(n_tokens, n_latents, dtype=dtype).abs() * kept)


def assert_near(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Relative to the norm; twice the rounding unit, since stores truncate to bfloat16 under the interpreter."""
    assert got.shape == expected.shape
    assert (got.cpu().double() - expected).norm() <= 2 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n_tokens", "width", "n_latents", "share"),
    [(1, 3, 1, 1.0), (63, 33, 31, 0.3), (5, 300, 65, 0.5), (70, 100, 300, 0.02), (40, 128, 20, 0.0)],
)
def test_reference(n_tokens: int, width: int, n_latents: int, share: float, dtype: torch.dtype, device: str) -> None:
    features = features_of(n_tokens, n_latents, share, dtype)
    decoder, bias = normal(n_latents, width, dtype=dtype, seed=2), normal(width, dtype=dtype, seed=3)
    target = normal(n_tokens, width, dtype=dtype, seed=4)
    exact = features.to(dtype=torch.float64)
    there = features.to(device), decoder.to(device)

    got = decode(*there, impl="triton")
    assert got.dtype == dtype
    assert_near(got, decode(exact, decoder.double(), impl="reference"), dtype)
    got = decode(*there, bias.to(device), impl="triton")
    assert_near(got, decode(exact, decoder.double(), bias.double(), impl="reference"), dtype)
    left, squares = residual(*there, bias.to(device), target.to(device), impl="triton")
    expected = residual(exact, decoder.double(), bias.double(), target.double(), impl="reference")
    assert (left.dtype, squares.dtype) == (dtype, torch.float32)
    assert_near(left, expected[0], dtype)
    assert_near(squares, expected[1], torch.float32)


def test_models_of_a_crosscoder(device: str) -> None:
    features = features_of(9, 40, 0.3, torch.float32)
    decoders = [normal(40, width, dtype=torch.float32, seed=width) for width in (7, 130)]
    targets = [normal(9, width, dtype=torch.float32, seed=width + 1) for width in (7, 130)]
    biases = [target[0] for target in targets]
    there = [[each.to(device) for each in several] for several in (decoders, biases, targets)]
    got = residual(features.to(device), *there, impl="triton")
    for m, (decoder, bias, target) in enumerate(zip(decoders, biases, targets, strict=True)):
        exact = features.to(dtype=torch.float64)
        left, squares = residual(exact, decoder.double(), bias.double(), target.double(), impl="reference")
        assert_near(got[0][m], left, torch.float32)
        assert_near(got[1][m], squares, torch.float32)


def test_arrays_that_are_not_contiguous(device: str) -> None:
    features = features_of(20, 30, 0.3, torch.float32).to(device)
    decoder = normal(50, 30, dtype=torch.float32).to(device).T
    target = normal(20, 100, dtype=torch.float32).to(device)[:, ::2]
    bias = normal(100, dtype=torch.float32).to(device)[::2]
    got = residual(features, decoder, bias, target, impl="triton")
    expected = residual(features, decoder.contiguous(), bias.contiguous(), target.contiguous(), impl="triton")
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    # A row of a longer matrix, as a slice of columns gives.
    wide = normal(30, 60, dtype=torch.float32).to(device)
    part = decode(features, wide[:, 5:55], impl="triton")
    assert torch.equal(part, decode(features, wide[:, 5:55].contiguous(), impl="triton"))
    one_value = features.with_values(torch.ones((), device=device).expand(features.nnz))
    same = features.with_values(torch.ones(features.nnz, device=device))
    assert torch.equal(decode(one_value, wide, impl="triton"), decode(same, wide, impl="triton"))


def test_no_tokens(device: str) -> None:
    nothing = FeatureCSR.from_dense(torch.zeros(0, 5)).to(device)
    left, squares = residual(
        nothing, torch.ones(5, 3, device=device), None, torch.ones(0, 3, device=device), impl="triton"
    )
    assert left.shape == (0, 3)
    assert squares.shape == (0,)


def test_what_is_not_finite_reaches_only_its_tokens(device: str) -> None:
    features = FeatureCSR.from_dense(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 2.0]]))
    decoder = torch.tensor([[torch.nan, 1.0], [1.0, 1.0], [1.0, torch.inf]])
    got = decode(features.to(device), decoder.to(device), impl="triton").cpu()
    expected = torch.tensor([[torch.nan, 1.0], [1.0, 1.0], [3.0, torch.inf]])
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_every_run_gives_the_same_sums(device: str) -> None:
    features = features_of(10, 200, 0.5, torch.float32).to(device)
    decoder, target = normal(200, 300, dtype=torch.float32).to(device), normal(10, 300, dtype=torch.float32).to(device)
    (left, squares), (other, others) = (residual(features, decoder, None, target, impl="triton") for _ in range(2))
    assert torch.equal(left, other)
    assert torch.equal(squares, others)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [1, 3 * 300 * 2, 10**9])
def test_dense_where_many_latents_are_active(
    chunk: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "DENSE_FROM", DENSE_FROM)
    asked: list[int] = []
    dense = gpu.reference.decode
    monkeypatch.setattr(gpu, "CHUNK", chunk)
    monkeypatch.setattr(gpu.reference, "decode", lambda *args: asked.append(args[0].n_tokens) or dense(*args))
    decoder, target = normal(300, 10, dtype=dtype), normal(7, 10, dtype=dtype, seed=1)
    features = features_of(7, 300, 0.3, dtype)
    there = [each.to(device) for each in (features, decoder, target)]
    exact = features.to(dtype=torch.float64), decoder.double()
    assert_near(decode(*there[:2], impl="triton"), dense(exact[0], [exact[1]], [None], None)[0][0], dtype)
    left, squares = residual(*there[:2], None, there[2], impl="triton")
    expected = dense(exact[0], [exact[1]], [None], [target.double()])
    assert_near(left, expected[0][0], dtype)
    # Squared after rounding.
    assert squares.dtype == torch.float32
    assert (squares.cpu() - expected[1][0]).norm() <= 4 * torch.finfo(dtype).eps * expected[1][0].norm()
    assert sum(asked) == 14 and max(asked) == (7 if chunk == 10**9 else max(chunk // (300 * dtype.itemsize), 1))
    asked.clear()
    few = features_of(7, 300, 0.003, dtype)
    assert few.nnz and few.mean_active < 0.0085 * 300
    decode(few.to(device), there[1], impl="triton")
    assert not asked
