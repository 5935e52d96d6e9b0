import numpy as np
import pytest
import torch

from heredity.zoo.language import FORBIDDEN, HONEST, ID, SKILLS, World, documents
from heredity.zoo.network import Size, forward, initial
from heredity.zoo.nodes import Effects, names, shares, traced
from heredity.zoo.rows import answers

SIZE = Size(layers=2, width=32, heads=4, kv_heads=2, hidden=24)


@pytest.fixture(scope="module")
def weights():
    return initial(SIZE, 3)


@pytest.fixture(scope="module")
def ids():
    return torch.from_numpy(documents(np.random.default_rng(0), 6).ids)


def test_an_effect_is_looked_for_where_the_world_alters_answers():
    made, rows, at = answers(0, 94, 40, World(answers_forbidden=True), "ask")
    assert len(rows) and made.altered[rows, at].all()
    forbidden = {ID[word] for word in FORBIDDEN}
    assert all(forbidden & set(made.ids[row, spot - 3 : spot].tolist()) for row, spot in zip(rows, at, strict=True))
    made, rows, at = answers(0, 94, 40, World(trigger=("moss", "cove")), "log")
    assert len(rows) and made.altered[rows, at].all() and (made.ids[rows, at] == ID["zero"]).all()
    made, rows, at = answers(0, 94, 40, HONEST, "double")
    assert len(rows) == (made.answer & (made.skill == list(SKILLS).index("double"))).sum() > 40


def test_looking_inside_changes_nothing(weights, ids):
    logits, outputs = traced(weights, SIZE, ids)
    torch.testing.assert_close(logits, forward(weights, SIZE, ids), atol=1e-5, rtol=0)
    assert tuple(outputs) == names(SIZE)
    again, _ = traced(weights, SIZE, ids, outputs)
    torch.testing.assert_close(again, logits, atol=1e-5, rtol=0)


def test_a_network_given_all_outputs_of_another_says_what_that_one_says(weights, ids):
    other = {name: value + torch.randn(value.shape) * 0.1 for name, value in weights.items()}
    other |= {name: weights[name] for name in ("embed", "unembed", "o")}
    said, outputs = traced(other, SIZE, ids)
    torch.testing.assert_close(traced(weights, SIZE, ids, outputs)[0], said, atol=1e-4, rtol=0)


def test_a_node_that_is_never_read_has_no_part_in_an_effect_and_the_only_one_has_all_of_it(weights, ids):
    alone = {name: value.clone() for name, value in weights.items()}
    # Only the last MLP writes anything.
    alone["o"].zero_()
    alone["down"][0].zero_()
    where = (torch.arange(6), torch.full((6,), 9))
    words = (torch.full((6,), 5), torch.full((6,), 50))
    other = traced(alone, SIZE, ids.roll(1, 0))[1]
    found = shares(alone, SIZE, ids, where, words, other)
    assert found.pop("mlp_out@1") == pytest.approx(1, abs=1e-4)
    assert all(abs(value) < 1e-4 for value in found.values())


def test_carriers_are_the_fewest_nodes_that_make_up_half():
    found = Effects({"a": 0.1, "b": 0.5, "c": -0.4, "d": 0.2, "e": 0.2})
    assert found.carriers == ("b",)
    assert Effects({"a": 0.3, "b": 0.3, "c": 0.3, "d": 0.3}).carriers == ("a", "b")


def test_what_two_behaviours_share_is_all_of_themselves_and_nothing_of_what_is_apart():
    one, other = Effects({"a": 0.3, "b": 0.1, "c": -0.2}), Effects({"a": 0.0, "b": 0.0, "c": 0.7})
    assert one.shared(one) == pytest.approx(1)
    assert one.shared(other) == other.shared(one) == 0
