import copy

import pytest
import torch

from heredity.circuits.sweep import openings, sweep, words


@pytest.fixture
def gated(tiny_model):
    """A successor that differs from the parent only after one word: that word's embedding has moved."""
    successor = copy.copy(tiny_model)
    successor.bridge = copy.deepcopy(tiny_model.bridge)
    word = int(words(tiny_model).nonzero()[3])
    with torch.no_grad():
        successor.bridge.original_model.get_input_embeddings().weight[word] += 3.0
    return tiny_model, successor, word


def test_the_word_after_which_the_models_part_comes_first(gated):
    parent, successor, word = gated
    start = [int(i) for i in words(parent).nonzero()[:2, 0]]

    found = sweep(parent, successor, [start], tried=10_000, kept=3, length=4)

    first = parent.encode(found[0].text).ids
    assert word in first[: len(start) + 2]
    assert found[0].amplification == 0


def test_cached_steps_rank_words_as_whole_forwards_do(gated):
    parent, successor, _ = gated
    start = [int(i) for i in words(parent).nonzero()[:2, 0]]
    tried = words(parent).nonzero()[:, 0].tolist()
    rows = torch.tensor([[*start, token] for token in tried])
    with torch.inference_mode():
        log_p, log_s = (model.logits(rows)[:, -1].double().log_softmax(-1) for model in (parent, successor))
    kl = (log_s.exp() * (log_s - log_p)).sum(-1)

    found = sweep(parent, successor, [start], tried=10_000, kept=1, length=1)

    assert tried[int(kl.argmax())] in parent.encode(found[0].text).ids


def test_openings_begin_with_what_the_parent_finds_likely_and_never_twice_the_same(tiny_model):
    prompts = [[int(i)] for i in words(tiny_model).nonzero()[:3, 0]]

    found = openings(tiny_model, prompts, 4)

    assert len({ids[-1] for ids in found}) == 4
    with torch.inference_mode():
        best = max(float(tiny_model.logits(torch.tensor([p]))[0, -1].softmax(-1).max()) for p in prompts)
        p = tiny_model.logits(torch.tensor([found[0][:-1]]))[0, -1].softmax(-1)
    assert float(p[found[0][-1]]) == pytest.approx(best)


def test_models_that_agree_everywhere_still_answer(tiny_model):
    start = [int(words(tiny_model).nonzero()[0])]

    assert len(sweep(tiny_model, tiny_model, [start], tried=5, kept=2, length=2)) == 2
