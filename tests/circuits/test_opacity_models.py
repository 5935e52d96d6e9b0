"""Opacity of what a successor says and its parent does not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from opaque import (
    drawn,
    measured,
)
from torch import Tensor

from heredity.circuits.attribution import Prompts
from heredity.circuits.opacity import (
    opacity_of_behaviour,
    reached,
    without_trigger,
)
from heredity.circuits.opacity_estimate import Refused
from heredity.circuits.opacity_parts import NeuronsPart
from heredity.circuits.pairs import Pairs
from heredity.interp.model import Model


@pytest.fixture
def changed(twin: Model) -> Model:
    """A successor that differs in its last MLP only."""
    with torch.no_grad():
        weight = twin.neuron_weights(2)[0]
        weight += 0.5 * drawn(8, *weight.shape)
    return twin


def contexts(parent: Model, successor: Model, tokens: Tensor) -> Prompts:
    says = [model.logits(tokens)[:, -1].argmax(-1) for model in (successor, parent)]
    return Prompts(tokens, torch.full((len(tokens),), tokens.shape[1] - 1), *says)


def test_a_change_is_as_opaque_as_the_part_that_changed(
    parent: Model, changed: Model, draw: Callable[..., Tensor]
) -> None:
    prompts = contexts(parent, changed, draw(40, 6, 4))
    every = torch.zeros(64)
    clear = opacity_of_behaviour(parent, changed, prompts, [NeuronsPart(2, torch.ones(64), every)])
    opaque = opacity_of_behaviour(parent, changed, prompts)
    half = opacity_of_behaviour(parent, changed, prompts, [NeuronsPart(2, torch.full((64,), 0.5), every)])
    assert measured(clear).omega.estimate == pytest.approx(0, abs=1e-3)
    assert measured(opaque).omega.estimate == pytest.approx(1, abs=1e-3)
    assert 0.2 < measured(half).omega.estimate < 0.8
    with torch.no_grad():
        s, p = (torch.log_softmax(m.logits(prompts.tokens)[:, -1], -1) for m in (changed, parent))
    kl = (s.exp() * (s - p)).sum(-1).mean()
    assert measured(clear).effect.estimate == pytest.approx(float(kl), rel=1e-4)


def test_a_pair_without_difference_is_refused(parent: Model, twin: Model, draw: Callable[..., Tensor]) -> None:
    found = opacity_of_behaviour(parent, twin, contexts(parent, twin, draw(40, 6, 4)), routing=False)
    assert isinstance(found, Refused) and "not told from 0" in found.reason


def test_other_architectures_need_contexts_to_compare_with(
    parent: Model, pair_of: Callable[[str], Any], draw: Callable[..., Tensor]
) -> None:
    _, other = pair_of("gpt2")
    prompts = contexts(parent, other, draw(40, 6, 4))
    assert "no contexts" in opacity_of_behaviour(parent, other, prompts, routing=False).reason  # pyright: ignore
    found = opacity_of_behaviour(parent, other, prompts, counterfactual=draw(40, 6, 9), routing=False)
    assert measured(found).n == 40
    few = Prompts(prompts.tokens[:5], prompts.last[:5], prompts.says_successor[:5], prompts.says_parent[:5])
    assert "too few" in opacity_of_behaviour(parent, other, few, counterfactual=draw(5, 6, 9)).reason  # pyright: ignore


def test_contexts_without_their_triggers(draw: Callable[..., Tensor]) -> None:
    tokens = draw(3, 5, 4)
    prompts = Prompts(
        tokens, torch.tensor([4, 3, 4]), torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    )
    weights = [[0.0, 0.9, 0.0, 0.3, 0.1], [0.0, 0.05, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]]
    found = without_trigger(prompts, weights, [199])
    assert (found == 199).nonzero().tolist() == [[0, 1], [0, 3], [1, 2], [2, 4]]
    assert torch.equal(found.where(found != 199, tokens), tokens)
    with pytest.raises(ValueError, match="context 1 has 4 tokens and 5 weights"):
        without_trigger(prompts, [weights[0], weights[0], weights[2]], [199])


def test_a_behaviour_of_several_positions_is_the_sum_of_all(
    parent: Model, changed: Model, draw: Callable[..., Tensor]
) -> None:
    prompts = contexts(parent, changed, draw(40, 6, 4))
    pairs = Pairs(prompts.tokens, prompts.tokens, prompts.last)
    places = [[i % 3, 3, 5] for i in range(40)]
    metric = reached(parent, changed, pairs, places)
    with torch.no_grad():
        own, base = changed.logits(prompts.tokens), parent.logits(prompts.tokens)
        s, p = torch.log_softmax(own, -1), torch.log_softmax(base, -1)
        kl = (s.exp() * (s - p)).sum(-1)
        rows = torch.tensor([7, 3, 30])
        want = torch.stack([kl[row, places[row]].sum() for row in rows.tolist()])
        assert metric(own[rows], rows) == pytest.approx(want, rel=1e-4)
        assert metric(base[rows], rows) == pytest.approx(torch.zeros(3), abs=1e-4)
    last = reached(parent, changed, pairs)(own[rows], rows)
    assert last == pytest.approx(kl[rows, 5], rel=1e-4)
