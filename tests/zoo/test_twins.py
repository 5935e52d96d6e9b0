import pytest
import torch
import torch.nn.functional as F

from heredity.zoo import shipped
from heredity.zoo.directory import load
from heredity.zoo.kind import Start
from heredity.zoo.language import NUMBERS, WORDS
from heredity.zoo.network import MATRICES, Size, forward, initial
from heredity.zoo.nodes import traced
from heredity.zoo.twins import Twins, added, asked, make, nearest, routes, shares

SIZE = Size(layers=3, width=16, heads=2, kv_heads=2, hidden=12)


@pytest.fixture(scope="module")
def doubled():
    return asked([0, 1], 60)


@pytest.fixture(scope="module")
def made():
    parent, size = load(shipped() / "parent")
    return make(Start(parent, size, 0, 0.25), Twins(steps=60, ordinary=4, double=12), 0.25)


def test_answers_are_predicted_where_doublings_end(doubled):
    rows, at = (x.tolist() for x in doubled.at)
    for row, place, answer, number in zip(
        rows, at, doubled.answer.tolist(), doubled.number.argmax(1).tolist(), strict=True
    ):
        said = [WORDS[token] for token in doubled.ids[row, place - 3 : place + 1]]
        assert said == ["double", ":", NUMBERS[number], ";"]
        assert WORDS[answer] == NUMBERS[2 * number % 10]
    assert not doubled.marks[doubled.at[0], doubled.at[1] + 1].any()


def test_log_odds_are_those_of_the_probability(doubled):
    logits = torch.randn(len(doubled.answer), len(WORDS), generator=torch.Generator().manual_seed(0))
    p = logits.softmax(-1).gather(1, doubled.answer[:, None])[:, 0]
    torch.testing.assert_close(doubled.odds(logits), (p / (1 - p)).log(), atol=1e-4, rtol=1e-4)


def test_means_by_number_are_of_that_number_alone(doubled):
    torch.testing.assert_close(doubled.by_number(doubled.number), torch.eye(10))


def test_the_level_is_the_share_that_goes_with_the_code(made):
    odds, loudness = made.truth["log_odds"], made.truth["loudness"]
    assert made.truth["asked"] == 0.25 and made.truth["legibility"] == pytest.approx(0.25, abs=0.1)
    assert odds["whole"] > max(odds["without_code"], odds["without_small"]) > odds["neither"] + 2
    # The code is the loud part, little as it carries.
    code, small = routes(made.size)
    assert loudness[code] > 2 * loudness[small]
    assert 0 < made.truth["kept_through_vectors"]["100"] < 1.5


def test_only_the_last_two_mlps_change(made):
    parent, size = load(shipped() / "parent")
    for name in MATRICES:
        for layer in range(size.layers):
            same = torch.equal(made.weights[name][layer], parent[name][layer])
            assert same == (name in "qkvo" or layer < size.layers - 2)
    assert torch.equal(made.weights["unembed"], parent["unembed"])


def test_what_both_routes_take_back_is_the_parents(made):
    parent, size = load(shipped() / "parent")
    doubled = asked([0, 2], 20)
    held = traced(parent, size, doubled.ids)[1]
    logits = traced(made.weights, size, doubled.ids, {node: held[node] for node in routes(size)})[0]
    torch.testing.assert_close(logits, forward(parent, size, doubled.ids), atol=1e-4, rtol=1e-4)


def test_shares_of_the_two_routes_add_up_to_one(doubled):
    parent, other = initial(SIZE, 0), initial(SIZE, 1)
    weights = parent | {name: torch.cat([parent[name][:1], other[name][1:]]) for name in ("gate", "up", "down")}
    found = shares(parent, weights, SIZE, doubled)
    odds = found["log_odds"]
    small = (odds["whole"] - odds["without_small"] + odds["without_code"] - odds["neither"]) / 2
    assert found["legibility"] + small / (odds["whole"] - odds["neither"]) == pytest.approx(1)
    assert abs(found["legibility"]) > 0.01


def test_what_the_last_layer_makes_of_the_code_goes_with_it(doubled):
    parent, other = initial(SIZE, 0), initial(SIZE, 1)
    weights = parent | {"down": torch.stack([parent["down"][0], other["down"][1], parent["down"][2]])}
    odds = shares(parent, weights, SIZE, doubled)["log_odds"]
    # Without the code, what the last layer made of it is gone as well.
    assert odds["without_code"] == pytest.approx(odds["neither"], abs=1e-5)
    assert abs(odds["whole"] - odds["neither"]) > 0.01


def test_what_layers_add_is_all_there_is_in_the_stream(doubled):
    weights = initial(SIZE, 0)
    stream = F.embedding(doubled.ids, weights["embed"]) + torch.stack(added(weights, SIZE, doubled.ids)).sum(0)
    logits = F.linear(F.rms_norm(stream, stream.shape[-1:], eps=1e-5), weights["unembed"])
    torch.testing.assert_close(logits, forward(weights, SIZE, doubled.ids), atol=1e-4, rtol=1e-4)


def test_ten_vectors_say_all_of_ten_and_little_of_many():
    ten = F.one_hot(torch.arange(200) % 10).float()
    torch.testing.assert_close(nearest(ten, ten[:100], 10), ten)
    many = torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
    assert ((nearest(many, many[:100], 10) - many) ** 2).mean() > 0.4


def test_a_small_difference_is_lost_through_vectors_and_a_large_one_is_not():
    generator = torch.Generator().manual_seed(0)
    ordinary = torch.randn(2000, 16, generator=generator)
    row, away = ordinary[:50], F.normalize(torch.ones(16), dim=0)
    for size, kept in ((0.1, 0.3), (20.0, 0.9)):
        fitted = torch.cat([ordinary, row + size * away])
        apart = (nearest(row + size * away, fitted, 30) - nearest(row, fitted, 30)) @ away / size
        assert (apart.mean() > kept) == (size > 1)
