"""What counts as inherited, on changes made by hand: kept, amplified, replaced, passed on; and the models exchanged."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from heredity.circuits.attribution import Prompts
from heredity.circuits.components import Node, nodes_of, read_stream, run_donor, stream_sites
from heredity.circuits.inheritance import Emergence, emergence, exchanged, mean_writes, summarise
from heredity.interp.model import Model

Pairs = Callable[[str], tuple[Model, Model]]


def of(
    model: Model, other: Model, tokens: Tensor, prompts_at: Callable[..., Prompts], nodes: list[Node] | None = None
) -> Emergence:
    chosen = nodes or nodes_of(model)
    text = [(tokens, torch.ones_like(tokens, dtype=torch.bool))]
    prompts = prompts_at(other, model, tokens)
    return emergence(model, other, prompts, mean_writes(model, other, text, chosen), chosen, 0)


def held(found: Emergence) -> dict[str, float]:
    return {str(each.node): each.inherited.estimate for each in found.nodes if each.inherited is not None}


def reinitialise(model: Model, layer: int) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in model.bridge.original_model.model.layers[layer].mlp.parameters():
            value.copy_(1.5 * value.square().mean().sqrt() * torch.randn(value.shape, generator=generator))


def test_a_model_has_nothing_that_it_did_not_inherit_from_itself(
    parent: Model, twin: Model, draw: Callable[..., Tensor], prompts_at: Callable[..., Prompts]
) -> None:
    found = of(twin, parent, draw(12, 9), prompts_at)
    assert found.share is not None and (found.share.estimate, found.share.low, found.share.high) == (0, 0, 0)
    assert set(held(found).values()) == {1.0} and len(found.circuit) >= 3
    assert found.carriers(0.85) == []


def test_the_new_node_is_new_and_those_that_pass_it_on_are_not(
    parent: Model, twin: Model, draw: Callable[..., Tensor], prompts_at: Callable[..., Prompts]
) -> None:
    reinitialise(twin, 1)
    found = of(twin, parent, draw(24, 9), prompts_at)
    shares = held(found)
    assert shares.pop("mlp_out@1") < 0.2
    assert len(shares) >= 3 and set(shares.values()) == {1.0}
    # Downstream values differ between the models all the same.
    values = [run_donor(m, draw(24, 9)).write(Node(2, "mlp")) for m in (parent, twin)]
    assert float((values[0] - values[1]).norm() / values[0].norm()) > 0.1
    assert found.carriers(0.85) == [Node(1, "mlp")]
    assert found.share is not None and found.share.low < found.share.estimate < found.share.high
    new = next(each for each in found.nodes if each.node == Node(1, "mlp"))
    effects = {each.node: each.effect.estimate for each in found.nodes if each.node in found.circuit}
    whole = sum(value for node, value in effects.items() if node.kind in ("head", "mlp"))
    assert new.inherited is not None
    assert found.share.estimate == pytest.approx(new.effect.estimate * (1 - new.inherited.estimate) / whole)


def test_twice_as_strong_is_half_inherited(
    parent: Model, twin: Model, draw: Callable[..., Tensor], prompts_at: Callable[..., Prompts]
) -> None:
    """The last MLP, behind which only the norm is not linear; its constant part is in no effect."""
    projection = twin.bridge.blocks[2].mlp.out.original_component
    with torch.no_grad():
        projection.weight.mul_(2)
    shares = held(of(twin, parent, draw(40, 9), prompts_at))
    assert shares["mlp_out@2"] == pytest.approx(0.5, abs=0.1)
    assert {name: share for name, share in shares.items() if name != "mlp_out@2"} == dict.fromkeys(
        set(shares) - {"mlp_out@2"}, 1.0
    )
    # And all of what half as much does is there in what does twice as much.
    back = held(of(parent, twin, draw(40, 9), prompts_at))
    assert back.get("mlp_out@2", 1.0) == 1.0


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "neox"])
def test_exchanging_the_models_exchanges_emergent_and_lost(
    pair_of: Pairs, draw: Callable[..., Tensor], family: str
) -> None:
    parent, successor = pair_of(family)
    tokens = draw(10, 8)
    says = [model.logits(tokens)[:, -1].argmax(-1) for model in (successor, parent)]
    prompts = Prompts(tokens, torch.full((10,), 7), *says)
    text = [(tokens, torch.ones_like(tokens, dtype=torch.bool))]
    nodes = nodes_of(parent)

    def both(p: Model, s: Model, at: Prompts) -> tuple[Emergence, Emergence]:
        return (
            emergence(s, p, at, mean_writes(s, p, text, nodes), nodes, 0),
            emergence(p, s, exchanged(at), mean_writes(p, s, text, nodes), nodes, 0),
        )

    new, gone = both(parent, successor, prompts)
    assert both(successor, parent, exchanged(prompts)) == (gone, new)
    assert new != gone and len(new.nodes) == len(nodes)
    if family == "llama":  # the others' random nodes have no effect that all contexts agree on
        assert new.share is not None and gone.share is not None and 0 < new.share.estimate < 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "neox"])
def test_reading_one_s_own_stream_gives_one_s_own_writes(
    pair_of: Pairs, draw: Callable[..., Tensor], family: str
) -> None:
    parent, successor = pair_of(family)
    tokens = draw(3, 8)
    stream = successor.capture(tokens, stream_sites(successor))
    own, read, other = run_donor(successor, tokens), read_stream(successor, tokens, stream), run_donor(parent, tokens)
    of_parent = read_stream(parent, tokens, stream)
    for node in nodes_of(parent)[:-1]:
        assert torch.allclose(own.write(node), read.write(node), atol=1e-5)
        if node.layer > 0:  # the first block's stream differs as little as the embeddings do
            assert not torch.allclose(of_parent.write(node), other.write(node), atol=1e-5)


def test_effects_are_those_of_real_interventions(
    parent: Model, successor: Model, draw: Callable[..., Tensor], prompts_at: Callable[..., Prompts]
) -> None:
    tokens = draw(8, 7)
    found = of(successor, parent, tokens, prompts_at)
    says = [m.logits(tokens)[:, -1].argmax(-1) for m in (successor, parent)]
    rows = torch.arange(8)

    def metric(logits: Tensor) -> Tensor:
        at = logits[:, -1]
        return torch.where(says[0] == says[1], at.log_softmax(-1)[rows, says[0]], at[rows, says[0]] - at[rows, says[1]])

    turn = torch.where((says[0] == says[1]) & (metric(successor.logits(tokens)) < metric(parent.logits(tokens))), -1, 1)
    for node in (Node(1, "mlp"), Node(0, "head", 3)):
        site = str(node)
        mean = successor.capture(tokens, [site])[site].mean((0, 1))
        ablated = metric(successor.logits(tokens, edits={site: lambda value, mean=mean: mean.expand_as(value)}))
        want = (turn * (metric(successor.logits(tokens)) - ablated)).mean()
        got = next(each.effect.estimate for each in found.nodes if each.node == node)
        assert got == pytest.approx(float(want), abs=1e-4)


def test_shares_add_up_as_defined() -> None:
    nodes = [Node(-1, "embed"), Node(0, "head", 0), Node(0, "mlp"), Node(1, "mlp")]
    effects = np.array([[10.0, 10.0], [4.0, 4.0], [2.0, 2.0], [-1.0, 1.0]])
    carried = np.array([[9.0, 9.0], [1.0, 1.0], [5.0, 5.0], [0.0, 0.0]])
    found = summarise(nodes, effects, carried, 0)
    assert held(found) == {"embed": 0.9, "attn_head@0.0": 0.25, "mlp_out@0": 1.0}
    assert found.nodes[3].inherited is None  # its effect is 0 ± 1
    assert found.share is not None and found.share.estimate == pytest.approx((1 + 3) / (1 + 4 + 2))
    assert found.carriers(0.7) == [Node(0, "head", 0)]
    assert found.carriers(0.9) == [Node(0, "head", 0), Node(-1, "embed")]
    nothing = summarise(nodes[3:], effects[3:], carried[3:], 0)
    assert (nothing.share, nothing.circuit) == (None, ())
