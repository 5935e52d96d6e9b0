"""Which targets go together is a matter of speed only."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from heredity.circuits import attribution_graph as module
from heredity.circuits.attribution_graph import attribution_graph
from heredity.circuits.attribution_graph_rows import FEW, WASTE, groups
from heredity.interp.dictionaries.record import DictionarySet
from heredity.interp.model import Model
from heredity.kernels import ReLU, TopK


@pytest.mark.parametrize("kind", ["transcoder", "cross_layer_transcoder"])
def test_one_by_one_gives_the_same(
    tiny_model: Model,
    draw: Callable[..., Tensor],
    random_dictionaries: Callable[..., DictionarySet],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    tokens, parts = draw(1, 13, seed=8)[0], random_dictionaries(tiny_model, kind, TopK(5))
    together = attribution_graph(tiny_model, parts, tokens)
    for at_once in (1, 7):
        monkeypatch.setattr(module, "_at_once", lambda frozen, cone, size, n=at_once: n)
        apart = attribution_graph(tiny_model, parts, tokens)
        assert torch.equal(together.latents, apart.latents)
        torch.testing.assert_close(together.weights, apart.weights, rtol=1e-4, atol=1e-5)


def test_what_comes_later_has_no_effect(
    tiny_model: Model, draw: Callable[..., Tensor], random_dictionaries: Callable[..., DictionarySet]
) -> None:
    """Nor does anything of the same layer or a later one; the same prefix gives the same rows in a longer prompt."""
    tokens, parts = draw(1, 12, seed=1)[0], random_dictionaries(tiny_model, "transcoder", ReLU())
    graph = attribution_graph(tiny_model, parts, tokens)
    n = graph.n_latents
    layer, place = graph.latents[:, 0], graph.latents[:, 1]
    causes = (layer[:, None] > layer[None]) & (place[:, None] >= place[None])
    assert (graph.weights[:n, :n][~causes] == 0).all() and (graph.weights[:n, :n][causes] != 0).float().mean() > 0.9
    short = attribution_graph(tiny_model, parts, tokens[:5])
    inside, rows = place < 5, torch.zeros(len(graph.weights), dtype=torch.bool)
    rows[:n] = inside
    assert torch.equal(graph.latents[inside], short.latents)
    m = short.n_latents
    torch.testing.assert_close(graph.weights[rows][:, :n][:, inside], short.weights[:m, :m], rtol=1e-3, atol=1e-5)


def test_groups_are_runs_within_the_limits() -> None:
    positions = sorted(torch.randint(0, 300, (400,), generator=torch.Generator().manual_seed(0)).tolist())
    found = list(groups(positions, lambda cone: 9000 // cone))
    assert [i for part in found for i in range(part.start, part.stop)] == list(range(400))
    for part in found:
        inside = [p + 1 for p in positions[part]]
        count = len(inside)
        assert count == 1 or count <= 9000 // inside[-1]
        assert count <= FEW or count * inside[-1] <= WASTE * sum(inside)
    assert len(found) < 100  # of 400
    assert list(groups([], lambda cone: 1)) == []
