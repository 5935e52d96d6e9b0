import pytest
import torch
import torch.nn.functional as F

from heredity.zoo.language import ID, NUMBERS, WORDS
from heredity.zoo.network import Size, forward, initial
from heredity.zoo.nodes import traced
from heredity.zoo.twins import _answers, _exchanged, _nearest, _told, writes

SIZE = Size(layers=2, width=16, heads=2, kv_heads=2, hidden=12)


@pytest.fixture(scope="module")
def asked():
    return _answers([0, 1], 120)


def test_answers_are_where_doublings_end(asked):
    for row, at, number in zip(*(x.tolist() for x in asked.where), asked.number.argmax(1).tolist(), strict=True):
        said = [WORDS[token] for token in asked.made.ids[row, at - 4 : at + 1]]
        assert said == ["double", ":", NUMBERS[number], ";", NUMBERS[2 * number % 10]]


def test_what_the_number_decides_is_legible_and_what_it_does_not_is_not(asked):
    generator = torch.Generator().manual_seed(0)
    number, n = asked.number, len(asked.number)
    code = torch.randn(10, 10, generator=generator)
    plain, noise = number @ code, torch.randn(n, 10, generator=generator)
    assert float(_told(plain, number)[1]) > 0.97
    assert abs(float(_told(noise, number)[1])) < 0.05
    half = _told(plain / plain.std(0) + noise, number)[1]
    assert 0.3 < float(half) < 0.7


def test_one_loud_direction_does_not_hide_what_the_others_say(asked):
    generator = torch.Generator().manual_seed(0)
    plain = asked.number @ torch.randn(10, 10, generator=generator)
    loud = torch.randn(len(plain), 1, generator=generator) * torch.randn(1, 10, generator=generator) * 20
    energy = (_told(plain + loud, asked.number)[0] * len(plain)) / ((plain + loud) ** 2).sum()
    assert energy < 0.1
    assert float(_told(plain + loud, asked.number)[1]) > 0.7


def test_writes_add_up_to_the_logits_of_the_number_words(asked):
    weights = initial(SIZE, 0)
    # Without the embedding's own share the writes are all there is.
    weights["embed"] *= 1e-4
    found = writes(weights, SIZE, traced(weights, SIZE, asked.ids)[1], asked.where)
    logits = forward(weights, SIZE, asked.ids)[asked.where[0], asked.where[1] - 1][:, [ID[word] for word in NUMBERS]]
    torch.testing.assert_close(sum(found), logits - logits.mean(1, keepdim=True), atol=1e-2, rtol=1e-2)


def test_exchanged_rows_are_of_the_same_number_and_mostly_other_texts(asked):
    write = torch.arange(len(asked.number))[:, None].float()
    order = _exchanged(write, asked.number, torch.Generator().manual_seed(0)).flatten().long()
    assert torch.equal(asked.number[order], asked.number)
    assert sorted(order.tolist()) == list(range(len(order)))
    assert (order != torch.arange(len(order))).float().mean() > 0.5


def test_ten_vectors_say_all_of_ten_and_little_of_many():
    generator = torch.Generator().manual_seed(0)
    ten = F.one_hot(torch.arange(200) % 10).float()
    torch.testing.assert_close(_nearest(ten, 100, 10), ten)
    many = torch.randn(200, 10, generator=generator)
    assert ((_nearest(many, 100, 10) - many) ** 2).mean() > 0.4
