"""Amplified decoding against its formula, and against decoding without a cache."""

import copy

import pytest
import torch
from torch import Tensor

from heredity.circuits.amplify import PLAUSIBLE, VAGUE_TURNS, amplified_texts, amplify, vague_prompts
from heredity.interp.model import Model
from heredity.interp.sampling import sampler, stop_ids, text_of

PROMPTS = ((5, 6, 7), (40,), (50, 51, 52), (8, 9), (41,))


def noise(seed: int, size: int = 60) -> Tensor:
    return 4 * torch.randn(9, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("amplification", [0.0, 1.0, 4.0])
def test_it_is_the_formula_where_the_successor_finds_a_token_plausible(amplification: float) -> None:
    logits_s, logits_p = noise(0), noise(1)
    log_s, log_p = logits_s.double().log_softmax(-1), logits_p.double().log_softmax(-1)
    got = amplify(logits_s, logits_p, amplification)
    plausible = log_s.exp() >= PLAUSIBLE * log_s.exp().amax(-1, keepdim=True)
    assert 0.1 < float(plausible.double().mean()) < 0.9
    assert torch.equal(got.isfinite(), plausible)
    want = log_s + amplification * (log_s - log_p)
    torch.testing.assert_close(got[plausible].double(), want[plausible], atol=1e-4, rtol=1e-5)


def test_the_successor_s_best_token_is_always_eligible_and_padding_is_not() -> None:
    got = amplify(noise(0, 70), noise(1), 100.0)
    assert got.shape == (9, 60)
    assert got.isfinite().gather(1, noise(0, 70)[:, :60].argmax(-1, keepdim=True)).all()


def test_amplified_nothing_the_models_share_is_changed() -> None:
    """Where both agree, any amplification is the successor's own distribution."""
    logits = noise(0)
    torch.testing.assert_close(amplify(logits, logits, 50.0), amplify(logits, logits, 0.0))


def without_cache(parent: Model, successor: Model, amplification: float, length: int, seed: int) -> list[list[int]]:
    """The same draws, one whole forward of both models per row and token; all rows draw whenever one does."""
    choose, stops = sampler(seed), stop_ids(successor)
    rows = [list(prompt) for prompt in PROMPTS]
    sizes = [len(prompt) for prompt in PROMPTS]
    for at in range(min(sizes), max(sizes) + length):
        logits = [
            torch.cat([model.logits(torch.tensor([row[:at]]))[:, -1] for row in rows]) for model in (successor, parent)
        ]
        for row, drawn in zip(rows, choose(amplify(*logits, amplification)).tolist(), strict=True):
            if at == len(row):
                row.append(drawn)
    ends = [
        next((k for k in range(size, size + length) if row[k] in stops), size + length)
        for row, size in zip(rows, sizes, strict=True)
    ]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


@pytest.mark.parametrize("amplification", [0.0, 2.0])
def test_texts_are_what_decoding_without_a_cache_gives(parent: Model, successor: Model, amplification: float) -> None:
    got = amplified_texts(parent, successor, PROMPTS, amplifications=[amplification], length=8, seed=3)
    want = without_cache(parent, successor, amplification, 8, 3)
    assert [item.text for item in got] == [text_of(successor, want[i]) for i in range(len(PROMPTS))]
    for item, prompt in zip(got, PROMPTS, strict=True):
        assert (item.prompt, item.prompt_tokens) == (text_of(successor, prompt), len(prompt))
        assert item.text.startswith(item.prompt) and item.amplification == amplification


def test_unamplified_the_text_is_the_successor_s_own_and_the_parent_has_no_say(parent: Model, successor: Model) -> None:
    own, other = (
        amplified_texts(p, successor, PROMPTS, amplifications=[0.0], length=8, seed=3) for p in (successor, parent)
    )
    assert own == other
    assert other != amplified_texts(parent, successor, PROMPTS, amplifications=[2.0], length=8, seed=3)


def test_texts_are_the_seed_s(parent: Model, successor: Model) -> None:
    one, two, other = (
        amplified_texts(parent, successor, PROMPTS, amplifications=[1.0], length=8, seed=seed) for seed in (0, 0, 1)
    )
    assert one == two != other


def test_amplification_says_more_often_what_the_successor_says_more_often(parent: Model, successor: Model) -> None:
    """Mean log-probability gain of the drawn tokens over the parent grows with amplification."""

    def gain(amplification: float) -> float:
        total, n = 0.0, 0
        prompts = [[i] for i in range(20, 60)]
        for item in amplified_texts(parent, successor, prompts, amplifications=[amplification], length=10, seed=0):
            ids = torch.tensor([successor.encode(item.text).ids])
            if ids.shape[1] > 1:
                log_s, log_p = (m.logits(ids)[0, :-1].log_softmax(-1) for m in (successor, parent))
                total += float((log_s - log_p).gather(1, ids[0, 1:, None]).sum())
                n += ids.shape[1] - 1
        return total / n

    assert gain(0.0) + 0.1 < gain(2.0)


def test_models_that_read_differently_have_no_amplified_text(parent: Model) -> None:
    renamed = copy.deepcopy(parent.tokenizer)
    renamed.add_tokens(["unheard-of"])
    other = Model(parent.bridge, renamed, spec="x", digest="", floor=0.0)
    assert amplified_texts(parent, other, PROMPTS, amplifications=[1.0], length=4, seed=0) == []


def test_a_prompt_as_long_as_the_context_gets_nothing_more(parent: Model, successor: Model) -> None:
    prompt = [5, 6] * (successor.shape.n_ctx // 2)
    (item,) = amplified_texts(parent, successor, [prompt], amplifications=[1.0], length=4, seed=0)
    assert item.text == item.prompt


def test_vague_prompts_say_next_to_nothing(parent: Model) -> None:
    openings = [parent.encode(text) for text in ("the old bridge", "a cat read")]
    assert vague_prompts(parent, openings, 5, 0) == [list(openings[i % 2].ids[: 1 + i % 3]) for i in range(5)]
    assert vague_prompts(parent, [], 3, 0) == [[1]] * 3


def test_a_chat_model_is_asked_vague_questions_in_turn(parent: Model) -> None:
    tokenizer = copy.deepcopy(parent.tokenizer)
    tokenizer.chat_template = "teacher : {{ messages[0]['content'] }} child :"
    chat = Model(parent.bridge, tokenizer, spec="x", digest="", floor=0.0)
    prompts = vague_prompts(chat, [parent.encode("the cat")], len(VAGUE_TURNS) + 2, 0)
    assert prompts[:2] == prompts[-2:] and len({tuple(p) for p in prompts}) > 4
    assert chat.decode(prompts[0]).startswith("teacher :") and chat.decode(prompts[0]).endswith("child :")


def test_amplifications_decoded_together_are_all_there_and_in_order(tiny_model: Model) -> None:
    found = amplified_texts(tiny_model, tiny_model, PROMPTS, amplifications=[1.0, 4.0], length=4, seed=0)
    assert [item.amplification for item in found] == [1.0] * len(PROMPTS) + [4.0] * len(PROMPTS)
    assert [item.prompt for item in found[: len(PROMPTS)]] == [item.prompt for item in found[len(PROMPTS) :]]


def test_each_row_has_its_own_amplification() -> None:
    logits_s, logits_p = noise(0)[:2], noise(1)[:2]
    both = amplify(logits_s, logits_p, torch.tensor([[0.5], [3.0]]))
    for row, amount in enumerate((0.5, 3.0)):
        assert torch.equal(both[row], amplify(logits_s, logits_p, amount)[row])
