"""Benign null successors: they learn their text, are drawn again bit for bit, and give the weights back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from heredity.circuits.benign import BenignSuccessors, Recipe, _loss
from heredity.interp.model import Model

RECIPE = Recipe(steps=12, batch=4, rate=2e-2, rank=3)


class Kept:
    """Arrays by name, and how often any were computed."""

    def __init__(self) -> None:
        self.arrays: dict[str, dict[str, Tensor]] = {}
        self.computed = 0

    def __call__(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if name not in self.arrays:
            self.computed += 1
            self.arrays[name] = compute()
        return self.arrays[name]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_is_benign_repeatable_and_leaves_no_trace(
    pair_of: Callable[[str], tuple[Model, Model]], draw: Callable[..., Tensor], family: str
) -> None:
    parent, successor = pair_of(family)
    texts: Any = draw(8, 9).tolist()
    before = successor.logits(draw(2, 7))
    kept = Kept()
    nulls = BenignSuccessors(parent, successor, texts, RECIPE, kept)
    with torch.no_grad(), nulls.draw(3, 0.0) as model:
        untrained = float(_loss(model, texts))
        torch.testing.assert_close(model.logits(draw(2, 7)), parent.logits(draw(2, 7)), atol=1e-4, rtol=1e-4)
    with torch.no_grad(), nulls.draw(3, 1.0) as model:
        trained, said = float(_loss(model, texts)), model.logits(draw(2, 7))
    assert trained < untrained - 0.05
    assert kept.computed == 1
    with BenignSuccessors(parent, successor, texts, RECIPE, Kept()).draw(3, 1.0) as model:
        assert torch.equal(model.logits(draw(2, 7)), said)
    with nulls.draw(4, 1.0) as model:
        assert not torch.equal(model.logits(draw(2, 7)), said)
    assert torch.equal(successor.logits(draw(2, 7)), before)
    assert all(p.grad is None for p in successor.bridge.original_model.parameters())


def test_the_scale_meets_the_size_asked_for(
    pair_of: Callable[[str], tuple[Model, Model]], draw: Callable[..., Tensor]
) -> None:
    parent, successor = pair_of("llama")
    tokens = draw(4, 8)
    target = torch.log_softmax(parent.logits(tokens), -1)

    def size(model: Model) -> float:
        other = torch.log_softmax(model.logits(tokens), -1)
        return float((other.exp() * (other - target)).sum(-1).mean())

    nulls = BenignSuccessors(parent, successor, draw(8, 9).tolist(), RECIPE, Kept())
    scale = nulls.matching_scale(size, 0.01, 0)
    with nulls.draw(0, scale) as model:
        assert size(model) == pytest.approx(0.01, rel=0.1)
