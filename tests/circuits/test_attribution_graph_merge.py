"""Merged graphs: means over prompts, places by role or none, and nothing lost on the way."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heredity.circuits.attribution_graph import attribution_graph
from heredity.circuits.attribution_graph_merge import EVERYWHERE, merge
from heredity.circuits.attribution_graph_record import AttributionGraph
from heredity.circuits.attribution_graph_targets import logit_difference
from heredity.interp.dictionaries.record import DictionarySet
from heredity.interp.model import Model
from heredity.kernels import TopK

ROLES = (("name", "verb", "name", "end"), ("name", "name", "verb", "filler", "end"))


@pytest.fixture
def graphs(
    tiny_model: Model, draw: Callable[..., Tensor], random_dictionaries: Callable[..., DictionarySet]
) -> list[AttributionGraph]:
    """Of two prompts, the second of them capped."""
    parts, target = random_dictionaries(tiny_model, "transcoder", TopK(5)), [logit_difference(tiny_model, [4], [9])]
    first, second = draw(1, 4, seed=1)[0], draw(1, 5, seed=2)[0]
    return [
        attribution_graph(tiny_model, parts, first, targets=target),
        attribution_graph(tiny_model, parts, second, targets=target, max_latents=50),
    ]


def names(graph: AttributionGraph, roles: tuple[str, ...], token_role: bool) -> tuple[list, list]:
    """What each row and column is called once positions are roles."""
    latents = [(layer, roles[place], latent) for layer, place, latent in graph.latents.tolist()]
    errors = [("error", layer, roles[place]) for layer, place in graph.errors.tolist()]
    tokens = [("token", roles[place] if token_role else token) for token, place in graph.tokens.tolist()]
    return [*latents, *graph.logits], [*latents, *errors, *tokens]


@pytest.mark.parametrize("by_role", [True, False])
def test_an_edge_is_the_mean_over_prompts_of_all_that_fall_together(
    graphs: list[AttributionGraph], by_role: bool
) -> None:
    merged = merge(graphs, ROLES if by_role else None)
    roles = ROLES if by_role else tuple((EVERYWHERE,) * len(g.places) for g in graphs)
    expected: dict[tuple, float] = {}
    for graph, own in zip(graphs, roles, strict=True):
        rows, columns = names(graph, own, by_role)
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                pair = row, column
                expected[pair] = expected.get(pair, 0.0) + float(graph.weights[i, j]) / len(graphs)
    rows, columns = names(merged, merged.places, by_role)
    assert len(set(rows)) == len(rows) and len(set(columns)) == len(columns)
    assert set(rows) == {row for row, _ in expected} and set(columns) == {column for _, column in expected}
    found = {(r, c): float(merged.weights[i, j]) for i, r in enumerate(rows) for j, c in enumerate(columns)}
    for pair, value in expected.items():
        assert found[pair] == pytest.approx(value, rel=1e-4, abs=1e-6)
    assert sum(found.values()) == pytest.approx(sum(expected.values()), rel=1e-4)


def test_rows_still_add_up_and_counts_are_kept(graphs: list[AttributionGraph]) -> None:
    for merged in (merge(graphs), merge(graphs, ROLES)):
        assert merged.residuals().max() < 1e-5
        logit = [float(g.read[-1]) for g in graphs]
        assert float(merged.read[-1]) == pytest.approx(sum(logit) / 2, rel=1e-5)
        assert merged.kept.active == sum(g.kept.active for g in graphs)
        assert merged.kept.nodes == merged.n_latents
        assert merged.kept.reason == "at most 50 latents were asked for"
        assert merged.logit_weights.tolist() == [1.0]
        assert 0 < merged.scores.replacement < 1 and merged.prune().sources.any()


def test_one_prompt_twice_is_that_prompt(graphs: list[AttributionGraph]) -> None:
    one = graphs[0]
    places = tuple(f"place {i}" for i in range(len(one.places)))
    both = merge([one, one], [places, places])
    for name in ("latents", "weights", "read", "activations", "errors", "tokens"):
        torch.testing.assert_close(getattr(both, name), getattr(one, name))
    assert (both.roots().total - one.roots().total).abs().max() < 1e-5


def test_different_tokens_of_a_role_are_one_node_without_a_name(graphs: list[AttributionGraph]) -> None:
    merged = merge(graphs, ROLES)
    by_place = {merged.places[place]: token for token, place in merged.tokens.tolist()}
    assert by_place["name"] == -1 and by_place["filler"] == int(graphs[1].tokens[3, 0])
    assert merged.places[-1] == "end"  # where the targets are


def test_what_does_not_belong_together_is_refused(graphs: list[AttributionGraph]) -> None:
    with pytest.raises(ValueError, match="no graphs"):
        merge([])
    with pytest.raises(ValueError, match="every position"):
        merge(graphs, ROLES[:1] * 2)
    other = replace(graphs[1], provenance={**graphs[1].provenance, "model_digest": "another"})
    with pytest.raises(ValueError, match="different models"):
        merge([graphs[0], other])
    with pytest.raises(ValueError, match="last position"):
        merge(graphs, (ROLES[0], (*ROLES[1][:-1], "stop")))
