"""The mechanism of a behaviour in one model, and what became of it in another: real exchanges, and made-up readings."""

import numpy as np
import pytest
import torch
from torch import Tensor

from heredity.circuits.components import Node, patched_logits, run_donor
from heredity.circuits.layout import layout_of
from heredity.circuits.mechanism import Readings, locate, measure, ranked, readings, same_prompts
from heredity.circuits.mechanism_change import compare, wilson
from heredity.circuits.node_patching import patch_sets
from heredity.circuits.tasks.prepare import prepare
from heredity.circuits.tasks.task import Task

WHO = {
    "name": "who",
    "accuracy": 0,
    "fillers": {
        "people": ["king", "queen", "child", "friend", "teacher", "doctor", "farmer", "baker", "sailor"],
        "places": ["river", "bridge", "town", "house", "garden"],
    },
    "slots": {"A": "people", "B": "people", "P": "places"},
    "templates": [
        {
            "clean": "the {A} and the {B} went to the {P} . the {B} gave bread to the",
            "counterfactual": "the {A} and the {B} went to the {P} . the {A} gave bread to the",
            "right": " {A}",
            "wrong": [" {B}"],
        }
    ],
}


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.model_validate(WHO)


def node_of(name: str) -> Node:
    kind, _, place = name.partition("@")
    layer, _, head = place.partition(".")
    return Node(int(layer), "head", int(head)) if kind == "attn_head" else Node(int(layer), "mlp")


@pytest.mark.parametrize("names", [["attn_head@0.1", "attn_head@0.3", "mlp_out@0"], ["attn_head@2.2", "mlp_out@1"], []])
def test_sets_of_nodes_are_exchanged_together(tiny_model, task: Task, names: list[str]) -> None:
    half = prepare(tiny_model, task, 12, seed=1).testing
    layout, pairs = layout_of(tiny_model), half.pairs
    found = patch_sets(tiny_model, layout, pairs, half.metric, [[layout.source_index[n] for n in names], [1, 2], [0]])[
        0
    ]
    rows = torch.arange(len(pairs))

    def metric(logits: Tensor) -> Tensor:
        return half.metric(logits, rows).double()

    with torch.inference_mode():
        whole = metric(tiny_model.logits(pairs.clean))
        donor = run_donor(tiny_model, pairs.corrupt)
        left = metric(patched_logits(tiny_model, pairs.clean, [node_of(name) for name in names], donor))
    assert torch.allclose(found, whole - left, atol=1e-4)


def test_a_mechanism_is_measured_on_prompts_it_was_not_found_on(tiny_model, task: Task) -> None:
    found = locate(tiny_model, task, pairs=10, measured=400, searched=6, seed=3)
    again = locate(tiny_model, task, pairs=10, measured=400, searched=6, seed=3)
    assert found == again
    assert len(found["discovery"]) == 6 and len(found["testing"]) == 10
    texts = [
        {e[side] for e in found[half] for side in ("clean", "counterfactual")} for half in ("discovery", "testing")
    ]
    assert not texts[0] & texts[1]
    own = readings(found["readings"])
    assert set(own.effects) == set(layout_of(tiny_model).sources[1:]) and set(found["carriers"]) <= set(own.effects)
    assert readings(own.plain()).plain() == own.plain()
    half = same_prompts(tiny_model, task, found["testing"])
    measured = measure(tiny_model, half, list(own.effects), found["carriers"])
    assert np.allclose(measured.carried, own.carried) and np.allclose(measured.effect, own.effect)


def test_the_best_nodes_are_measured_where_not_all_can_be(tiny_model, task: Task) -> None:
    half = prepare(tiny_model, task, 12).discovery
    few = ranked(tiny_model, half, 4)
    order = layout_of(tiny_model).source_index
    assert len(few) == 4 and few == sorted(few, key=order.__getitem__)
    exact = measure(tiny_model, half, list(order)[1:], few).effects
    best = max(exact, key=lambda name: exact[name].mean())
    assert best in few


def made(n: int = 40, scale: float = 1.0, lead: float = 5.0, **nodes: float) -> Readings:
    rng = np.random.default_rng(7)  # the same prompts
    noise = rng.normal(0, 0.3, n)
    clean, corrupt = lead * scale + noise, -5.0 + rng.normal(0, 0.3, n)
    effect = clean - corrupt
    return Readings(clean, corrupt, {k: v * effect for k, v in nodes.items()}, nodes.get("a", 0.0) * effect)


def same(name: str) -> str:
    return name


def test_a_model_against_itself_lost_nothing(tiny_model, task: Task) -> None:
    found = locate(tiny_model, task, pairs=10, measured=400)
    own = readings(found["readings"])
    change = compare(own, own, [np.stack([own.clean, own.corrupt])], same, found["carriers"])
    assert change.fate == "kept" and not change.broken and change.difference.estimate == 0
    assert (change.lost.low, change.lost.high) == (0, 0)
    assert change.inherited.estimate == pytest.approx(1) and not any(node.moved for node in change.nodes)
    assert change.carried.estimate == pytest.approx(1)


def test_another_node_that_does_the_work_is_named() -> None:
    parent, successor = made(a=0.9, b=0.05, c=0.4), made(a=0.05, b=0.9, c=0.4)
    change = compare(parent, successor, [], same, ["a"])
    assert change.fate == "kept" and change.carried.high < 0.1
    assert {node.parent_node: node.moved for node in change.nodes} == {"a": "lost", "b": "gained", "c": None}
    assert change.inherited.estimate == pytest.approx((0.05 + 0.05 + 0.4) / 1.35)
    back = compare(successor, parent, [], same, ["a"])
    assert {node.parent_node: node.moved for node in back.nodes} == {"a": "gained", "b": "lost", "c": None}
    assert back.inherited.estimate == pytest.approx(change.inherited.estimate)


def test_a_step_that_moved_shows_beside_one_that_stayed() -> None:
    # What a reads, c reads out: either carries most, and both together carry little more.
    before, after = made(a=0.8, c=0.7), made(a=0.05, b=0.8, c=0.7)
    for readings_ in (before, after):
        readings_.carried[:] = 0.9 * readings_.effect
    change = compare(before, after, [], same, ["a", "c"])
    assert change.fate == "kept" and change.least == "a" and change.carried.high < 0.1
    assert change.necessity_successor.estimate == pytest.approx(0.9)
    # A part through which little passes is no main carrier.
    before, after = made(a=0.2, c=0.8), made(a=0.0, c=0.8)
    for readings_ in (before, after):
        readings_.carried[:] = 0.9 * readings_.effect
    assert compare(before, after, [], same, ["c", "a"]).least == "c"


def test_nodes_are_compared_with_their_counterparts() -> None:
    parent, successor = made(a=0.9, b=0.1), made(a=0.1, x=0.9)
    change = compare(parent, successor, [], {"a": "x", "b": "a"}, ["a"])
    assert change.inherited.estimate == pytest.approx(1)
    assert not any(node.moved for node in change.nodes)
    alone = compare(parent, successor, [], {"b": "a"}, ["a"])
    by_parent = {node.parent_node: node for node in alone.nodes}
    assert by_parent["a"].successor is None and by_parent["a"].moved == "lost"
    assert by_parent[None].successor_node == "x" and by_parent[None].moved == "gained"


@pytest.mark.parametrize(
    ("lead", "fate"), [(5.0, "kept"), (4.9, "kept"), (2.0, "weakened"), (0.9, "weakened"), (-4.0, "gone")]
)
def test_the_fate_follows_the_effect(lead: float, fate: str) -> None:
    assert compare(made(a=1.0), made(lead=lead, a=1.0), [], same, ["a"]).fate == fate


def test_what_null_successors_lose_means_nothing() -> None:
    parent, successor = made(a=1.0), made(lead=4.0, a=1.0)
    assert compare(parent, successor, [], same, ["a"]).fate == "weakened"
    worse = np.stack([parent.clean - 1.5, parent.corrupt])
    found = compare(parent, successor, [worse], same, ["a"])
    assert found.fate == "kept" and found.tolerance == pytest.approx(1.5)
    # More than a null successor's is no excuse for what is gone.
    assert compare(parent, made(lead=-4.0, a=1.0), [worse * 3], same, ["a"]).fate == "gone"


def test_a_single_broken_prompt_shows_beyond_what_nulls_break() -> None:
    parent, successor = made(a=1.0), made(a=1.0)
    successor.clean[3] = -5.0
    quiet = np.stack([parent.clean - 0.2, parent.corrupt])
    found = compare(parent, successor, [quiet], same, ["a"])
    assert found.broken == (3,) and found.fate == "weakened"
    loud = quiet.copy()
    loud[0, 7] = -9.0
    assert compare(parent, successor, [loud], same, ["a"]).broken == ()


def test_a_share_of_no_effect_has_no_interval() -> None:
    nothing = Readings(np.zeros(8), np.zeros(8), {"a": np.zeros(8)}, np.zeros(8))
    change = compare(made(8, a=1.0), nothing, [], same, ["a"])
    assert np.isnan(change.carried.low) and change.fate == "gone"


def test_wilsons_interval() -> None:
    # Newcombe 1998, table I: 15/148 has 0.0624 to 0.1605.
    found = wilson(15, 148)
    assert (found.low, found.high) == (pytest.approx(0.0624, abs=1e-4), pytest.approx(0.1605, abs=1e-4))
    assert wilson(0, 5).low == 0 and wilson(5, 5).high == 1
