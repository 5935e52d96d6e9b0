"""The successor's nodes run inside the parent, and what exchanging nodes costs on other text."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from heredity.circuits.attribution import Prompts
from heredity.circuits.components import Donor, Node, nodes_of, patched_logits, run_donor
from heredity.circuits.transplant import installed, parents_values, side_effects, transplant
from heredity.interp.model import Model

Pairs = Callable[[str], tuple[Model, Model]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "neox"])
def test_with_all_nodes_the_parent_is_the_successor(
    pair_of: Pairs, draw: Callable[..., Tensor], prompts_at: Callable[..., Prompts], family: str
) -> None:
    parent, successor = pair_of(family)
    prompts = prompts_at(parent, successor, draw(5, 8))
    nodes = nodes_of(parent)
    want, before = (m.logits(prompts.tokens)[:, -1] for m in (successor, parent))
    assert torch.allclose(installed(parent, successor, prompts, nodes), want, atol=1e-3)
    assert torch.allclose(installed(parent, successor, prompts, []), before, atol=1e-4)
    found = transplant(parent, successor, prompts, nodes, [[], nodes[:1]], 0)
    assert found.own.estimate == pytest.approx(1, abs=1e-4)
    assert found.controls[0] == pytest.approx(0, abs=1e-4) and found.controls[1] < 1


def test_a_transplanted_node_reads_what_the_parent_makes_of_the_text(
    parent: Model, successor: Model, draw: Callable[..., Tensor], prompts_at: Callable[..., Prompts]
) -> None:
    """It is the parent with that node's weights, not with its value in the successor."""
    prompts = prompts_at(parent, successor, draw(4, 8))
    got = installed(parent, successor, prompts, [Node(1, "mlp")])
    block, other = (m.bridge.original_model.model.layers[1] for m in (parent, successor))
    kept = [value.clone() for value in block.parameters()]
    try:
        with torch.no_grad():
            for name in ("mlp", "post_attention_layernorm"):
                pairs = zip(getattr(block, name).parameters(), getattr(other, name).parameters(), strict=True)
                for mine, theirs in pairs:
                    mine.copy_(theirs)
            want = parent.logits(prompts.tokens)[:, -1]
    finally:
        with torch.no_grad():
            for value, old in zip(block.parameters(), kept, strict=True):
                value.copy_(old)
    assert torch.allclose(got, want, atol=1e-4)
    by_value = patched_logits(parent, prompts.tokens, [Node(1, "mlp")], run_donor(successor, prompts.tokens))
    assert not torch.allclose(by_value[:, -1], want, atol=1e-3)


def test_side_effects_are_the_divergence_on_that_text(
    parent: Model, successor: Model, draw: Callable[..., Tensor]
) -> None:
    texts = [
        (draw(3, 9), torch.arange(9)[None] < torch.tensor([[9], [5], [7]])),
        (draw(2, 6, seed=1), torch.ones(2, 6) > 0),
    ]
    nodes = [Node(1, "head", 2), Node(2, "mlp")]
    found = side_effects(successor, texts, parents_values(parent, texts), nodes, [[], [Node(0, "mlp")]], 0)
    total, count = 0.0, 0
    for tokens, mask in texts:
        changed = patched_logits(successor, tokens, nodes, run_donor(parent, tokens)).double().log_softmax(-1)
        before = successor.logits(tokens).double().log_softmax(-1)
        total += float((before.exp() * (before - changed)).sum(-1)[mask].sum())
        count += int(mask.sum())
    assert found.own.estimate == pytest.approx(total / count, rel=1e-3)
    assert found.own.low < found.own.estimate < found.own.high
    assert found.controls[0] == 0 < found.controls[1]
    means = Donor({"mlp_out@2": torch.zeros(32)}, None)
    assert side_effects(successor, texts, [means, means], [Node(2, "mlp")], [], 0).own.estimate > 0
