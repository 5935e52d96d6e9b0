"""Exchanged queries and keys against recomputed softmaxes, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from heredity.circuits.attention_changes import each_exchanged, exchanged, record_attention
from heredity.interp.errors import ModelError


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def masked(scores: torch.Tensor, low: float) -> torch.Tensor:
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), low)


@pytest.mark.parametrize("low", [torch.finfo(torch.float64).min, -torch.inf])
@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
def test_one_score_at_a_time_is_a_softmax_each(size: float, low: float) -> None:
    n = 7
    scores, other = masked(size * random(2, 3, n, n), low), masked(size * random(2, 3, n, n, seed=1), low)
    slope = random(2, 3, n, n, seed=2)
    expected = torch.zeros_like(scores)
    for k in range(n):
        changed = scores.clone()
        changed[..., k] = other[..., k]
        expected[..., k] = ((scores.softmax(-1) - changed.softmax(-1)) * slope).sum(-1)
    torch.testing.assert_close(each_exchanged(scores, other, slope), expected, rtol=1e-9, atol=1e-12)


def test_a_saturated_softmax_has_no_gradient_and_yet_an_effect() -> None:
    scores, slope = torch.tensor([[[[0.0, 200.0]]]]).double(), torch.tensor([[[[1.0, 3.0]]]]).double()
    other = torch.tensor([[[[0.0, -200.0]]]]).double()
    held = scores.clone().requires_grad_()
    (held.softmax(-1) * slope).sum().backward()
    assert held.grad is not None
    assert float(held.grad.abs().max()) < 1e-80
    assert float(exchanged(scores, other, slope)) == pytest.approx(2)
    assert each_exchanged(scores, other, slope)[..., 1].item() == pytest.approx(2)


@pytest.mark.parametrize("kind", ["layer", "grouped"])
def test_what_is_recorded_is_what_the_model_attends_by(kind: str, bed_of: Callable, plain: Any) -> None:
    model, pairs, _ = bed_of(kind)
    patterns = plain.of(model).run(pairs.clean).patterns
    for layer, attention in enumerate(record_attention(model, pairs.clean)):
        assert attention.scale == pytest.approx(0.5)
        for head in range(model.shape.n_heads):
            torch.testing.assert_close(attention.pattern[:, head], patterns[layer, head])


def test_other_queries_give_other_patterns(bed_of: Callable, plain: Any) -> None:
    model, pairs, _ = bed_of("grouped")
    written = plain.of(model)
    own, other = (record_attention(model, tokens)[0] for tokens in (pairs.clean, pairs.corrupt))
    found = own.scores_of(other.q, own.k).softmax(-1)
    # In layer 0 a query's change does not depend on the rest of the run.
    q = [model.capture(tokens, ["attn_q@0"])["attn_q@0"] for tokens in (pairs.clean, pairs.corrupt)]
    for head in range(model.shape.n_heads):
        moved = written.run(pairs.clean, inner={f"attn_q@0.{head}": (q[1] - q[0])[:, :, head]})
        torch.testing.assert_close(found[:, head], moved.patterns[0, head])


def test_a_loaded_model_is_recorded(parent: Any, draw: Callable) -> None:
    found = record_attention(parent, draw(2, 5))
    assert [attention.scale for attention in found] == pytest.approx([8**-0.5] * 3, rel=1e-4)
    assert found[0].k.shape == (2, 5, 2, 8)
    assert bool((found[0].pattern.triu(1) == 0).all())


def test_position_biases_are_refused(pair_of: Callable, draw: Callable) -> None:
    with pytest.raises(ModelError):
        record_attention(pair_of("bloom")[0], draw(1, 4))
