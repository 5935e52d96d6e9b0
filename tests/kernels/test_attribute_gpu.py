"""The Triton kernel of attribute against the reference in float64."""

import pytest
import torch

from heredity.kernels.features import FeatureCSR
from heredity.kernels.ops.attribute import attribute

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("poisoned")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def features_of(n_positions: int, n_latents: int, share: float, dtype: torch.dtype = torch.float32) -> FeatureCSR:
    kept = torch.rand(n_positions, n_latents, generator=torch.Generator().manual_seed(1)) < share
    return FeatureCSR.from_dense(normal(n_positions, n_latents, dtype=dtype) * kept)


def assert_right(
    gradients: list[torch.Tensor], features: FeatureCSR, decoders: list[torch.Tensor], device: str
) -> None:
    """Relative to the norm; twice the rounding unit, since stores truncate to bfloat16 under the interpreter."""
    dtype = gradients[0].dtype
    there = [each.to(device) for each in gradients], features.to(device), [each.to(device) for each in decoders]
    got = attribute(*there, impl="triton")
    exact = (
        [each.double() for each in gradients],
        features.to(dtype=torch.float64),
        [each.double() for each in decoders],
    )
    expected = attribute(*exact, impl="reference")
    assert got.dtype == dtype
    assert got.shape == expected.shape
    assert (got.cpu().double() - expected).norm() <= 2 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n_batch", "n_positions", "widths", "n_latents", "share"),
    [
        (1, 1, [3], 1, 1.0),
        (17, 9, [33], 31, 0.3),
        (63, 4, [100], 65, 0.5),
        (70, 3, [20], 300, 0.5),
        (33, 20, [64], 300, 0.01),
        (5, 7, [100, 7, 64], 40, 0.5),
        (4, 6, [10], 30, 0.0),
    ],
)
def test_reference(
    n_batch: int, n_positions: int, widths: list[int], n_latents: int, share: float, dtype: torch.dtype, device: str
) -> None:
    features = features_of(n_positions, n_latents, share, dtype)
    gradients = [normal(n_batch, n_positions, width, dtype=dtype, seed=width) for width in widths]
    decoders = [normal(n_latents, width, dtype=dtype, seed=width + 1) for width in widths]
    assert_right(gradients, features, decoders, device)


def test_positions_of_very_different_numbers_of_nodes(device: str) -> None:
    dense = features_of(6, 200, 0.02).to_dense()
    dense[1], dense[4] = 1.0, 0.0
    gradients, decoders = [normal(8, 6, 12)], [normal(200, 12, seed=1)]
    assert_right(gradients, FeatureCSR.from_dense(dense), decoders, device)


@pytest.mark.parametrize(("n_batch", "n_positions"), [(0, 5), (3, 0), (0, 0)])
def test_nothing(n_batch: int, n_positions: int, device: str) -> None:
    assert_right([normal(n_batch, n_positions, 4)], features_of(n_positions, 9, 0.5), [normal(9, 4)], device)


def test_arrays_that_are_not_contiguous(device: str) -> None:
    features = features_of(7, 30, 0.4).to(device)
    gradient, decoder = normal(5, 7, 20).to(device), normal(30, 20, seed=1).to(device)
    expected = attribute(gradient, features, decoder, impl="triton")
    # Positions first, a slice of columns, columns first.
    for other in (gradient.transpose(0, 1).contiguous().transpose(0, 1), torch.cat([gradient] * 2, 2)[:, :, 20:]):
        assert torch.equal(attribute(other, features, decoder, impl="triton"), expected)
    other = gradient.transpose(1, 2).contiguous().transpose(1, 2), features, decoder.T.contiguous().T
    assert torch.equal(attribute(*other, impl="triton"), expected)


def test_what_is_not_finite_reaches_only_its_position(device: str) -> None:
    features = features_of(4, 20, 0.6)
    gradient = normal(3, 4, 10)
    gradient[1, 2, 5] = torch.nan
    got = attribute(gradient.to(device), features.to(device), normal(20, 10).to(device), impl="triton").cpu()
    expected = torch.zeros(3, features.nnz, dtype=torch.bool)
    expected[1] = features.tokens == 2
    assert torch.equal(got.isnan(), expected)


def test_part_of_a_longer_text(device: str) -> None:
    """A slice of the positions is as good as those positions alone."""
    features = features_of(9, 30, 0.4).to(device)
    gradient, decoder = normal(5, 9, 20).to(device), normal(30, 20, seed=1).to(device)
    whole = attribute(gradient, features, decoder, impl="triton")
    part = attribute(gradient[:, 3:6], features[3:6], decoder, impl="triton")
    torch.testing.assert_close(part, whole[:, features.indptr[3] : features.indptr[6]])
