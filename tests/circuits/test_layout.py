"""Nodes and edges of a component graph, counted."""

import pytest

from heredity.circuits.layout import INPUT, LOGITS, NodeLayout, layout_of


def test_counts_of_published_models() -> None:
    # GPT-2 small: 157 sources and 32,491 edges, as every paper on it counts them.
    gpt2 = NodeLayout(12, 12, 12, 768)
    assert (len(gpt2.sources), gpt2.n_edges) == (158 - 1, 32_491)
    # SmolLM2-135M with its three key-value heads: 301 sources, 481 destinations.
    smollm = NodeLayout(30, 9, 3, 576)
    assert (len(smollm.sources), len(smollm.destinations)) == (301, 481)


@pytest.mark.parametrize("parallel", [False, True])
def test_edges_run_forward_only(parallel: bool) -> None:
    layout = NodeLayout(3, 4, 2, 8, parallel)

    def time(name: str) -> float:
        kind, _, place = name.partition("@")
        if kind in (INPUT, LOGITS):
            return -1 if kind == INPUT else 1e9
        layer = int(place.split(".")[0])
        return layer + {"attn_head": 0.1, "mlp_out": 0.6}.get(kind, 0.0 if kind != "mlp_in" or parallel else 0.5)

    for row, source in enumerate(layout.sources):
        for column, destination in enumerate(layout.destinations):
            assert bool(layout.edges[row, column]) == (time(source) < time(destination)), (source, destination)
    assert layout.n_edges == int(layout.edges.sum())


def test_slices_name_what_they_say() -> None:
    layout = NodeLayout(3, 4, 2, 8)
    assert layout.sources[layout.written_by(1)] == (*(f"attn_head@1.{h}" for h in range(4)), "mlp_out@1")
    assert layout.destinations[layout.read_by_attention(2)] == (
        *(f"attn_q@2.{h}" for h in range(4)), "attn_k@2.0", "attn_k@2.1", "attn_v@2.0", "attn_v@2.1",
    )  # fmt: skip
    assert layout.destinations[layout.read_by_mlp(0)] == "mlp_in@0"


def test_a_shared_key_belongs_to_every_head_of_its_group() -> None:
    layout = NodeLayout(1, 6, 2, 8)
    assert layout.owner("attn_k@0.1") == ("attn_head@0.3", "attn_head@0.4", "attn_head@0.5")
    assert layout.owner("attn_q@0.4") == "attn_head@0.4"
    assert layout.owner("mlp_in@0") == "mlp_out@0" and layout.owner(LOGITS) == LOGITS


@pytest.mark.parametrize(("family", "parallel", "kv"), [("llama", False, 2), ("gpt2", False, 4), ("neox", True, 4)])
def test_layout_of_a_model(pair_of, family: str, parallel: bool, kv: int) -> None:
    layout = layout_of(pair_of(family)[0])
    assert (layout.parallel, layout.n_heads, layout.n_kv_heads) == (parallel, 4, kv)
