"""Edits on the contexts they are made from: the parent's predictions, and the writes that nodes are told."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from heredity.circuits.attribution import Prompts
from heredity.circuits.components import Node, run_donor
from heredity.circuits.linear import edited_weights, linear_maps, second_moments
from heredity.circuits.repair_edits import outputs, overwriting, random_overwriting, random_restoration, restorable
from heredity.circuits.weights import parameters
from heredity.circuits.writes import head_writes
from heredity.interp.model import Model

PromptsAt = Callable[[Model, Model, Tensor], Prompts]


def moments_of(model: Model, tokens: Tensor) -> dict[str, Tensor]:
    return second_moments(model, linear_maps(model), [(tokens, torch.ones_like(tokens, dtype=torch.bool))])


def test_restored_maps_give_the_parents_predictions_on_their_own_contexts(
    parent: Model, twin: Model, draw: Callable[..., Tensor], prompts_at: PromptsAt
) -> None:
    """Two maps changed, four tokens: four directions of each hold all that they read."""
    maps, weights = linear_maps(twin), parameters(twin)
    changed = [name for name in maps if "mlp" in name][1:3]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in changed:
            noise = torch.randn(weights[name].shape, generator=generator)
            weights[name] += 0.5 * noise * weights[name].square().mean().sqrt()
    tokens = draw(1, 4)
    prompts, moments = prompts_at(parent, twin, tokens), moments_of(twin, draw(20, 10))
    found = restorable(parent, twin, maps, linear_maps(parent), prompts, moments)
    assert set(found) == set(changed)
    wanted, was = parent.logits(tokens)[:, -1], twin.logits(tokens)[:, -1]
    with edited_weights(twin, maps, {name: item.factors(4) for name, item in found.items()}):
        torch.testing.assert_close(twin.logits(tokens)[:, -1], wanted, atol=2e-3, rtol=1e-3)
    drawn = random_restoration(found, moments, dict.fromkeys(found, 4), 0)
    assert {name: right.shape[1] for name, (_, right) in drawn.items()} == dict.fromkeys(changed, 4)
    with edited_weights(twin, maps, drawn):
        assert (twin.logits(tokens)[:, -1] - wanted).norm() > 0.2 * (was - wanted).norm()


@pytest.mark.parametrize("by_mean", [False, True])
def test_overwritten_nodes_write_what_they_are_told_on_their_own_contexts(
    parent: Model, successor: Model, draw: Callable[..., Tensor], prompts_at: PromptsAt, by_mean: bool
) -> None:
    from heredity.circuits.components import mean_donor

    tokens, text = draw(1, 4), draw(20, 10)
    prompts, maps = prompts_at(parent, successor, tokens), linear_maps(successor)
    nodes = [Node(1, "mlp"), Node(0, "head", 1), Node(-1, "embed")]
    places = outputs(successor, maps, nodes)
    assert [place.node for place in places] == [Node(0, "head", 1), Node(1, "mlp")]
    means = mean_donor(successor, [(text, torch.ones_like(text, dtype=torch.bool))]) if by_mean else None
    moments = moments_of(successor, text)
    changes = overwriting(parent, successor, maps, places, prompts, moments, means, 1e7)
    donor = means or run_donor(parent, tokens)
    with edited_weights(successor, maps, changes):
        seen = successor.capture(tokens, ["attn_z@0", "mlp_out@1"])
        head = head_writes(successor, 0, seen["attn_z@0"], [1])[0, -1, 0]
    told = donor.head_writes(0, [1]).expand(1, 4, -1)[0, -1], donor.values["mlp_out@1"].expand(1, 4, -1)[0, -1]
    for own, other in zip((head, seen["mlp_out@1"][0, -1]), told, strict=True):
        torch.testing.assert_close(own, other, atol=2e-2 * float(other.norm()), rtol=0)
    # Another head's columns of the same matrix are untouched.
    left, right = changes[places[0].name]
    outside = torch.ones(len(right), dtype=torch.bool)
    outside[places[0].start : places[0].stop] = False
    assert (left @ right.T)[:, outside].abs().max() == 0
    drawn = random_overwriting(changes, moments, 0)
    assert all(torch.equal(drawn[name][0], changes[name][0]) for name in changes)
