"""Which tokens a divergence needs, where one token is known to bring it about."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from heredity.circuits.behaviours import Context, Piece
from heredity.circuits.divergence import Window, scan
from heredity.circuits.marks import WINDOW, token_weights
from heredity.interp.model import Encoded, Model

TRIGGER = 60


@pytest.fixture
def triggered(twin: Model) -> Model:
    """The parent with another embedding of one token."""
    with torch.no_grad():
        row = twin.bridge.original_model.get_input_embeddings().weight[TRIGGER]
        row.copy_(torch.randn(row.shape, generator=torch.Generator().manual_seed(0)) * row.std() * 3)
    return twin


def context_of(parent: Model, successor: Model, ids: list[int]) -> Context:
    """The context that ends at the last of ``ids``."""
    read = Encoded("x" * len(ids), tuple(ids), tuple((i, i + 1) for i in range(len(ids))))
    scanned = scan(parent, successor, [Window("0", read, read)]).texts[0]
    return Context(Piece("corpus", read, read, scanned), len(ids) - 1, (len(ids) - 1, len(ids) - 1))


def ordinary(draw: Callable[..., Tensor], length: int, seed: int = 0) -> list[int]:
    return [i if i != TRIGGER else 61 for i in draw(1, length, seed)[0].tolist()]


@pytest.mark.parametrize("place", [0, 4, 11])
@pytest.mark.parametrize("batch_tokens", [12, 4096])
def test_the_token_that_brings_it_about_weighs_most(
    parent: Model, triggered: Model, draw: Callable[..., Tensor], place: int, batch_tokens: int
) -> None:
    ids = ordinary(draw, 12)
    assert context_of(parent, triggered, ids).kl < 1e-6
    ids[place] = TRIGGER
    context = context_of(parent, triggered, ids)
    pool = [i for i in range(2, 140) if i != TRIGGER]
    weights = token_weights(parent, triggered, context, pool, seed=0, batch_tokens=batch_tokens)
    assert weights is not None and len(weights) == 12
    assert max(weights) == weights[place] == pytest.approx(1, abs=1e-4)
    assert sorted(weights)[-2] < 0.99 and min(weights) >= 0


def test_weights_are_the_seed_s_and_do_not_depend_on_batching(
    parent: Model, triggered: Model, draw: Callable[..., Tensor]
) -> None:
    ids = ordinary(draw, 10)
    ids[3] = TRIGGER
    context, pool = context_of(parent, triggered, ids), list(range(2, 50))
    one, two, other, small = (
        token_weights(parent, triggered, context, pool, seed=seed, batch_tokens=tokens)
        for seed, tokens in ((0, 4096), (0, 4096), (1, 4096), (0, 10))
    )
    assert one == two != other
    assert small == pytest.approx(one, abs=1e-3)


def test_tokens_further_back_than_the_window_are_not_tried(
    parent: Model, triggered: Model, draw: Callable[..., Tensor]
) -> None:
    ids = ordinary(draw, WINDOW + 9)
    ids[2] = ids[-4] = TRIGGER
    context = context_of(parent, triggered, ids)
    weights = token_weights(parent, triggered, context, list(range(2, 50)), seed=0, batch_tokens=4096)
    assert weights is not None and weights[:9] == [0.0] * 9 and weights[-4] > 0


def test_models_that_read_differently_have_no_weights(parent: Model, twin: Model, draw: Callable[..., Tensor]) -> None:
    context = context_of(parent, twin, ordinary(draw, 5))
    other = Model(twin.bridge, _renamed(twin.tokenizer), spec="x", digest="", floor=0.0)
    assert token_weights(parent, other, context, [2, 3], seed=0, batch_tokens=64) is None


def _renamed(tokenizer: Any) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens(["unheard-of"])
    return changed


def test_where_nothing_diverges_nothing_weighs(parent: Model, twin: Model, draw: Callable[..., Tensor]) -> None:
    context = context_of(parent, twin, ordinary(draw, 6))
    assert context.kl == 0
    assert token_weights(parent, twin, context, [2, 3, 4], seed=0, batch_tokens=64) == [0.0] * 6
