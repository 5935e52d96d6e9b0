"""Exchanging parts: against plain torch hooks, against formulas, and all of them at once against the parent."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from heredity.circuits.components import Donor, Node, mean_donor, nodes_of, patched_logits, run_donor
from heredity.circuits.writes import check_additive, head_writes, mlp_write
from heredity.interp.errors import ModelError
from heredity.interp.model import Model, pad

FAMILIES = ("llama", "gpt2", "neox", "gemma2", "olmo2", "granite", "cohere")


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, pair_of: Callable[[str], tuple[Model, Model]]) -> tuple[Model, Model]:
    return pair_of(request.param)


@pytest.fixture
def tokens(draw: Callable[..., Tensor]) -> Tensor:
    return draw(3, 9)


def test_replacing_every_node_gives_the_parent_and_none_the_successor(
    pair: tuple[Model, Model], tokens: Tensor
) -> None:
    parent, successor = pair
    donor = run_donor(parent, tokens)
    want = parent.logits(tokens)
    assert (successor.logits(tokens) - want).abs().max() > 0.05
    torch.testing.assert_close(patched_logits(successor, tokens, nodes_of(successor), donor), want, atol=1e-5, rtol=0)
    assert torch.equal(patched_logits(successor, tokens, (), donor), successor.logits(tokens))


def test_a_model_s_own_values_change_nothing(pair: tuple[Model, Model], tokens: Tensor) -> None:
    _, successor = pair
    own = run_donor(successor, tokens)
    for node in nodes_of(successor):
        got = patched_logits(successor, tokens, [node], own)
        torch.testing.assert_close(
            got, successor.logits(tokens), atol=1e-5, rtol=0, msg=lambda m, node=node: f"{node}: {m}"
        )


def test_writes_add_up_to_what_the_block_adds(pair: tuple[Model, Model], tokens: Tensor) -> None:
    model, _ = pair
    seen = model.capture(tokens, ["resid_pre@1", "attn_z@1", "mlp_out@1", "resid_post@1"])
    heads = head_writes(model, 1, seen["attn_z@1"], range(4))
    assert heads.shape == (*tokens.shape, 4, model.shape.d_model)
    total = heads.sum(2) + mlp_write(model, 1, seen["mlp_out@1"])
    total = total * getattr(model.bridge.original_model.config, "residual_multiplier", 1.0)
    torch.testing.assert_close(total, seen["resid_post@1"] - seen["resid_pre@1"], atol=2e-5, rtol=1e-4)
    some = head_writes(model, 1, seen["attn_z@1"], [2, 0])
    torch.testing.assert_close(some, heads[:, :, [2, 0]])
    check_additive(model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_mlp_or_head_exchanged_equals_a_forward_with_torch_hooks(
    pair_of: Callable[[str], tuple[Model, Model]], tokens: Tensor, family: str
) -> None:
    parent, successor = pair_of(family)
    values: dict[str, Tensor] = {}
    block_p, block_s = parent.bridge.blocks[1], successor.bridge.blocks[1]

    def swap(module: Any, inputs: Any, out: Tensor) -> Tensor:
        return values["mlp"]

    with block_p.mlp.register_forward_hook(lambda m, i, out: values.__setitem__("mlp", out)):
        parent.logits(tokens)
    with block_s.mlp.register_forward_hook(swap):
        want = successor.logits(tokens)
    donor = run_donor(parent, tokens)
    torch.testing.assert_close(patched_logits(successor, tokens, [Node(1, "mlp")], donor), want, atol=1e-5, rtol=0)

    width, head = parent.shape.d_head, 2

    def part(model: Model, z: Tensor) -> Tensor:
        projection = model.bridge.blocks[1].attn.o.original_component
        rows = slice(head * width, (head + 1) * width)
        weight = projection.weight[rows] if family == "gpt2" else projection.weight[:, rows].T
        bias = 0 if projection.bias is None else projection.bias / 4
        return z.reshape(*tokens.shape, -1)[..., rows] @ weight + bias

    with block_p.attn.o.register_forward_hook(lambda m, i, out: values.__setitem__("write", part(parent, i[0]))):
        parent.logits(tokens)
    with block_s.attn.o.register_forward_hook(lambda m, i, out: out - part(successor, i[0]) + values["write"]):
        want = successor.logits(tokens)
    got = patched_logits(successor, tokens, [Node(1, "head", head)], donor)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert (got - successor.logits(tokens)).abs().max() > 1e-3


def test_a_norm_behind_the_attention_scales_each_head_as_it_scales_their_sum(
    pair_of: Callable[[str], tuple[Model, Model]], tokens: Tensor
) -> None:
    model, _ = pair_of("gemma2")
    z = model.capture(tokens, ["attn_z@0"])["attn_z@0"]
    weight, bias = model.head_weights(0)
    plain = torch.einsum("bphd,hdm->bphm", z, weight)
    assert not bias.any()
    config: Any = model.bridge.original_model.config
    norm = model.bridge.blocks[0].ln1_post.original_component
    root = (plain.sum(2).square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
    want = plain / root[:, :, None] * (1 + norm.weight)
    torch.testing.assert_close(head_writes(model, 0, z, range(4)), want, atol=1e-5, rtol=1e-4)


def test_means_are_over_the_real_tokens_of_all_batches(pair: tuple[Model, Model]) -> None:
    model, _ = pair
    rows = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
    donor = mean_donor(model, [pad(rows[:2]), pad(rows[2:], fill=3)])
    assert donor.model is None
    for layer in range(model.shape.n_layers):
        heads, mlps = [], []
        for row in rows:
            seen = model.capture(torch.tensor([row]), [f"attn_z@{layer}", f"mlp_out@{layer}"])
            heads.append(head_writes(model, layer, seen[f"attn_z@{layer}"], range(4))[0])
            mlps.append(mlp_write(model, layer, seen[f"mlp_out@{layer}"])[0])
        torch.testing.assert_close(donor.values[f"writes@{layer}"], torch.cat(heads).mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(donor.values[f"mlp_out@{layer}"], torch.cat(mlps).mean(0), atol=1e-5, rtol=1e-4)


def test_a_mean_put_in_is_the_same_at_every_position(pair: tuple[Model, Model], tokens: Tensor) -> None:
    """With all heads and MLPs at their means the stream is the embedding plus a constant."""
    model, _ = pair
    donor = mean_donor(model, [(tokens, torch.ones_like(tokens, dtype=torch.bool))])
    layers = range(model.shape.n_layers)
    inner = [node for node in nodes_of(model) if node.kind in ("head", "mlp")]
    multiplier = getattr(model.bridge.original_model.config, "residual_multiplier", 1.0)
    constant = sum(donor.values[f"writes@{layer}"].sum(0) + donor.values[f"mlp_out@{layer}"] for layer in layers)
    start = model.capture(tokens, ["resid_pre@0"])["resid_pre@0"]
    end = start + multiplier * constant
    want = model.logits(tokens, edits={"final": lambda _: end})
    torch.testing.assert_close(patched_logits(model, tokens, inner, donor), want, atol=1e-5, rtol=0)


def test_the_unembedding_stays_where_there_is_no_model_to_take_it_from(parent: Model, tokens: Tensor) -> None:
    means = Donor({}, None)
    got = patched_logits(parent, tokens, [nodes_of(parent)[-1]], means)
    assert torch.equal(got, parent.logits(tokens))


def test_blocks_that_add_something_else_are_refused(pair_of: Callable[[str], tuple[Model, Model]]) -> None:
    """BLOOM's attention and MLP return their output with the residual stream already added."""
    with pytest.raises(ModelError, match=r"layer 0 of this BloomForCausalLM adds more .*docs/errors/model\.md"):
        check_additive(pair_of("bloom")[0])


def test_nodes_stand_in_the_order_of_the_computation(parent: Model) -> None:
    nodes = nodes_of(parent)
    assert nodes == sorted(nodes) and len(nodes) == 2 + 3 * 5
    names = [str(node) for node in nodes]
    assert (names[0], names[1], names[5], names[-1]) == ("embed", "attn_head@0.0", "mlp_out@0", "unembed")
    assert len(set(names)) == len(nodes)
    assert len(set(names)) == len(nodes)
