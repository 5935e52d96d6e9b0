"""Which edges count as inherited, on changes made by hand; their effects against interventions written out here."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from heredity.circuits.attribution import Prompts
from heredity.circuits.components import Node, nodes_of
from heredity.circuits.edge_inheritance import EdgeInheritance, edge_inheritance, reads
from heredity.circuits.inheritance import exchanged, mean_writes
from heredity.interp.model import Model


def of(model: Model, other: Model, prompts: Prompts, nodes: list[Node]) -> tuple[EdgeInheritance, ...]:
    text = [(prompts.tokens, torch.ones_like(prompts.tokens, dtype=torch.bool))]
    return edge_inheritance(model, other, prompts, mean_writes(model, other, text, nodes), nodes, 0)


def held(found: tuple[EdgeInheritance, ...]) -> dict[tuple[str, str], float]:
    return {(str(e.source), str(e.target)): e.inherited.estimate for e in found if e.inherited is not None}


def reinitialise(mlp: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in mlp.parameters():
            value.copy_(1.5 * value.square().mean().sqrt() * torch.randn(value.shape, generator=generator))


def test_a_model_inherited_every_edge_from_itself(
    parent: Model, twin: Model, draw: Callable[..., Tensor], prompts_at: Callable[..., Prompts]
) -> None:
    nodes = nodes_of(parent)
    found = of(twin, parent, prompts_at(parent, twin, draw(12, 9)), nodes)
    assert len(found) == sum(reads(parent, target, source) for target in nodes for source in nodes)
    assert len(held(found)) >= 5 and set(held(found).values()) == {1.0}


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "neox"])
def test_other_families_have_their_own_edges_and_exchange_them(
    pair_of: Callable[[str], tuple[Model, Model]], draw: Callable[..., Tensor], family: str
) -> None:
    parent, successor = pair_of(family)
    tokens = draw(6, 8)
    says = [model.logits(tokens)[:, -1].argmax(-1) for model in (successor, parent)]
    prompts = Prompts(tokens, torch.full((6,), 7), *says)
    nodes = [node for node in nodes_of(parent) if node.kind != "head" or node.head == 0]
    edges = {(str(edge.source), str(edge.target)) for edge in of(successor, parent, prompts, nodes)}
    # Where attention and MLP stand side by side, neither reads the other.
    assert (("attn_head@1.0", "mlp_out@1") in edges) == (family != "neox")
    assert ("mlp_out@0", "attn_head@1.0") in edges and ("mlp_out@1", "mlp_out@0") not in edges
    assert set(held(of(successor, successor, prompts, nodes)).values()) <= {1.0}


def test_edges_in_and_out_of_a_new_node_are_new_and_those_that_pass_it_on_are_not(
    parent: Model, twin: Model, draw: Callable[..., Tensor], prompts_at: Callable[..., Prompts]
) -> None:
    reinitialise(twin.bridge.original_model.model.layers[1].mlp)
    shares = held(of(twin, parent, prompts_at(parent, twin, draw(24, 9)), nodes_of(parent)))
    new = {edge: share for edge, share in shares.items() if "mlp_out@1" in edge}
    assert {"source" if edge[0] == "mlp_out@1" else "target" for edge in new} == {"source", "target"}
    assert max(new.values()) < 0.3
    old = set(shares) - set(new)
    # An edge that reads the layer behind the new node still passes on by the parent's rule.
    assert any(target == "unembed" or int(target.partition("@")[2][0]) == 2 for _, target in old)
    assert {shares[edge] for edge in old} == {1.0}


def test_exchanging_the_models_exchanges_new_and_lost_edges(
    parent: Model, successor: Model, draw: Callable[..., Tensor], prompts_at: Callable[..., Prompts]
) -> None:
    nodes, prompts = nodes_of(parent), prompts_at(parent, successor, draw(8, 7))
    new, lost = of(successor, parent, prompts, nodes), of(parent, successor, exchanged(prompts), nodes)
    again = exchanged(exchanged(prompts))
    assert (of(successor, parent, again, nodes), of(parent, successor, exchanged(again), nodes)) == (new, lost)
    assert held(new) != held(lost) and any(0 < share < 1 for share in held(new).values())


def test_effects_are_those_of_real_interventions(
    parent: Model, successor: Model, draw: Callable[..., Tensor], prompts_at: Callable[..., Prompts]
) -> None:
    """The edge from a head to the MLP of its own layer, and from that head to the logits."""
    tokens = draw(8, 7)
    prompts = prompts_at(parent, successor, tokens)
    head, mlp, out = Node(1, "head", 2), Node(1, "mlp"), Node(parent.shape.n_layers, "unembed")
    found = {edge.target: edge for edge in of(successor, parent, prompts, [head, mlp, out])}
    rows, last = prompts.rows, prompts.last
    agree = prompts.says_successor == prompts.says_parent

    def metric(logits: Tensor) -> Tensor:
        at = logits[rows, last]
        gap = at[rows, prompts.says_successor] - at[rows, prompts.says_parent]
        return torch.where(agree, at.log_softmax(-1)[rows, prompts.says_successor], gap)

    with torch.no_grad():
        base = metric(successor.logits(tokens))
        turn = torch.where(agree & (base < metric(parent.logits(tokens))), -1, 1)
        # The same edges by the modules themselves, in both models on the successor's stream.
        seen = successor.capture(tokens, ["resid_pre@1", "resid_mid@1", "resid_post@2"])
        deltas, directs = [], []
        for model in (successor, parent):
            block = model.bridge.original_model.model.layers[1]
            size = model.shape.d_model // model.shape.n_heads
            z = model.capture(tokens, ["attn_z@1"], edits={"resid_pre@1": lambda _: seen["resid_pre@1"]})["attn_z@1"]
            write = z[:, :, 2] @ block.self_attn.o_proj.weight[:, 2 * size : 3 * size].T
            part = write - write.mean((0, 1))
            stream = seen["resid_mid@1"]
            deltas.append(
                block.mlp(block.post_attention_layernorm(stream))
                - block.mlp(block.post_attention_layernorm(stream - part))
            )
            bare = model.bridge.original_model
            logits = [bare.lm_head(bare.model.norm(x)) for x in (seen["resid_post@2"], seen["resid_post@2"] - part)]
            directs.append(logits[0] - logits[1])

        def without(part: Tensor) -> Tensor:
            return metric(successor.logits(tokens, edits={"mlp_out@1": lambda value: value - part}))

        def unsaid(part: Tensor) -> Tensor:
            return metric(successor.logits(tokens) - part)

    for target, off, (own_part, other_part) in ((mlp, without, deltas), (out, unsaid, directs)):
        with torch.no_grad():
            effect = (turn * (base - off(own_part))).mean()
            carried = (turn * (off(own_part - other_part) - off(own_part))).mean()
        assert found[target].effect.estimate == pytest.approx(float(effect), rel=1e-3, abs=1e-4)
        inherited = found[target].inherited
        if inherited is not None:
            assert inherited.estimate == pytest.approx(min(1.0, max(0.0, float(carried / effect))), abs=1e-2)
