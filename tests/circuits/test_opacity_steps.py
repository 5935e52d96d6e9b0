"""Opacity step by step: each step as if it were measured alone, and all of them together as the whole."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from heredity.circuits.attribution import Prompts
from heredity.circuits.opacity import contrast_of_models, measure
from heredity.circuits.opacity_estimate import Opacity
from heredity.circuits.opacity_parts import NeuronsPart
from heredity.circuits.opacity_prompts import Episodes
from heredity.circuits.opacity_runs import Contrast
from heredity.circuits.opacity_split import Split, whole_model
from heredity.circuits.opacity_steps import opacity_by_step
from heredity.interp.model import Model

N = 36
PLACES = [[2, 3, 5], [1, 5], [0, 4, 5]]


@pytest.fixture
def changed(twin: Model) -> Model:
    """The parent with other neurons in two layers."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in (1, 2):
            weight = twin.neuron_weights(layer)[0]
            weight.add_(torch.randn(weight.shape, generator=generator) * weight.std())
    return twin


@pytest.fixture
def episodes(parent: Model, changed: Model, draw: Callable[..., Tensor]) -> Episodes:
    """Prompts of few words, so that steps come back, that part at two or three places each."""
    tokens = draw(N, 6, seed=11)
    tokens = tokens[0, :4][torch.randint(4, tokens.shape, generator=torch.Generator().manual_seed(1))]
    last, places = torch.full((N,), 5), [PLACES[i % 3] for i in range(N)]
    said = changed.logits(tokens).argmax(-1)
    says = [[int(said[i, place]) for place in each] for i, each in enumerate(places)]
    return Episodes(Prompts(tokens, last, said[:, -1], parent.logits(tokens).argmax(-1)[:, -1]), places, says)


@pytest.fixture
def split(changed: Model) -> Split:
    part = NeuronsPart(2, torch.linspace(0, 1, 64), torch.zeros(64))
    return whole_model(changed, [part], heads=True, side=1)


@pytest.fixture
def contrast(parent: Model, changed: Model, episodes: Episodes, split: Split) -> Contrast:
    return contrast_of_models(parent, changed, episodes.prompts, split, places=episodes.places)


def test_a_step_is_what_is_measured_of_it_alone(
    contrast: Contrast, parent: Model, changed: Model, episodes: Episodes, split: Split
) -> None:
    steps = opacity_by_step(contrast, parent, changed, episodes, [split], most=3, fewest=10, seed=5)
    assert len(steps) == 3
    for step in steps:
        rows = episodes.prompts.tokens.tolist()
        at = [[p for p in each if row[p] == step.token] for row, each in zip(rows, episodes.places, strict=True)]
        kept = torch.tensor([i for i, each in enumerate(at) if each])
        some = Prompts(*(getattr(episodes.prompts, name)[kept] for name in vars(episodes.prompts)))
        alone = contrast_of_models(parent, changed, some, split, places=[each for each in at if each])
        expected = measure(alone, split, controls=0, routing=False, fewest=10, seed=5)
        assert isinstance(expected, Opacity) and step.opacity.n == expected.n == len(kept)
        for name in ("omega", "needed", "alone", "effect"):
            got, wanted = getattr(step.opacity, name), getattr(expected, name)
            assert (got.estimate, got.low, got.high) == pytest.approx(
                (wanted.estimate, wanted.low, wanted.high), rel=1e-4
            )
        said = [
            s
            for row, each, says in zip(rows, episodes.places, episodes.says, strict=True)
            for p, s in zip(each, says, strict=True)
            if row[p] == step.token
        ]
        assert step.says[0] in set(said) and said.count(step.says[0]) == max(map(said.count, said))


def test_steps_share_out_the_whole(
    contrast: Contrast, parent: Model, changed: Model, episodes: Episodes, split: Split
) -> None:
    steps = opacity_by_step(contrast, parent, changed, episodes, [split], most=100, fewest=1)
    whole = measure(contrast, split, controls=0, routing=False)
    assert isinstance(whole, Opacity)
    shares = [step.share for step in steps]
    assert sum(shares) == pytest.approx(1, abs=1e-5) and shares == sorted(shares, reverse=True)
    together = sum(step.share * step.opacity.omega.estimate for step in steps)
    assert together == pytest.approx(whole.omega.estimate, rel=1e-4)


def test_a_step_of_few_prompts_is_left_out(
    contrast: Contrast, parent: Model, changed: Model, episodes: Episodes, split: Split
) -> None:
    held = {
        step.token: step.opacity.n
        for step in opacity_by_step(contrast, parent, changed, episodes, [split], most=9, fewest=1)
    }
    fewest = sorted(held.values())[-2]
    kept = opacity_by_step(contrast, parent, changed, episodes, [split], most=9, fewest=fewest)
    assert {step.token for step in kept} == {token for token, n in held.items() if n >= fewest}
    assert len(kept) < len(held)
