"""Real interventions on sets of nodes, and whether the search finds a change that was planted in one of them."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from torch import Tensor

from heredity.circuits import reversion
from heredity.circuits.attribution import Prompts, prompts_of
from heredity.circuits.behaviours import Piece, cluster
from heredity.circuits.components import Donor, Node, mean_donor, nodes_of
from heredity.circuits.divergence import Window, scan
from heredity.circuits.reversion import Bench, Effort, find_circuit
from heredity.interp.errors import ModelError
from heredity.interp.model import Model

Pairs = Callable[[str], tuple[Model, Model]]
ALL = Effort(measured=100, controls=7)


@pytest.fixture
def bench(parent: Model, successor: Model, draw: Callable[..., Tensor], prompts_at: Callable[..., Prompts]) -> Bench:
    return Bench(parent, successor, prompts_at(parent, successor, draw(12, 8)), None)


def means_of(model: Model, tokens: Tensor) -> Donor:
    return mean_donor(model, [(tokens, torch.ones_like(tokens, dtype=torch.bool))])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_all_nodes_close_the_gap_and_none_leaves_it(
    pair_of: Pairs, draw: Callable[..., Tensor], prompts_at: Callable[..., Prompts], family: str
) -> None:
    parent, successor = pair_of(family)
    prompts = prompts_at(parent, successor, draw(6, 8))
    bench = Bench(parent, successor, prompts, None)
    assert bench.closed(()) == 0
    assert bench.closed(nodes_of(successor)) == pytest.approx(1, abs=1e-4)
    log_s, log_p = (m.logits(prompts.tokens)[:, -1].double().log_softmax(-1) for m in (successor, parent))
    want = (log_s.exp() * (log_s - log_p)).sum(-1)
    assert bench.base.tolist() == pytest.approx(want.tolist(), rel=1e-3, abs=1e-6)


def test_the_interval_is_around_the_estimate_and_the_seed_s(bench: Bench) -> None:
    some = [Node(0, "mlp"), Node(2, "mlp")]
    share = bench.share(some, np.random.default_rng(0))
    assert share.estimate == bench.closed(some)
    assert share.low < share.estimate < share.high and share.n == 12
    assert share == bench.share(some, np.random.default_rng(0)) != bench.share(some, np.random.default_rng(1))
    everything = bench.share(nodes_of(bench.successor), np.random.default_rng(0))
    assert (everything.low, everything.high) == (pytest.approx(1, abs=1e-4), pytest.approx(1, abs=1e-4))


@pytest.mark.parametrize("target", [0.3, 0.95])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_set_found_reaches_the_target_in_whatever_order(bench: Bench, target: float, seed: int) -> None:
    nodes = nodes_of(bench.successor)
    ranked = [nodes[i] for i in np.random.default_rng(seed).permutation(len(nodes))]
    found = reversion._smallest(bench, ranked, target)
    assert bench.closed(found) >= target
    assert len(found) < len(nodes) and [node for node in ranked if node in found] == found
    last = [node for node in found if node != found[-1]]
    assert not last or bench.closed(last) < target or len(found) == 1


def test_without_a_set_that_reaches_the_target_nothing_is_left_out(bench: Bench) -> None:
    ranked = [Node(0, "mlp"), Node(1, "head", 2), Node(1, "mlp")]
    assert reversion._smallest(bench, ranked, 2.0) == ranked
    assert reversion._smallest(bench, [], 0.5) == []


def test_controls_are_of_the_same_kinds_and_avoid_the_circuit(parent: Model) -> None:
    nodes = nodes_of(parent)
    selected = [Node(0, "head", 1), Node(2, "head", 3), Node(1, "mlp")]
    drawn = [reversion.matched(selected, nodes, np.random.default_rng(seed)) for seed in range(20)]
    for control in drawn:
        assert sorted(node.kind for node in control) == ["head", "head", "mlp"]
        assert len(set(control)) == 3 and not set(control) & set(selected)
    assert len({tuple(control) for control in drawn}) > 5


def test_a_control_never_holds_a_node_of_the_circuit_also_where_its_kind_has_no_others(parent: Model) -> None:
    nodes = nodes_of(parent)
    for selected in ([nodes[0]], [nodes[-1]], [Node(layer, "mlp") for layer in range(3)]):
        control = reversion.matched(selected, nodes, np.random.default_rng(0))
        assert len(set(control)) == len(selected) and not set(control) & set(selected)
    control = reversion.matched(nodes[:-1], nodes, np.random.default_rng(0))
    assert control == [nodes[-1]]


# --- planted changes ---


def plant(model: Model, node: Node) -> None:
    """Change one node of ``model`` and nothing else."""
    generator = torch.Generator().manual_seed(3)

    def shake(value: Tensor) -> None:
        with torch.no_grad():
            value.add_(value.square().mean().sqrt() * torch.randn(value.shape, generator=generator))

    width = model.shape.d_head
    hf = model.bridge.original_model
    match node.kind:
        case "embed":
            shake(hf.get_input_embeddings().weight)
        case "unembed":
            shake(hf.get_output_embeddings().weight)
        case "mlp":
            shake(model.bridge.blocks[node.layer].mlp.out.original_component.weight)
        case _:
            attention, part = model.bridge.blocks[node.layer].attn, slice(node.head * width, (node.head + 1) * width)
            shake(attention.q.original_component.weight[part])
            shake(attention.o.original_component.weight[:, part])


@pytest.mark.parametrize(
    "node",
    [Node(-1, "embed"), Node(0, "head", 0), Node(1, "head", 3), Node(2, "head", 2), Node(0, "mlp"), Node(2, "mlp"),
     Node(3, "unembed")],
    ids=str,
)  # fmt: skip
def test_the_planted_node_is_found_and_nothing_else(
    parent: Model, twin: Model, draw: Callable[..., Tensor], prompts_at: Callable[..., Prompts], node: Node
) -> None:
    plant(twin, node)
    tokens = draw(10, 9)
    prompts = prompts_at(parent, twin, tokens)
    found = find_circuit(parent, twin, prompts, means_of(twin, tokens), by_mean=False, effort=ALL, seed=0)
    assert found.selected == (node,) and found.method == "parent"
    assert found.nodes[0].node == node and found.nodes[0].patch == pytest.approx(1, abs=1e-4)
    assert found.reversion is not None and found.reversion.estimate == pytest.approx(1, abs=1e-4)
    assert len(found.controls) == 7 and max(found.controls) < found.reversion.low
    # Nodes before the change read the same in both models; the unembedding is always tried.
    upstream = {other for other in nodes_of(parent) if other.layer < node.layer}
    assert not upstream & found.attribution.moved
    assert found.n_candidates == len(found.attribution.moved) + 1


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_planted_mlp_is_found_behind_positions_and_norms(
    pair_of: Pairs,
    nearer: Callable[..., AbstractContextManager[None]],
    draw: Callable[..., Tensor],
    prompts_at: Callable[..., Prompts],
    family: str,
) -> None:
    parent, successor = pair_of(family)
    tokens = draw(10, 9)
    with nearer(parent, successor, 0.0):
        block = successor.bridge.blocks[1]
        places = [block.mlp.out] if family == "gpt2" else [block.mlp.out, block.ln2_post]
        with torch.no_grad():
            for place in places:
                weight = place.original_component.weight
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)))
        prompts = prompts_at(parent, successor, tokens)
        found = find_circuit(parent, successor, prompts, means_of(successor, tokens), by_mean=False, effort=ALL, seed=0)
    assert found.selected == (Node(1, "mlp"),)
    assert found.reversion is not None and found.reversion.low > 0.999


def test_from_texts_to_the_planted_head(parent: Model, twin: Model, draw: Callable[..., Tensor]) -> None:
    plant(twin, Node(1, "head", 2))
    texts = [parent.decode(row) for row in draw(12, 14, seed=8).tolist()]
    read = [parent.encode(text) for text in texts]
    scanned = scan(parent, twin, [Window(str(i), r, r) for i, r in enumerate(read)])
    pieces = [Piece("corpus", r, r, s) for r, s in zip(read, scanned.texts, strict=True)]
    contexts = [context for found in cluster(pieces, 0.05) for context in found.contexts][:16]
    prompts = prompts_of(contexts)
    found = find_circuit(parent, twin, prompts, means_of(twin, prompts.tokens), by_mean=False, effort=ALL, seed=0)
    assert found.selected == (Node(1, "head", 2),)
    bench = Bench(parent, twin, prompts, None)
    assert bench.base.tolist() == pytest.approx([context.kl for context in contexts], rel=1e-3, abs=1e-5)


def test_two_planted_nodes_are_both_needed(
    parent: Model, twin: Model, draw: Callable[..., Tensor], prompts_at: Callable[..., Prompts]
) -> None:
    planted = (Node(1, "head", 0), Node(2, "mlp"))
    for node in planted:
        plant(twin, node)
    tokens = draw(12, 9)
    prompts = prompts_at(parent, twin, tokens)
    effort = Effort(measured=100, controls=3, target=0.999)
    found = find_circuit(parent, twin, prompts, means_of(twin, tokens), by_mean=False, effort=effort, seed=0)
    assert found.selected == planted


def test_by_mean_no_parent_value_is_claimed(
    parent: Model, successor: Model, draw: Callable[..., Tensor], prompts_at: Callable[..., Prompts]
) -> None:
    tokens = draw(8, 9)
    prompts, means = prompts_at(parent, successor, tokens), means_of(successor, tokens)
    effort = Effort(measured=5, controls=2, target=0.05)
    found = find_circuit(parent, successor, prompts, means, by_mean=True, effort=effort, seed=0)
    assert found.method == "mean" and found.reversion is None
    assert all(item.patch is None and item.node.kind in ("head", "mlp") for item in found.nodes)
    bench = Bench(parent, successor, prompts, means)
    measured = {item.node: item.ablation for item in found.nodes if item.ablation is not None}
    assert 5 <= len(measured) <= 6
    for node, value in measured.items():
        assert value == pytest.approx(bench.closed([node]), abs=1e-6)
    assert found.ablation.estimate == pytest.approx(bench.closed(found.selected), abs=1e-6)


def test_the_search_is_the_seed_s(bench: Bench, parent: Model, successor: Model) -> None:
    means, effort = means_of(successor, bench.prompts.tokens), Effort(measured=4, controls=3, target=0.5)
    one, two, other = (
        find_circuit(parent, successor, bench.prompts, means, by_mean=False, effort=effort, seed=seed)
        for seed in (0, 0, 1)
    )
    assert (one.selected, one.reversion, one.ablation, one.controls) == (
        two.selected,
        two.reversion,
        two.ablation,
        two.controls,
    )
    assert one.selected == other.selected and one.controls != other.controls


def test_an_architecture_whose_parts_do_not_add_up_is_refused(
    pair_of: Pairs, draw: Callable[..., Tensor], prompts_at: Callable[..., Prompts]
) -> None:
    parent, successor = pair_of("bloom")
    tokens = draw(2, 6)
    with pytest.raises(ModelError, match="cannot be exchanged one by one"):
        find_circuit(
            parent, successor, prompts_at(parent, successor, tokens), Donor({}, None), by_mean=False, effort=ALL, seed=0
        )
