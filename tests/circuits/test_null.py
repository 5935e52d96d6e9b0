"""Null successors: what a scrambled change keeps, that the weights come back, and the size it is given."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from torch import Tensor

from heredity.circuits.divergence import compare, vocabulary
from heredity.circuits.null import PERCENTILE, NullSuccessors, scrambled
from heredity.interp.model import Model

Pairs = Callable[[str], tuple[Model, Model]]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(24, 17), (5, 40), (1, 9)])
def test_a_scrambled_change_keeps_entries_rank_and_singular_values(shape: tuple[int, int]) -> None:
    change = torch.randn(shape[0], 3, generator=seeded(0)) @ torch.randn(3, shape[1], generator=seeded(1))
    got = scrambled(change, seeded(2))
    assert got.shape == change.shape and not torch.allclose(got, change)
    torch.testing.assert_close(got.abs().flatten().sort().values, change.abs().flatten().sort().values)
    torch.testing.assert_close(torch.linalg.svdvals(got), torch.linalg.svdvals(change), atol=1e-5, rtol=1e-4)
    assert torch.linalg.matrix_rank(got) == torch.linalg.matrix_rank(change)


def test_a_scrambled_change_points_elsewhere() -> None:
    """Left and right directions of a rank-one change are gone, not only its sign."""
    u, v = torch.randn(60, generator=seeded(0)), torch.randn(80, generator=seeded(1))
    for seed in range(5):
        got = scrambled(torch.outer(u, v), seeded(seed))
        left, _, right = torch.linalg.svd(got)
        assert abs(float(left[:, 0] @ u / u.norm())) < 0.5 and abs(float(right[0] @ v / v.norm())) < 0.5


def test_a_vector_s_change_keeps_its_magnitudes() -> None:
    change = torch.arange(1.0, 31.0)
    got = scrambled(change, seeded(0))
    assert got.abs().sort().values.tolist() == change.tolist()
    assert 5 < int((got < 0).sum()) < 25 and not torch.equal(got.abs(), change)


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "phi3"])
def test_the_weights_come_back_bit_for_bit(
    pair_of: Pairs, draw: Callable[..., Tensor], family: str, noise: bool
) -> None:
    """Where the wrapper splits a joint matrix, parts and whole may be the same memory."""
    parent, successor = pair_of(family)
    tokens = draw(2, 7)
    hf = [model.bridge.original_model for model in (parent, successor)]
    before = [{name: value.clone() for name, value in model.named_parameters()} for model in hf]
    logits = successor.logits(tokens)
    nulls = NullSuccessors(parent, successor, noise=noise)
    with nulls.draw(0, 1.0) as model:
        assert model is successor
        assert (model.logits(tokens) - logits).abs().max() > 0.1
        assert (model.logits(tokens) - parent.logits(tokens)).abs().max() > 0.1
    with pytest.raises(RuntimeError, match="in between"), nulls.draw(1, 0.5):
        raise RuntimeError("in between")
    for held, model in zip(before, hf, strict=True):
        assert all(torch.equal(held[name], value) for name, value in model.named_parameters())
    assert torch.equal(successor.logits(tokens), logits)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_draw_is_the_seed_s_and_a_change_of_size_nothing_is_the_parent(
    pair_of: Pairs, draw: Callable[..., Tensor], family: str
) -> None:
    parent, successor = pair_of(family)
    tokens = draw(2, 7)
    nulls = NullSuccessors(parent, successor)
    seen = []
    for seed, scale in ((3, 1.0), (3, 1.0), (4, 1.0), (3, 0.5), (3, 0.0)):
        with nulls.draw(seed, scale) as model:
            seen.append(model.logits(tokens).clone())
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[2]) and not torch.allclose(seen[0], seen[3])
    torch.testing.assert_close(seen[4], parent.logits(tokens), atol=1e-6, rtol=0)


def test_only_what_changed_is_scrambled(parent: Model, twin: Model) -> None:
    generator = seeded(0)
    changed = twin.bridge.blocks[1].mlp.out.original_component.weight
    with torch.no_grad():
        changed.add_(torch.randn(changed.shape, generator=generator))
    rest = [dict(m.bridge.original_model.named_parameters()) for m in (parent, twin)]
    with NullSuccessors(parent, twin).draw(0, 2.0):
        differing = [name for name in rest[0] if not torch.equal(rest[0][name], rest[1][name])]
        inside = changed.clone()
    assert len(differing) == 1 and "layers.1" in differing[0] and "down_proj" in differing[0]
    original = parent.bridge.blocks[1].mlp.out.original_component.weight
    assert float((inside - original).norm()) == pytest.approx(2 * float((changed - original).norm()), rel=1e-5)


def test_noise_is_in_proportion_to_each_tensor(parent: Model, twin: Model) -> None:
    with NullSuccessors(parent, twin, noise=True).draw(0, 0.01) as model:
        pairs = zip(
            parent.bridge.original_model.named_parameters(), model.bridge.original_model.parameters(), strict=True
        )
        for (name, p), s in pairs:
            size = float((s - p).square().mean().sqrt() / p.square().mean().sqrt())
            assert size == pytest.approx(0.01, rel=0.5 if p.ndim == 1 else 0.15), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("noise", [False, True])
def test_the_scale_found_gives_the_size_asked_for(
    pair_of: Pairs,
    nearer: Callable[..., AbstractContextManager[None]],
    draw: Callable[..., Tensor],
    family: str,
    noise: bool,
) -> None:
    parent, successor = pair_of(family)
    tokens = draw(12, 16)
    vocab = vocabulary(parent, successor)

    def size(model: Model) -> float:
        flat = [m.logits(tokens).flatten(0, 1) for m in (parent, model)]
        return float(np.percentile(compare(flat[0], flat[1], vocab)[0].numpy(), PERCENTILE))

    with nearer(parent, successor, 0.5):
        target = size(successor)
        nulls = NullSuccessors(parent, successor, noise=noise)
        scale = nulls.matching_scale(size, target, seed=5)
        with nulls.draw(5, scale) as model:
            assert size(model) == pytest.approx(target, rel=0.08)
        assert scale == nulls.matching_scale(size, target, seed=5)
        assert size(successor) == target
    assert target > 1e-3 and (0.3 < scale < 3 if not noise else scale < 0.3)
