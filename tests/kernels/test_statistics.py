"""Statistics of latents: fast against reference, and merging shards against doing all tokens at once."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from heredity.kernels.features import FeatureCSR
from heredity.kernels.ops.statistics import N_BINS, Statistics, statistics
from heredity.kernels.ops.statistics.record import HIGHEST, LOWEST

SHAPES = [(63, 31, 0.1), (1000, 65, 0.02), (1, 300, 0.5), (257, 1, 0.7), (40, 7, 1.0)]
EXACT = ("count", "max", "histogram", "top_values", "top_tokens", "n_tokens")
SUMS = ("sum", "sum_of_squares")


def random_features(n_tokens: int, n_latents: int, share: float, seed: int = 0) -> FeatureCSR:
    """Values over many magnitudes, with equal ones among them, zeros and negative ones too; some latents silent."""
    draw = torch.Generator().manual_seed(seed)
    shape = (n_tokens, n_latents)
    values = torch.exp2(torch.randint(-14, 24, shape, generator=draw)) * (1 + torch.randint(3, shape, generator=draw))
    values *= torch.randint(-1, 8, shape, generator=draw).sign()
    kept = torch.rand(shape, generator=draw) < share * torch.randint(3, (n_latents,), generator=draw)
    tokens, latents = kept.nonzero(as_tuple=True)
    return FeatureCSR.from_coo(tokens, latents, values[kept], shape)


def assert_same(got: Statistics, expected: Statistics) -> None:
    for name in EXACT:
        left, right = torch.as_tensor(getattr(got, name)), torch.as_tensor(getattr(expected, name))
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")
    for name in SUMS:
        left, right = getattr(got, name), getattr(expected, name)
        # Values of both signs cancel, so the error is measured against the size of what was summed.
        scale = expected.sum_of_squares.nan_to_num(posinf=1).sqrt().max().item() if len(right) else 0.0
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12 * scale, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("top", [1, 3, 16])
def test_fast_is_the_reference(shape: tuple[int, int, float], top: int) -> None:
    features = random_features(*shape)
    got = statistics(features, first_token=100, top=top, impl="cpu")
    assert_same(got.validate(), statistics(features, first_token=100, top=top, impl="reference"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_count_as_float32(dtype: torch.dtype) -> None:
    features = random_features(63, 31, 0.3).to(dtype=dtype)
    assert_same(statistics(features, impl="cpu"), statistics(features.to(dtype=torch.float32), impl="reference"))


def test_reference_is_what_the_dense_matrix_says() -> None:
    features = random_features(50, 20, 0.3)
    dense, there = features.to_dense(), torch.zeros(50, 20, dtype=torch.bool)
    there[features.tokens, features.indices.long()] = True
    got = statistics(features, first_token=7, top=4, impl="reference")
    assert torch.equal(got.count, there.sum(0))
    assert torch.equal(got.sum, dense.double().sum(0))
    assert torch.equal(got.max, dense.where(there, -torch.inf).amax(0))
    assert torch.equal(got.frequency, there.double().mean(0))
    ranked = dense.where(there, -torch.inf).sort(dim=0, descending=True, stable=True)
    assert torch.equal(got.top_values, ranked.values[:4].T)
    expected = (ranked.indices[:4].T + 7).where(got.top_values > -torch.inf, -1)
    assert torch.equal(got.top_tokens, expected)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(("n_tokens", "n_latents"), [(0, 5), (4, 5), (3, 0), (0, 0)])
def test_nothing_active(impl: str, n_tokens: int, n_latents: int) -> None:
    nothing = FeatureCSR(
        torch.zeros(n_tokens + 1, dtype=torch.int64), torch.tensor([], dtype=torch.int32), torch.tensor([]), n_latents
    )
    got = statistics(nothing, top=3, impl=impl).validate()
    assert got.n_tokens == n_tokens and got.n_latents == n_latents
    assert not got.count.any() and not got.histogram.any()
    assert torch.equal(got.max, torch.full((n_latents,), -torch.inf))
    assert bool((got.top_tokens == -1).all()) and bool((got.top_values == -torch.inf).all())
    assert bool(got.mean.isnan().all())
    assert bool((got.frequency == 0).all()) if n_tokens else bool(got.frequency.isnan().all())


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_nan_reaches_its_latent_and_no_other(impl: str) -> None:
    dense = torch.tensor([[1.0, 2.0], [torch.nan, 3.0], [torch.inf, 4.0], [-torch.nan, 5.0], [5.0, 6.0]])
    got = statistics(FeatureCSR.from_dense(dense), first_token=10, top=4, impl=impl).validate()
    assert got.sum[0].isnan() and got.sum_of_squares[0].isnan() and got.max[0].isnan()
    assert got.top_tokens.tolist() == [[11, 13, 12, 14], [14, 13, 12, 11]]
    assert got.histogram[0, -1] == 3
    assert got.sum[1] == 20 and got.max[1] == 6


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_bins_are_powers_of_two(impl: str) -> None:
    edges = torch.exp2(torch.arange(LOWEST, HIGHEST + 1).float())
    below = torch.nextafter(edges, torch.tensor(0.0))
    others = torch.tensor([-torch.inf, -3.0, 0.0, 1e-40, torch.inf])
    expected = [*range(1, N_BINS), *range(N_BINS - 1), 0, 0, 0, 0, N_BINS - 1]
    column = torch.cat([edges, below, others])[:, None]
    tokens = torch.arange(len(column))
    for value, token, place in zip(column, tokens, expected, strict=True):
        one = FeatureCSR.from_coo(torch.tensor([0]), torch.tensor([0]), value, (1, 1))
        assert int(statistics(one, impl=impl).histogram[0].argmax()) == place, (value, token)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_equal_values_go_to_the_lowest_token(impl: str) -> None:
    values = torch.tensor([0.0, -0.0, 2.0, -torch.inf, 0.0, 2.0])
    tokens, latents = torch.arange(6), torch.zeros(6, dtype=torch.int64)
    features = FeatureCSR.from_coo(tokens, latents, values, (6, 1))
    for top, expected in ((3, [2, 5, 0]), (8, [2, 5, 0, 1, 4, 3, -1, -1])):
        assert statistics(features, top=top, impl=impl).validate().top_tokens.tolist() == [expected]


def test_shards_merge_to_the_whole_in_every_order_and_grouping() -> None:
    features = random_features(90, 24, 0.4, seed=3)
    whole = statistics(features, top=5)
    cuts = [0, 10, 10, 45, 90]
    parts = [statistics(features[a:b], first_token=a, top=5) for a, b in itertools.pairwise(cuts)]
    for order in itertools.permutations(parts):
        first, *others = order
        assert_same(first.merge(*others).validate(), whole)
        a, b, c, d = order
        assert_same(a.merge(b).merge(c.merge(d)), whole)
        assert_same(a.merge(b.merge(c.merge(d))), whole)


def test_merging_two_is_exactly_commutative_also_with_nan() -> None:
    a = random_features(40, 9, 0.6, seed=1)
    b = random_features(30, 9, 0.6, seed=2)
    b.values[::7] = torch.nan
    a.values[::5] = -torch.inf
    first, second = statistics(a, top=4), statistics(b, first_token=40, top=4)
    left, right = first.merge(second).validate(), second.merge(first).validate()
    for name in (*EXACT, *SUMS):
        one, other = torch.as_tensor(getattr(left, name)), torch.as_tensor(getattr(right, name))
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert_same(left, statistics(FeatureCSR.concatenate([a, b]), top=4))


def test_merge_leaves_its_parts_as_they_were() -> None:
    parts = [statistics(random_features(20, 8, 0.5, seed=seed), first_token=20 * seed) for seed in range(3)]
    before = [{name: torch.as_tensor(getattr(part, name)).clone() for name in (*EXACT, *SUMS)} for part in parts]
    parts[0].merge(*parts[1:])
    for part, old in zip(parts, before, strict=True):
        assert all(torch.equal(torch.as_tensor(getattr(part, name)), value) for name, value in old.items())


def test_merge_of_unlike_shapes_is_refused() -> None:
    one = statistics(random_features(5, 4, 0.5))
    for other in (statistics(random_features(5, 3, 0.5)), statistics(random_features(5, 4, 0.5), top=2)):
        with pytest.raises(ValueError, match=r"\[4, 16\] and"):
            one.merge(other)


def test_gradients_are_left_behind() -> None:
    features = random_features(10, 4, 0.5)
    features = features.with_values(features.values.requires_grad_())
    assert not statistics(features).sum.requires_grad


def test_bad_arguments() -> None:
    features = random_features(5, 4, 0.5)
    with pytest.raises(ValueError, match="top must be at least 1"):
        statistics(features, top=0)
    with pytest.raises(ValueError, match="first_token"):
        statistics(features, first_token=-1)


def test_a_file_holds_everything(tmp_path: Path) -> None:
    features = random_features(30, 12, 0.4)
    features.values[3] = torch.nan
    stats = statistics(features, first_token=5)
    stats.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    for name in (*EXACT, *SUMS):
        torch.testing.assert_close(getattr(loaded, name), getattr(stats, name), rtol=0, atol=0, equal_nan=True)
    assert repr(loaded) == repr(stats)


def changed(stats: Statistics, name: str, index: tuple[int, ...], value: float) -> Statistics:
    array: Tensor = getattr(stats, name).clone()
    array[index] = value
    return replace(stats, **{name: array})


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("count", (0,), -1, "count lies outside"),
        ("count", (0,), 4, "count lies outside"),
        ("count", (0,), 2, "histogram does not sum"),
        ("histogram", (0, 3), -1, "histogram does not sum"),
        ("sum_of_squares", (0,), -1.0, "sum_of_squares is negative"),
        ("sum", (1,), 1.0, "is not 0 though count is"),
        ("top_tokens", (0, 0), -1, "not as many as count"),
        ("top_tokens", (0, 3), -2, "must be -1"),
        ("top_values", (0, 3), 0.0, "must be -inf"),
        ("top_values", (0, 2), 9.0, "do not descend"),
        ("top_values", (0, 2), torch.nan, "do not descend"),
        ("top_tokens", (0, 0), 7, "do not ascend among equal"),
        ("max", (0,), 1.0, "max is not the first"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    tmp_path: Path, name: str, index: tuple[int, ...], value: float, message: str
) -> None:
    stats = statistics(FeatureCSR.from_dense(torch.tensor([[4.0, 0], [4, 0], [2, 0]])), top=4)
    changed(stats, name, index, value).save(tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match=message):
        Statistics.load(tmp_path / "s.safetensors")


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path, features = tmp_path / "s.safetensors", random_features(5, 4, 0.5)
    stats = statistics(features)
    good = {name: getattr(stats, name) for name in (*EXACT[:-1], *SUMS)}
    metadata = {"format": "Statistics", "n_tokens": "5"}
    for arrays, header in [
        (good, {**metadata, "format": "FeatureCSR"}),
        (good, {**metadata, "n_tokens": "-5"}),
        (good, {**metadata, "n_tokens": "9" * 30}),
        ({name: array for name, array in good.items() if name != "max"}, metadata),
        (good | {"sum": stats.sum.float()}, metadata),
        (good | {"sum": stats.sum[1:].clone()}, metadata),
        (
            good | {"top_values": stats.top_values[:, :0].clone(), "top_tokens": stats.top_tokens[:, :0].clone()},
            metadata,
        ),
    ]:
        save_file(arrays, path, header)
        with pytest.raises(ValueError):
            Statistics.load(path)
    path.write_bytes(b"nothing of the sort")
    with pytest.raises(ValueError, match="not a Statistics file"):
        Statistics.load(path)
