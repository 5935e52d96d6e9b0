"""Linear CKA and mean differences against direct float64 computations."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from heredity.circuits.drift import _cka, _Moments, drift, sites_of
from heredity.interp.model import Encoded, Model
from heredity.interp.readout import unembedding

TEXTS = ("the old bridge over the river was closed last night .", "a cat read the letter", "two horse made bread")


def batches(parent: Model, successor: Model) -> list[list[tuple[Encoded, Encoded]]]:
    pairs = [(parent.encode(text), successor.encode(text)) for text in TEXTS]
    return [pairs[:2], pairs[2:]]


def activations(model: Model, site: str) -> Tensor:
    rows = [model.capture(torch.tensor([model.encode(text).ids]), [site])[site][0] for text in TEXTS]
    return torch.cat(rows).double()


def cka64(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def moments(x: Tensor, y: Tensor, parts: int = 1) -> _Moments:
    total = _Moments()
    for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
        total.n += len(a)
        total.add(x=a.sum(0), y=b.sum(0), xx=a.T @ a, yy=b.T @ b, xy=a.T @ b)
    return total


def test_cka_ignores_rotation_and_scale_and_nothing_more() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 12, generator=generator, dtype=torch.float64) + 5
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    assert _cka(moments(x, x)) == pytest.approx(1, abs=1e-12)
    assert _cka(moments(x, 3 * x @ rotation + 7, parts=7)) == pytest.approx(1, abs=1e-10)
    y = x @ torch.randn(12, 5, generator=generator, dtype=torch.float64).sign()
    assert _cka(moments(x, y, parts=3)) == pytest.approx(cka64(x, y), abs=1e-10)
    unrelated = torch.randn(80, 12, generator=generator, dtype=torch.float64)
    assert _cka(moments(x, unrelated)) < 0.3 < cka64(x, y) < 0.999


def test_similarity_by_depth_is_the_direct_computation_over_all_texts(parent: Model, successor: Model) -> None:
    similarity, _ = drift(parent, successor, batches(parent, successor))
    assert [site for site, _ in similarity] == [f"resid_post@{layer}" for layer in range(3)]
    for site, value in similarity:
        assert value == pytest.approx(cka64(activations(parent, site), activations(successor, site)), abs=1e-5)
        assert 0.3 < value < 0.9999


def test_a_model_has_not_drifted_from_itself(parent: Model) -> None:
    similarity, readings = drift(parent, parent, batches(parent, parent))
    assert all(value == pytest.approx(1, abs=1e-9) for _, value in similarity)
    assert all(reading.relative_norm == 0 and reading.tokens == () for reading in readings)


def test_the_mean_difference_is_read_by_position_and_over_all(parent: Model, successor: Model) -> None:
    _, readings = drift(parent, successor, batches(parent, successor))
    assert {reading.site for reading in readings} == {"resid_post@0"}
    assert {reading.position for reading in readings} == {"0", "1", "2", "3", "4", "all"}
    x, y = activations(parent, "resid_post@0"), activations(successor, "resid_post@0")
    starts = [0]
    for text in TEXTS[:-1]:
        starts.append(starts[-1] + len(parent.encode(text).ids))
    lens = unembedding(parent).double()
    for reading in readings:
        if reading.position == "all":
            rows = list(range(len(x)))
        else:
            rows = [start + int(reading.position) for start, text in zip(starts, TEXTS, strict=True)
                    if int(reading.position) < len(parent.encode(text).ids)]  # fmt: skip
        mean = (y[rows] - x[rows]).mean(0)
        size = x[rows].norm(dim=-1).mean()
        assert reading.relative_norm == pytest.approx(float(mean.norm() / size), rel=1e-4)
        scores = (lens @ mean)[: len(parent.tokenizer)]
        assert reading.tokens == tuple(parent.decode([i]) for i in scores.topk(8).indices.tolist())


def test_models_of_other_width_and_depth_have_similarity_alone(
    parent: Model, pair_of: Callable[[str], tuple[Model, Model]]
) -> None:
    other, _ = pair_of("gpt2")
    assert (other.shape.d_model, other.shape.n_layers) != (parent.shape.d_model, parent.shape.n_layers)
    similarity, readings = drift(parent, other, batches(parent, other))
    assert readings == [] and [site for site, _ in similarity] == ["resid_post@0", "resid_post@1"]
    pairs = sites_of(parent, other)
    assert pairs[-1] == ("resid_post@2", "resid_post@1")
    for (site_p, site_s), (_, value) in zip(pairs, similarity, strict=True):
        assert value == pytest.approx(cka64(activations(parent, site_p), activations(other, site_s)), abs=1e-5)


def test_few_sites_at_equal_depth_the_last_included(parent: Model) -> None:
    assert sites_of(parent, parent, most=1) == [("resid_post@2", "resid_post@2")]
    assert sites_of(parent, parent, most=8) == [(f"resid_post@{i}", f"resid_post@{i}") for i in range(3)]
