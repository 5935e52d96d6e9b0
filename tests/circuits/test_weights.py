"""Weight directions on changes whose directions are known."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from heredity.circuits.weights import comparable, directions, parameters, relative_distance
from heredity.interp.model import Model
from heredity.interp.readout import embedding, unembedding


def unit(size: int, seed: int) -> Tensor:
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


def top_tokens(model: Model, scores: Tensor, count: int = 8) -> tuple[str, ...]:
    known = scores[: len(model.tokenizer)]
    known = known if known.max() >= -known.min() else -known
    return tuple(model.decode([i]) for i in known.topk(count).indices.tolist())


def plant(linear: Tensor, reads: Tensor, writes: Tensor, size: float) -> None:
    """Add ``size``·writes·readsᵀ to a weight stored as [out, in]."""
    with torch.no_grad():
        linear.add_(size * torch.outer(writes, reads))


def test_a_planted_write_is_the_first_direction_and_names_its_tokens(parent: Model, twin: Model) -> None:
    wanted = parent.tokenizer.convert_tokens_to_ids("bridge")
    gained = unembedding(parent)[wanted]
    down = twin.bridge.blocks[1].mlp.out.original_component.weight
    plant(down, unit(64, 0), gained / gained.norm(), 0.7)
    before = torch.get_rng_state()
    (found,) = directions(parent, twin, count=5)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers were used up"
    assert (found.tensor, found.rank, found.reads) == ("blocks.1.mlp.out", 0, ())
    assert found.singular_value == pytest.approx(0.7, rel=1e-4) and found.share == pytest.approx(1, abs=1e-4)
    size = float(parent.bridge.blocks[1].mlp.out.original_component.weight.norm())
    assert found.relative_change == pytest.approx(0.7 / size, rel=1e-4)
    assert found.writes == top_tokens(parent, unembedding(parent) @ gained) and "bridge" in found.writes


def test_a_planted_read_names_the_tokens_it_reads_whatever_its_sign(parent: Model, twin: Model) -> None:
    wanted = parent.tokenizer.convert_tokens_to_ids("cat")
    seen = embedding(parent)[wanted]
    plant(twin.bridge.blocks[0].attn.k.original_component.weight, -seen / seen.norm(), unit(16, 1), 0.5)
    plant(twin.bridge.blocks[2].mlp.gate.original_component.weight, unit(32, 2), unit(64, 3), 0.9)
    first, second = directions(parent, twin, count=5)
    assert (first.tensor, second.tensor) == ("blocks.2.mlp.gate", "blocks.0.attn.k")
    assert second.writes == () and second.reads == top_tokens(parent, embedding(parent) @ seen)
    assert directions(parent, twin, count=1) == [first]


def test_shares_are_of_the_exact_decomposition(parent: Model, successor: Model) -> None:
    found = directions(parent, successor, count=200, per_matrix=2)
    assert len(found) == 2 * 3 * 7 and [d.singular_value for d in found] == sorted(
        (d.singular_value for d in found), reverse=True
    )
    change = (
        successor.bridge.blocks[0].attn.v.original_component.weight
        - parent.bridge.blocks[0].attn.v.original_component.weight
    )
    exact = torch.linalg.svdvals(change.detach())
    for direction in found:
        if direction.tensor == "blocks.0.attn.v":
            value = float(exact[direction.rank])
            assert direction.singular_value == pytest.approx(value, rel=0.03)
            assert direction.share == pytest.approx(value**2 / float(exact.square().sum()), rel=0.06)


def test_equal_models_have_no_direction_of_change(parent: Model, twin: Model) -> None:
    assert directions(parent, twin, count=5) == []
    assert relative_distance(parent, twin) == 0


def test_only_models_with_the_same_parameters_are_comparable(
    parent: Model, successor: Model, pair_of: Callable[[str], tuple[Model, Model]]
) -> None:
    gpt2, _ = pair_of("gpt2")
    assert comparable(parent, successor) and comparable(*pair_of("gpt2"))
    assert not comparable(parent, gpt2) and not comparable(gpt2, pair_of("neox")[0])


def test_distance_is_relative_to_the_parent_over_all_parameters(parent: Model, successor: Model) -> None:
    flat = [
        torch.cat([p.detach().double().flatten() for p in m.bridge.original_model.parameters()])
        for m in (parent, successor)
    ]
    want = float((flat[1] - flat[0]).norm() / flat[0].norm())
    assert relative_distance(parent, successor) == pytest.approx(want, rel=1e-6) == pytest.approx(0.15, rel=0.05)


@pytest.mark.parametrize(("family", "joint"), [("gpt2", 1), ("neox", 1), ("phi3", 2)])
def test_of_a_joint_matrix_the_parts_are_listed_and_the_whole_is_not(
    pair_of: Callable[[str], tuple[Model, Model]], family: str, joint: int
) -> None:
    """Each weight once, as many numbers as the model has."""
    parent, successor = pair_of(family)
    values = parameters(parent)
    assert sum(value.numel() for value in values.values()) == parent.n_params
    everything = dict(parent.bridge.original_model.named_parameters())
    wholes = [name for name in everything if name.replace("._original_component", "") not in values]
    assert len({name.split(".")[-3] for name in wholes}) == joint
    names = [d.tensor for d in directions(parent, successor, count=200)]
    assert len(names) == len(set(names)) and "blocks.0.attn.q" in names
    assert not any("qkv" in name for name in names)


def test_a_conv1d_weight_reads_and_writes_on_the_right_side(
    pair_of: Callable[[str], tuple[Model, Model]], nearer: Callable[..., AbstractContextManager[None]]
) -> None:
    parent, successor = pair_of("gpt2")
    with nearer(parent, successor, 0.0):
        weight = successor.bridge.blocks[1].mlp.out.original_component.weight
        assert weight.shape[1] == parent.shape.d_model
        target = unembedding(parent)[70]
        plant(weight, target / target.norm(), unit(weight.shape[0], 0), 0.5)
        (found,) = directions(parent, successor, count=3)
    assert found.tensor == "blocks.1.mlp.out"
    assert found.writes == top_tokens(parent, unembedding(parent) @ target)
