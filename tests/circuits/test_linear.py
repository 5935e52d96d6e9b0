"""Linear maps of a model: what is listed, what goes in, and edits that leave no trace."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from heredity.circuits.linear import (
    edited_weights,
    inputs,
    inputs_and_slopes,
    linear_maps,
    matrix,
    second_moments,
)
from heredity.circuits.weights import parameters
from heredity.interp.model import Model

Pairs = Callable[[str], tuple[Model, Model]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "phi3"])
def test_listed_maps_are_those_a_checkpoint_has_and_an_edit_acts_and_leaves(
    pair_of: Pairs, draw: Callable[..., Tensor], family: str
) -> None:
    _, model = pair_of(family)
    maps = linear_maps(model)
    stored = dict(type(model.bridge.original_model)(model.bridge.original_model.config).named_parameters())  # pyright: ignore
    weights = parameters(model)
    assert maps and all(stored[name].shape == weights[name].shape for name in maps)
    assert any("mlp" in name for name in maps)
    tokens = draw(2, 7)
    before = model.logits(tokens)
    for name, module in maps.items():
        out, width = matrix(module, weights[name]).shape
        change = (torch.randn(out, 2, generator=torch.Generator().manual_seed(0)), torch.randn(width, 2))
        with edited_weights(model, maps, {name: change}):
            assert not torch.allclose(model.logits(tokens), before, atol=1e-4), name
    assert torch.equal(model.logits(tokens), before)


def test_inputs_and_slopes_explain_what_a_small_edit_does(parent: Model, draw: Callable[..., Tensor]) -> None:
    tokens, maps = draw(2, 6), linear_maps(parent)

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 3] - logits[:, -1, 5]

    rows, given, slopes = inputs_and_slopes(parent, maps, tokens, metric)
    assert set(slopes) == set(given) == set(maps)
    for name, value in inputs(parent, maps, tokens).items():
        assert torch.equal(value, given[name])
    for name, module in list(maps.items())[:4]:
        out, width = matrix(module, parameters(parent)[name]).shape
        generator = torch.Generator().manual_seed(1)
        left, right = 1e-3 * torch.randn(out, 1, generator=generator), torch.randn(width, 1, generator=generator)
        with edited_weights(parent, maps, {name: (left, right)}), torch.inference_mode():
            moved = (metric(parent.logits(tokens)) - rows).sum()
        told = torch.einsum("bpo,or,ir,bpi->", slopes[name], left, right, given[name])
        assert float(moved) == pytest.approx(float(told), rel=0.05, abs=2e-5), name


def test_second_moments_count_real_tokens_only(parent: Model, draw: Callable[..., Tensor]) -> None:
    tokens, maps = draw(3, 6), dict(list(linear_maps(parent).items())[:2])
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] * 2 + [False] * 4])
    found = second_moments(parent, maps, [(tokens[:2], mask[:2]), (tokens[2:], mask[2:])])
    for name, value in inputs(parent, maps, tokens).items():
        rows = value[mask].double()
        torch.testing.assert_close(found[name], rows.T @ rows / 12, atol=1e-5, rtol=1e-4)
