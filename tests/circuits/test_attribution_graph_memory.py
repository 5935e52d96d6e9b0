"""Caps: what is left out is chosen by influence, counted, and still in every sum; what fits is told beforehand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from heredity.circuits.attribution_graph import attribution_graph, memory, sources_at
from heredity.circuits.attribution_graph_memory import estimate, room
from heredity.circuits.attribution_graph_targets import logit_difference
from heredity.interp.dictionaries.record import DictionarySet
from heredity.interp.model import Model
from heredity.kernels import TopK

Make = Callable[..., DictionarySet]


@pytest.fixture
def parts(tiny_model: Model, random_dictionaries: Make) -> DictionarySet:
    return random_dictionaries(tiny_model, "transcoder", TopK(6), seed=4)


def exact(graph) -> None:
    """Both identities hold, with what was left out as a term of its own."""
    assert graph.residuals().max() < 1e-5
    logits = graph.read[graph.n_latents :].double()
    assert (graph.roots().total - logits).abs().max() < 1e-5 * logits.abs().max()
    assert (graph.dropped[:, 1] >= graph.dropped[:, 0].abs() - 1e-5).all()


def test_a_cap_keeps_the_most_influential(tiny_model: Model, draw: Callable[..., Tensor], parts: DictionarySet) -> None:
    tokens = draw(1, 12, seed=2)[0]
    whole = attribution_graph(tiny_model, parts, tokens)
    assert whole.kept.reason == "" and whole.kept.active == whole.n_latents == 12 * 3 * 6
    shares = []
    for cap in (5, 40, 120):
        graph = attribution_graph(tiny_model, parts, tokens, max_latents=cap)
        kept = graph.kept
        assert (kept.nodes, graph.n_latents, kept.active, kept.unranked) == (cap, cap, 216, 0)
        assert kept.reason == f"at most {cap} latents were asked for"
        exact(graph)
        # Rows are those of the whole graph, without the columns of what is left out.
        both = (whole.latents[:, None] == graph.latents[None]).all(2).nonzero()
        assert torch.equal(both[:, 1], torch.arange(cap))
        own = torch.cat([both[:, 0], torch.arange(whole.n_latents, whole.weights.shape[1])])
        rows = torch.cat([both[:, 0], torch.arange(whole.n_latents, len(whole.weights))])
        torch.testing.assert_close(graph.weights, whole.weights[rows][:, own], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            graph.dropped[:, 1], whole.weights[rows].abs().sum(1) - graph.weights.abs().sum(1), rtol=1e-3, atol=1e-4
        )
        influence = whole.influence[: whole.n_latents]
        shares.append(float(influence[both[:, 0]].sum() / influence.topk(cap).values.sum()))
        # Of the influence that flows through the rows there are, what goes to latents without one.
        assert 0 < kept.dropped_share < 1
    assert min(shares) > 0.85, shares  # of what the best choice would hold


def test_a_small_budget_ranks_only_the_most_effective(
    tiny_model: Model, draw: Callable[..., Tensor], parts: DictionarySet
) -> None:
    tokens = draw(1, 30, seed=5)[0]
    target = [logit_difference(tiny_model, [4], [7])]
    whole = attribution_graph(tiny_model, parts, tokens, targets=target)
    budget = 450_000
    graph = attribution_graph(tiny_model, parts, tokens, targets=target, budget=budget)
    kept = graph.kept
    assert kept.active == whole.n_latents and 0 < kept.nodes < kept.active - kept.unranked < kept.active
    assert "MiB for direct effects hold" in kept.reason and "with the largest total effects were ranked" in kept.reason
    need = estimate(tiny_model.shape, n_tokens=30, active=whole.n_latents, latents=0, dictionaries=3)
    assert 4 * graph.weights.numel() < need.left(budget) < budget
    exact(graph)
    # Total effects are what the latents' activations come to in the whole graph, all paths: a times the roots' slope.
    n, weights, read = whole.n_latents, whole.weights.double(), whole.read.double()
    slope = weights[n:, :n].clone()
    for layer in (2, 1, 0):
        own = (whole.latents[:, 0] == layer).nonzero()[:, 0]
        slope += (slope[:, own] / read[own]) @ weights[own][:, :n]
    nodes = sources_at(tiny_model, parts, tokens)
    last = torch.tensor([len(tokens) - 1])
    total = nodes.total_effects(nodes.frozen.final.backward(target[0].direction[None], last)[0])
    torch.testing.assert_close(total.double(), slope[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(whole.effects()[0, :n], slope[0], rtol=1e-6, atol=1e-9)
    effects = slope[0].abs()
    kept_share = effects.topk(kept.active - kept.unranked).values.sum() / effects.sum()
    assert kept.unranked_share == pytest.approx(1 - float(kept_share), rel=1e-2, abs=1e-4)


def test_no_room_at_all_is_said(tiny_model: Model, draw: Callable[..., Tensor], parts: DictionarySet) -> None:
    with pytest.raises(ValueError, match="hold no latent at all: there are 120 errors and tokens"):
        attribution_graph(tiny_model, parts, draw(1, 30)[0], budget=10_000)


def test_room_fits_and_is_not_wasted() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        active, fixed, wanted, targets = (
            int(torch.randint(1, top, (1,), generator=generator)) for top in (4000, 900, 4000, 11)
        )
        size = int(torch.randint(200_000, 60_000_000, (1,), generator=generator))
        try:
            nodes, ranked, reason = room(active, fixed, wanted, targets, size)
        except ValueError:
            assert (1 + targets) * (2 + fixed + 1 + fixed) > size // 4 - (1 + targets)
            continue
        rows = nodes + targets
        used = rows * (ranked + fixed) + (rows * (nodes + fixed) if nodes < active else 0)
        assert 4 * used <= size and 0 < nodes <= ranked <= active and nodes <= wanted
        assert (reason == "") == (nodes == ranked == active)
        if nodes < min(wanted, active):  # one more would not fit, with twice as many to choose from
            more = nodes + 1
            assert (more + targets) * (min(active, 2 * more) + more + 2 * fixed) * 4 > size


def test_the_estimate_covers_the_arrays(tiny_model: Model, draw: Callable[..., Tensor], parts: DictionarySet) -> None:
    tokens = draw(1, 40)[0]
    nodes = sources_at(tiny_model, parts, tokens)
    frozen = nodes.frozen
    said = memory(tiny_model, parts, 40, per_token=18, latents=10_000)
    assert said.patterns == sum(layer.pattern.numel() * 4 for layer in frozen.layers)
    recorded = [*frozen.mlp_in, *frozen.mlp_out, *frozen.mid, nodes.errors, nodes.constant]
    recorded += [layer.bias for layer in frozen.layers] + [frozen.embedded, frozen.entry_bias]
    assert said.weights == sum(4 * (layer.value.numel() + layer.output.numel()) for layer in frozen.layers)
    assert said.activations >= sum(t.numel() * t.element_size() for t in recorded)
    graph = attribution_graph(tiny_model, parts, tokens)
    assert graph.weights.numel() * 4 <= said.matrix <= 1.2 * graph.weights.numel() * 4
    assert said.total == said.patterns + said.activations + said.weights + said.matrix
