"""Attribution against the real interventions it approximates, where the approximation is exact to first order."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from heredity.circuits.attribution import Prompts, attribute, prompts_of
from heredity.circuits.behaviours import episodes
from heredity.circuits.components import Node, head_writes, mean_donor, nodes_of, patched_logits, run_donor
from heredity.interp.model import Model

Pairs = Callable[[str], tuple[Model, Model]]
Nearer = Callable[..., AbstractContextManager[None]]


def some_prompts(draw: Callable[..., Tensor]) -> Prompts:
    """Rows of different lengths; from the fifth on both models say the same."""
    tokens = draw(12, 9)
    says = draw(12, 2, seed=5)
    says[4:, 1] = says[4:, 0]
    return Prompts(tokens, torch.tensor([8, 8, 5, 6, 8, 7, 8, 8, 8, 8, 8, 8]), says[:, 0], says[:, 1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2", "olmo2", "granite"])
def test_where_the_difference_is_tiny_attribution_is_the_effect_of_the_patch(
    pair_of: Pairs, nearer: Nearer, draw: Callable[..., Tensor], family: str
) -> None:
    parent, successor = pair_of(family)
    prompts = some_prompts(draw)
    metric = prompts.metric()
    with nearer(parent, successor, 0.005):
        found = attribute(parent, successor, prompts)
        before, goal = metric(successor.logits(prompts.tokens)), metric(parent.logits(prompts.tokens))
        donor = run_donor(parent, prompts.tokens)
        effects = {
            node: before - metric(patched_logits(successor, prompts.tokens, [node], donor))
            for node in found.by_position
        }
    towards = (before - goal).sign()
    assert set(towards[4:].tolist()) == {-1.0, 1.0}, "rows of both signs are needed here"
    assert found.gap == pytest.approx(float((before - goal).abs().sum()), rel=1e-4)
    assert set(effects) == set(nodes_of(successor)[:-1]) == found.moved
    scale = max(float(effect.abs().max()) for effect in effects.values())
    for node, effect in effects.items():
        rows = found.by_position[node].sum(-1)
        torch.testing.assert_close(
            rows, effect * towards, atol=0.02 * scale, rtol=0.05, msg=lambda m, node=node: f"{family} {node}: {m}"
        )
        assert found.share(node) == pytest.approx(float(rows.sum()) / found.gap, rel=1e-3)
    assert found.share(nodes_of(successor)[-1]) == 0.0


def test_replacing_what_was_planted_counts_as_positive_in_every_row(
    parent: Model, twin: Model, draw: Callable[..., Tensor], prompts_at: Callable[..., Prompts]
) -> None:
    """Also where both say the same and the parent is the surer one."""
    with torch.no_grad():
        twin.bridge.blocks[2].mlp.out.original_component.weight.mul_(1.05)
    prompts = prompts_at(parent, twin, draw(24, 8))
    metric = prompts.metric()
    gaps = metric(twin.logits(prompts.tokens)) - metric(parent.logits(prompts.tokens))
    agree = prompts.says_successor == prompts.says_parent
    assert {-1.0, 1.0} <= set(gaps[agree].sign().tolist())
    found = attribute(parent, twin, prompts)
    planted = Node(2, "mlp")
    assert found.moved == {planted}
    torch.testing.assert_close(found.by_position[planted].sum(-1), gaps.abs(), rtol=0.1, atol=1e-3)
    assert found.share(planted) == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(found.by_position[planted][:, :-1], torch.zeros(24, 7))


def test_nothing_after_the_diverging_position_counts(
    parent: Model, successor: Model, draw: Callable[..., Tensor]
) -> None:
    prompts = some_prompts(draw)
    found = attribute(parent, successor, prompts)
    for values in found.by_position.values():
        assert not values[2, 6:].any() and values[2, :6].any()
    other = prompts.tokens.clone()
    other[2, 6:] = 3
    again = attribute(parent, successor, Prompts(other, prompts.last, prompts.says_successor, prompts.says_parent))
    assert again.gap == pytest.approx(found.gap, rel=1e-4)
    for node in found.by_position:
        torch.testing.assert_close(again.by_position[node][2], found.by_position[node][2], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_towards_the_mean_it_is_the_slope_of_the_metric(
    pair_of: Pairs, draw: Callable[..., Tensor], family: str
) -> None:
    parent, successor = pair_of(family)
    prompts = some_prompts(draw)
    metric = prompts.metric()
    means = mean_donor(successor, [(draw(6, 9, seed=9), torch.ones(6, 9, dtype=torch.bool))])
    found = attribute(parent, successor, prompts, means)
    goal = metric(parent.logits(prompts.tokens))
    towards = (metric(successor.logits(prompts.tokens)) - goal).sign()
    own = run_donor(successor, prompts.tokens).values
    step = 2e-2
    assert not any(node.kind in ("embed", "unembed") for node in found.by_position)
    effects = {}
    for node in found.by_position:
        if node.kind == "mlp":
            site = f"mlp_out@{node.layer}"
            change = means.values[site] - own[site]
        else:
            site = f"attn_out@{node.layer}"
            write = head_writes(successor, node.layer, own[f"attn_z@{node.layer}"], [node.head])[:, :, 0]
            change = means.values[f"writes@{node.layer}"][node.head] - write
        up, down = (
            metric(successor.logits(prompts.tokens, edits={site: lambda v, c=c, t=t: v + t * c}))
            for c, t in ((change, step), (change, -step))
        )
        effects[node] = (down - up) / (2 * step) * towards
    scale = max(float(effect.abs().max()) for effect in effects.values())
    for node, effect in effects.items():
        torch.testing.assert_close(found.by_position[node].sum(-1), effect, atol=0.01 * scale, rtol=0.05)


def test_the_metric_is_a_contrast_or_the_log_probability_of_what_both_say() -> None:
    logits = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(0))
    prompts = Prompts(
        torch.zeros(2, 4, dtype=torch.int64), torch.tensor([3, 1]), torch.tensor([7, 2]), torch.tensor([4, 2])
    )
    got = prompts.metric()(logits)
    want = [logits[0, 3, 7] - logits[0, 3, 4], logits[1, 1].log_softmax(-1)[2]]
    torch.testing.assert_close(got, torch.stack(want))


def test_contexts_become_rows_that_end_where_the_models_part(piece: Callable[..., object]) -> None:
    scanned = piece(
        [0, 0, 2.0, 0, 0, 0, 0, 3.0, 0], ids=range(20, 29), top_successor=list(range(9)), top_parent=list(range(10, 19))
    )
    prompts = prompts_of(episodes(scanned, 1.0))  # pyright: ignore[reportArgumentType]
    assert prompts.last.tolist() == [2, 7]
    assert prompts.tokens[0, :3].tolist() == [20, 21, 22] and prompts.tokens[1].tolist() == list(range(20, 28))
    assert (prompts.says_successor.tolist(), prompts.says_parent.tolist()) == ([2, 7], [12, 17])


def test_equal_models_have_no_gap_and_nothing_moved(parent: Model, twin: Model, draw: Callable[..., Tensor]) -> None:
    found = attribute(parent, twin, some_prompts(draw))
    assert found.gap == 0 and not found.moved
    assert all(found.share(node) == 0 for node in nodes_of(parent))
