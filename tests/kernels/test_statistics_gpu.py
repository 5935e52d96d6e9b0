"""The Triton kernel of statistics against the reference."""

import pytest
import torch

from heredity.kernels.features import FeatureCSR
from heredity.kernels.ops.statistics import Statistics, statistics

# The interpreter computes with numpy, which warns of what a GPU does silently: infinity minus infinity.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

NAMES = ("count", "max", "histogram", "top_values", "top_tokens", "sum", "sum_of_squares")


def features_of(n_tokens: int, n_latents: int, share: float, dtype: torch.dtype = torch.float32) -> FeatureCSR:
    draw = torch.Generator().manual_seed(n_tokens)
    shape = (n_tokens, n_latents)
    values = torch.randn(shape, generator=draw) * torch.exp2(torch.randint(-14, 24, shape, generator=draw))
    kept = torch.rand(shape, generator=draw) < share * torch.randint(3, (n_latents,), generator=draw)
    tokens, latents = kept.nonzero(as_tuple=True)
    return FeatureCSR.from_coo(tokens, latents, values[kept].to(dtype), shape)


def assert_same(got: Statistics, expected: Statistics) -> None:
    assert got.n_tokens == expected.n_tokens
    for name in NAMES:
        left, right = getattr(got, name).cpu(), getattr(expected, name)
        exact = name not in ("sum", "sum_of_squares")
        scale = 0.0 if exact or not len(right) else expected.sum_of_squares.nan_to_num().sqrt().max().item()
        rtol = 0 if exact else 1e-12
        torch.testing.assert_close(left, right, rtol=rtol, atol=rtol * scale, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(63, 31, 0.1), (300, 33, 0.4), (1, 65, 0.5), (200, 1, 0.7)])
def test_reference(shape: tuple[int, int, float], dtype: torch.dtype, device: str, poisoned: None) -> None:
    features = features_of(*shape, dtype)
    got = statistics(features.to(device), first_token=9, top=4, impl="triton")
    assert_same(got.to("cpu").validate(), statistics(features, first_token=9, top=4, impl="reference"))


@pytest.mark.parametrize(("n_tokens", "n_latents"), [(0, 5), (3, 5), (3, 0)])
def test_nothing_active(n_tokens: int, n_latents: int, device: str, poisoned: None) -> None:
    nothing = FeatureCSR.from_dense(torch.zeros(n_tokens, n_latents))
    assert_same(statistics(nothing.to(device), impl="triton"), statistics(nothing, impl="reference"))


def test_nan_and_edges(device: str, poisoned: None) -> None:
    edges = torch.exp2(torch.arange(-12, 23).float())
    special = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 1e-40, -1.0])
    dense = torch.cat([edges, torch.nextafter(edges, torch.tensor(0.0)), special])[:, None].repeat(1, 2)
    dense[-6:, 1] = 1.0
    features = FeatureCSR.from_dense(dense)
    assert_same(statistics(features.to(device), top=7, impl="triton"), statistics(features, top=7, impl="reference"))


def test_every_run_gives_the_same_sums(device: str) -> None:
    features = features_of(300, 33, 0.4).to(device)
    one, other = (statistics(features, impl="triton") for _ in range(2))
    assert torch.equal(one.sum, other.sum) and torch.equal(one.sum_of_squares, other.sum_of_squares)
