"""Scores by span: they add up to the edges', and what crosses spans is what exchanging one key or value does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from heredity.circuits.atp import attribute_nodes
from heredity.circuits.edges import attribute_edges
from heredity.circuits.spans import ACROSS, attribute_spans

SPANS = torch.tensor([[0, 0, 1, 1, 2, 2], [0, 1, 1, 2, 2, -1], [0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, -1]])
NAMES = ("start", "middle", "end")


@pytest.mark.parametrize(("method", "steps"), [("eap", 1), ("eap-ig", 3)])
def test_spans_add_up_to_the_edges(method: Any, steps: int, bed_of: Callable) -> None:
    model, pairs, metric = bed_of("grouped")
    found = attribute_spans(model, pairs, metric, SPANS, NAMES, steps=steps)
    whole = attribute_edges(model, pairs, metric, method=method, steps=steps)
    torch.testing.assert_close(found.within.sum(-1), whole.scores)
    assert bool((found.within.abs().sum((0, 1)) > 0).all())


def test_one_span_alone(bed_of: Callable) -> None:
    model, pairs, metric = bed_of("layer")
    found = attribute_spans(model, pairs, metric, SPANS, NAMES)
    alone = attribute_spans(model, pairs, metric, torch.where(SPANS == 1, 0, -1), ("middle",))
    torch.testing.assert_close(alone.within[..., 0], found.within[..., 1])
    torch.testing.assert_close(alone.across[..., 0, 0], found.across[..., 1, 1])


def test_values_over_all_spans_are_the_value_nodes(bed_of: Callable) -> None:
    model, pairs, metric = bed_of("grouped")
    found = attribute_spans(model, pairs, metric, SPANS, NAMES)
    nodes = attribute_nodes(model, pairs, metric, drop=False)
    by_name = dict(zip(nodes.nodes, nodes.scores.tolist(), strict=True))
    shared = model.shape.n_heads // model.shape.n_kv_heads
    by_group = found.across[:, :, ACROSS.index("value")].sum((-1, -2)).unflatten(1, (-1, shared)).sum(-1)
    for layer in range(model.shape.n_layers):
        for group in range(model.shape.n_kv_heads):
            assert float(by_group[layer, group]) == pytest.approx(by_name[f"attn_v@{layer}.{group}"])


@pytest.mark.parametrize("kind", ["layer", "grouped"])
def test_a_crossing_is_an_exchange_at_one_position(kind: str, bed_of: Callable, plain: Any) -> None:
    model, pairs, metric = bed_of(kind)
    found = attribute_spans(model, pairs, metric, SPANS, NAMES)
    written, rows = plain.of(model), torch.arange(len(pairs))
    clean = written.run(pairs.clean)
    patterns = {key: value.clone().requires_grad_() for key, value in clean.patterns.items()}
    metric(written.run(pairs.clean, patterns=patterns).logits, rows).sum().backward()
    with torch.inference_mode():
        ends = [model.capture(tokens, ["attn_k@1"])["attn_k@1"] for tokens in (pairs.clean, pairs.corrupt)]
    shared = model.shape.n_heads // model.shape.n_kv_heads
    for head in range(model.shape.n_heads):
        group, slope = head // shared, patterns[1, head].grad
        assert slope is not None
        expected = torch.zeros(3, 3, dtype=torch.float64)
        for position in range(6):
            change = torch.zeros_like(ends[0][:, :, group])
            change[:, position] = (ends[1] - ends[0])[:, position, group]
            moved = written.run(pairs.clean, inner={f"attn_k@1.{group}": change}).patterns[1, head]
            effect = ((clean.patterns[1, head] - moved) * slope).sum(-1)  # [pairs, queries]
            for pair in range(len(pairs)):
                for query in range(6):
                    start, end = int(SPANS[pair, position]), int(SPANS[pair, query])
                    if start >= 0 and end >= 0:
                        expected[start, end] += effect[pair, query].item() / len(pairs)
        torch.testing.assert_close(found.across[1, head, ACROSS.index("key")], expected)


def test_spans_of_another_shape_are_refused(bed_of: Callable) -> None:
    model, pairs, metric = bed_of("bare")
    with pytest.raises(ValueError, match="number from -1 to 1"):
        attribute_spans(model, pairs, metric, SPANS, NAMES[:2])
    with pytest.raises(ValueError, match=r"not \[4, 5\]"):
        attribute_spans(model, pairs, metric, SPANS[:, :5], NAMES)
