"""Latents of a difference: a planted direction is found, told from its null, and closes the gap it carries."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from opaque import drawn
from torch import Tensor

from heredity.circuits.attribution import Prompts
from heredity.circuits.difference_latents import auroc, difference_sae, differences, gap_closed, lengths
from heredity.interp.model import Model

SITE = "mlp_out@2"


@pytest.fixture
def changed(twin: Model) -> Model:
    """A successor whose last MLP writes one more direction."""
    with torch.no_grad():
        weight = twin.neuron_weights(2)[0]
        weight[:, :] += 0.5 * torch.outer(drawn(8, len(weight)), direction())
    return twin


def direction() -> Tensor:
    return torch.nn.functional.normalize(drawn(5, 32), dim=0)


def prompts_of(parent: Model, successor: Model, tokens: Tensor) -> Prompts:
    says = [model.logits(tokens)[:, -1].argmax(-1) for model in (successor, parent)]
    return Prompts(tokens, torch.full((len(tokens),), tokens.shape[1] - 1), *says)


def test_a_planted_direction(parent: Model, changed: Model, draw: Callable[..., Tensor]) -> None:
    with torch.no_grad():
        tokens = draw(120, 12, 3)
        values = [model.capture(tokens, [SITE])[SITE].flatten(0, 1) for model in (parent, changed)]
    d = difference_sae([(values[0], values[1])], SITE, latents=4, steps=150, seed=0)
    with torch.no_grad():
        prompts = prompts_of(parent, changed, draw(40, 6, 4))
        seen = lengths(d, differences(parent, changed, prompts, SITE)).mean(0)
        best = d.W_dec[0][int(seen.argmax())]
    assert abs(float(torch.nn.functional.cosine_similarity(best, direction(), dim=0))) > 0.95
    turned = drawn(6, 32)
    turned = turned - (turned @ direction()) * direction()
    places = [[5]] * 40
    own, other, both = gap_closed(
        parent, changed, prompts, places, SITE, [best[None], turned[None], torch.stack([best, turned])]
    )
    assert own.estimate > 0.8 and abs(other.estimate) < 0.01 and both.estimate > own.estimate - 0.05
    assert own.low <= own.estimate <= own.high


def test_differences_are_those_of_the_last_token(parent: Model, changed: Model, draw: Callable[..., Tensor]) -> None:
    tokens = draw(3, 6, 4)
    with torch.no_grad():
        prompts = prompts_of(parent, changed, tokens)
        short = Prompts(tokens, torch.tensor([5, 2, 4]), prompts.says_successor, prompts.says_parent)
        a, b = (model.capture(tokens, [SITE])[SITE] for model in (parent, changed))
    want = torch.stack([(b - a)[i, last] for i, last in enumerate([5, 2, 4])])
    assert torch.allclose(differences(parent, changed, short, SITE), want, atol=1e-5)


def test_auroc() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(5, size=30).astype(float), rng.integers(4, size=20).astype(float)
    brute = np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])
    assert auroc(a, b) == pytest.approx(brute)
