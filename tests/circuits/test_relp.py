"""Relevance propagation against the rules written out by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from heredity.circuits.edges import attribute_edges
from heredity.circuits.layout import layout_of
from heredity.circuits.pairs import LogitDifference, Pairs
from heredity.circuits.relp import attribute_edges_by_relevance, relevance_rules
from heredity.interp.errors import ModelError


def reference(plain: Any, pairs: Any, metric: Any, layout: Any, **how: bool) -> torch.Tensor:
    clean, corrupt = (plain.run(tokens) for tokens in (pairs.clean, pairs.corrupt))
    added = torch.zeros(*layout.edges.shape, *clean.writes[0].shape, dtype=torch.float64, requires_grad=True)
    metric(plain.run(pairs.clean, added=added, rules=True, **how).logits, torch.arange(len(pairs))).sum().backward()
    assert added.grad is not None
    change = torch.stack([a - b for a, b in zip(clean.writes, corrupt.writes, strict=True)])
    scores = torch.einsum("sbpm,svbpm->sv", change, added.grad)
    return scores.masked_fill(~layout.edges, 0) / len(pairs)


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("kind", ["bare", "layer", "grouped"])
def test_scores_follow_the_rules(kind: str, hold: bool, bed_of: Callable, plain: Any) -> None:
    model, pairs, metric = bed_of(kind)
    found = attribute_edges_by_relevance(model, pairs, metric, hold_attention=hold)
    expected = reference(plain.of(model), pairs, metric, found.layout, hold_attention=hold)
    torch.testing.assert_close(found.scores, expected, rtol=1e-6, atol=1e-8)
    queries = [i for i, name in enumerate(found.layout.destinations) if name.startswith(("attn_q", "attn_k"))]
    assert bool((found.scores[:, queries] == 0).all()) is hold


def test_the_forward_stays_and_the_gradient_comes_back(bed_of: Callable) -> None:
    model, pairs, metric = bed_of("grouped")
    before, plain = model.logits(pairs.clean), attribute_edges(model, pairs, metric, method="eap")
    with relevance_rules(model):
        entry = torch.zeros(4, 6, 8, dtype=torch.float64, requires_grad=True)
        inside = model.logits(pairs.clean, edits={"resid_pre@0": lambda value: value + entry})
        inside.sum().backward()
    torch.testing.assert_close(inside, before, rtol=0, atol=1e-12)
    assert torch.equal(attribute_edges(model, pairs, metric, method="eap").scores, plain.scores)
    assert not torch.allclose(attribute_edges_by_relevance(model, pairs, metric).scores, plain.scores, rtol=1e-2)


def test_without_curvature_relevance_is_the_gradient(beds: Any) -> None:
    # Of a ReLU the ratio of output to input is its slope.
    model = beds.bed(beds.BedConfig(2, 2, 8, 4, 12, 9, 9, 6), seed=0, dtype=torch.float64)
    pairs = Pairs(torch.randint(9, (3, 6)), torch.randint(9, (3, 6)), torch.full((3,), 5))
    metric = LogitDifference(pairs.last, [[1]] * 3, [[2]] * 3)
    ours, theirs = (
        attribute_edges_by_relevance(model, pairs, metric),
        attribute_edges(model, pairs, metric, method="eap"),
    )
    torch.testing.assert_close(ours.scores, theirs.scores)


def test_a_loaded_model_follows_the_rules(parent: Any, draw: Callable, plain: Any) -> None:
    model = parent
    pairs = Pairs(draw(3, 7, 0), draw(3, 7, 1), torch.full((3,), 6))
    metric = LogitDifference(pairs.last, [[3]] * 3, [[4]] * 3)
    found = attribute_edges_by_relevance(model, pairs, metric)
    expected = reference(llama(model, plain), pairs, metric, layout_of(model))
    torch.testing.assert_close(found.scores, expected, rtol=2e-3, atol=2e-4)


def llama(model: Any, plain: Any) -> Any:
    """A Llama's weights under the names of :class:`Plain`."""
    hf, shape = model.bridge.original_model, model.shape
    names = {}
    for layer, block in enumerate(hf.model.layers):
        at = f"blocks.{layer}."
        parts = {
            "ln1": block.input_layernorm, "ln2": block.post_attention_layernorm, "attn.q": block.self_attn.q_proj,
            "attn.k": block.self_attn.k_proj, "attn.v": block.self_attn.v_proj, "attn.o": block.self_attn.o_proj,
            "mlp.in": block.mlp.up_proj, "mlp.gate": block.mlp.gate_proj, "mlp.out": block.mlp.down_proj,
        }  # fmt: skip
        for name, part in parts.items():
            weight = part.weight.detach().double()
            names[f"{at}{name}.original_component.weight"] = weight
            names[f"{at}{name}.original_component.bias"] = weight.new_zeros(len(weight))
    names["embed.original_component.weight"] = hf.get_input_embeddings().weight.detach().double()
    names["position"] = torch.zeros(shape.n_ctx, shape.d_model, dtype=torch.float64)
    names["ln_final.original_component.weight"] = hf.model.norm.weight.detach().double()
    names["unembed.weight"] = hf.lm_head.weight.detach().double()
    names["unembed.bias"] = torch.zeros(shape.d_vocab, dtype=torch.float64)
    return plain(
        names, shape.n_layers, shape.n_heads, shape.n_kv_heads, "rms", "silu", True, True,
        eps=hf.config.rms_norm_eps,
    )  # fmt: skip


def test_a_part_that_is_not_passed_is_an_error(bed_of: Callable) -> None:
    model, pairs, _ = bed_of("layer")
    with pytest.raises(ModelError, match="never passes the MLP of layer 0"), relevance_rules(model):
        model.logits(pairs.clean)  # no gradient asked for


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "neox"])
def test_relevance_is_conserved_in_every_family(family: str, pair_of: Callable, draw: Callable) -> None:
    """Without biases and with patterns held, what the rules make of a model is linear: its logits are slope · input."""
    model, tokens = pair_of(family)[0], draw(2, 6)
    biases = [value for name, value in model.bridge.original_model.named_parameters() if name.endswith("bias")]
    before = [value.clone() for value in biases]
    try:
        for value in biases:
            value.data.zero_()
        entry = model.capture(tokens, ["resid_pre@0"])["resid_pre@0"].clone().requires_grad_()
        with relevance_rules(model, hold_attention=True):
            logit = model.logits(tokens, edits={"resid_pre@0": lambda value: entry})[:, -1, 7].sum()
            logit.backward()
        assert entry.grad is not None
        assert float((entry.detach() * entry.grad).sum()) == pytest.approx(float(logit.detach()), rel=1e-3)
    finally:
        for value, old in zip(biases, before, strict=True):
            value.data.copy_(old)
