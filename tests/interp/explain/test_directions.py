"""What random directions are explained of, and what is left of q beyond them."""

import numpy as np
import pytest
import torch

from heredity.interp.explain import Contexts, beyond, explain, random_directions
from heredity.interp.model import Encoded
from heredity.kernels import FeatureCSR

VOCABULARY, TEXTS, LENGTH = 200, 300, 30


@pytest.fixture(scope="module")
def world() -> tuple[Contexts, torch.Tensor, np.ndarray]:
    """Texts of a small language, activations that two tokens decide, and the tokens."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCABULARY, (TEXTS, LENGTH))
    texts = []
    for row in ids:
        words = [f"w{i:03d}" for i in row]
        spans = tuple((5 * i, 5 * i + 4) for i in range(LENGTH))
        texts.append(Encoded(" ".join(words), tuple(int(i) for i in row), spans))
    this, before = rng.normal(size=(2, VOCABULARY, 16))
    earlier = np.concatenate([np.zeros((TEXTS, 1), int), ids[:, :-1]], axis=1)
    return Contexts(tuple(texts)), torch.from_numpy((this[ids] + before[earlier]).reshape(-1, 16)), ids.reshape(-1)


def q_of(features: FeatureCSR, contexts: Contexts) -> list[float]:
    found = [each.q for each in explain(features, contexts, range(features.n_latents), seed=0)]
    assert None not in found
    return [q for q in found if q is not None]


def test_random_directions_are_partly_explained_and_nothing_is_left_beyond_them(world) -> None:
    contexts, activations, ids = world
    planted = np.isin(ids, (3, 17, 40, 111))
    n = int(planted.sum())
    random = q_of(random_directions(activations, n_active=n, seed=0), contexts)
    others = q_of(random_directions(activations, n_active=n, directions=10, seed=1), contexts)
    assert np.mean(others) > 0.1, "in this language there is something to take off"
    left = [beyond(q, random) for q in others]
    assert sum(each <= 0.05 for each in left) >= 9, left
    own = q_of(FeatureCSR.from_dense(torch.from_numpy(planted[:, None].astype(np.float32))), contexts)[0]
    # What q lacks of 1 since the texts are few weighs more beyond the bar.
    assert own > 0.9
    assert beyond(own, random) > 0.8


def test_each_is_active_at_the_tokens_farthest_along_it(world) -> None:
    _, activations, _ = world
    features = random_directions(activations, n_active=50, directions=3, seed=2).to_dense()
    assert (features > 0).sum(0).tolist() == [50] * 3
    drawn = torch.randn(16, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    along = activations @ drawn
    for j in range(3):
        on = features[:, j] > 0
        assert along[on, j].min() > along[~on, j].max()
    assert torch.equal(features, random_directions(activations, n_active=50, directions=3, seed=2).to_dense())


def test_ties_are_broken_so_that_the_number_holds() -> None:
    alike = torch.ones(30, 4)
    assert (random_directions(alike, n_active=7, seed=0).to_dense() > 0).sum(0).tolist() == [7] * 19


def test_beyond() -> None:
    random = [0.0] * 18 + [0.5]
    assert beyond(1.0, random) == 1
    assert beyond(0.75, random) == pytest.approx(0.5)
    assert beyond(0.3, random) == 0
    assert beyond(1.0, [1.0] * 19) == 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least 19"):
        beyond(0.5, [0.1] * 18)
    for n in (0, 30):
        with pytest.raises(ValueError, match="fewer than all"):
            random_directions(torch.ones(30, 4), n_active=n, seed=0)
