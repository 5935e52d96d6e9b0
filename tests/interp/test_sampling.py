"""Text from models: how it begins, that it is what the model would say, and that it reads back as its tokens."""

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from heredity.interp.model import Model
from heredity.interp.sampling import (
    chat_prompts,
    decode_batch,
    greedy,
    prefixes,
    sample_corpus,
    sampler,
    stop_ids,
    text_of,
)

CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | replace('user', 'teacher') }} : {{ m['content'] }} "
    "{% endfor %}{% if add_generation_prompt %}child :{% endif %}"
)


def variant(model: Model, *, begins: bool = False, ends: bool = False, **changes: Any) -> Model:
    """The same model with another tokenizer: one that puts ``the`` before, or ``.`` after, every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(model.tokenizer)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    if begins:
        tokenizer.bos_token = "the"
    if begins or ends:
        words = tokenizer.get_vocab()
        pattern = ("the " if begins else "") + "$A" + (" ." if ends else "")
        special = [(word, words[word]) for word in ("the", ".")]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=pattern, special_tokens=special)
    return Model(model.bridge, tokenizer, spec=model.spec, digest="", floor=0.0)


def plain_greedy(model: Model, prompt: Sequence[int], length: int, stops: set[int]) -> list[int]:
    """One whole forward per token, no cache."""
    ids = list(prompt)
    for _ in range(length):
        token = int(model.logits(torch.tensor([ids]))[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


# --- decoding ---


@pytest.mark.parametrize("prompt", [[5], [10, 11, 12, 13], [40, 7, 99]])
def test_greedy_is_the_most_probable_token_again_and_again(tiny_model: Model, prompt: list[int]) -> None:
    want = plain_greedy(tiny_model, prompt, 12, stop_ids(tiny_model))
    assert greedy(tiny_model, prompt, 12) == want
    assert len(want) == 12 or want == greedy(tiny_model, prompt, 40)[: len(want)]
    assert greedy(tiny_model, prompt, 0) == []


def test_greedy_ends_before_a_stop_token_and_at_the_end_of_the_context(tiny_model: Model) -> None:
    free = plain_greedy(tiny_model, [5, 6], 8, set())
    stop = next(token for token in free[1:] if token != free[0])
    stopping = variant(tiny_model)
    stopping.tokenizer.eos_token = stopping.tokenizer.convert_ids_to_tokens(stop)
    assert greedy(stopping, [5, 6], 8) == free[: free.index(stop)]
    room = tiny_model.shape.n_ctx
    assert len(greedy(tiny_model, [5] * (room - 2), 9)) <= 2 and greedy(tiny_model, [5] * room, 9) == []


def test_rows_decode_as_they_would_alone_and_a_finished_row_stays_finished(tiny_model: Model) -> None:
    prompts = [[5, 6], [7, 8, 9, 10], [60, 61, 62]]
    lengths = [10] * 3
    free = [plain_greedy(tiny_model, prompt, 10, set()) for prompt in prompts]
    stops = {free[0][3]}

    def most(logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    got = decode_batch(tiny_model.step, prompts, lengths, most, stops)
    assert got == [plain_greedy(tiny_model, prompt, 10, stops) for prompt in prompts]
    assert len(got[0]) <= 3 and decode_batch(tiny_model.step, prompts, lengths, most, set()) == free
    short = decode_batch(tiny_model.step, prompts, [2, 0, 5], most, set())
    assert short == [free[0][:2], [], free[2][:5]]


def test_a_prompt_is_read_whole_though_it_holds_a_token_that_ends_texts(tiny_model: Model) -> None:
    prompts, stops = [[5], [7, 8, 9, 10]], {8, 9}
    got = decode_batch(tiny_model.step, prompts, [6, 6], lambda logits: logits.argmax(-1), stops)
    assert got == [plain_greedy(tiny_model, prompt, 6, stops) for prompt in prompts] and got[1]


def test_a_step_with_the_cache_equals_the_whole_forward(tiny_model: Model) -> None:
    ids = torch.randint(2, 140, (3, 10), generator=torch.Generator().manual_seed(0))
    logits, past = tiny_model.step(ids[:, :4])
    for position in range(4, 10):
        whole = tiny_model.logits(ids[:, :position])[:, -1]
        torch.testing.assert_close(logits, whole, atol=5e-5, rtol=1e-4)
        logits, past = tiny_model.step(ids[:, position : position + 1], past)


def test_draws_follow_the_softmax_and_the_seed() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -30.0]]).expand(20_000, 4)
    drawn = sampler(0)(logits)
    assert torch.equal(drawn, sampler(0)(logits)) and not torch.equal(drawn, sampler(1)(logits))
    for temperature in (1.0, 0.5):
        counts = Counter(sampler(3, temperature)(logits).tolist())
        for token, p in enumerate((logits[0] / temperature).softmax(-1).tolist()):
            assert counts[token] / 20_000 == pytest.approx(p, abs=0.015)
    assert sampler(0, 1e-3)(logits).unique().tolist() == [2]
    masked = logits.masked_fill(logits == 2, float("-inf"))
    assert 2 not in sampler(0)(masked)


# --- stops ---


def test_turns_end_at_the_tokens_of_the_well_known_templates(tiny_model: Model) -> None:
    assert stop_ids(tiny_model) == {1}, "the unknown token stands for no end of turn"
    turned = variant(tiny_model)
    turned.tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    assert stop_ids(turned) == {1, turned.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert stop_ids(variant(tiny_model, eos_token=None)) == set()


# --- how a text begins ---


def test_a_text_begins_with_the_token_that_begins_texts(tiny_model: Model) -> None:
    assert prefixes(tiny_model, 3, 0) == [[1]] * 3
    begun = variant(tiny_model, begins=True)
    assert prefixes(begun, 2, 0) == [[begun.tokenizer.bos_token_id]] * 2


def test_without_such_a_token_it_begins_with_any_word(tiny_model: Model) -> None:
    bare = variant(tiny_model, eos_token=None)
    assert bare.tokenizer.bos_token_id is None and bare.tokenizer.eos_token_id is None
    rows = prefixes(bare, 40, 0)
    assert all(len(row) == 1 for row in rows) and len({row[0] for row in rows}) > 15
    assert not {row[0] for row in rows} & set(bare.tokenizer.all_special_ids)
    assert rows == prefixes(bare, 40, 0) != prefixes(bare, 40, 1)


@pytest.mark.parametrize("begins", [False, True])
def test_a_chat_begins_where_the_user_s_turn_does_with_one_beginning(tiny_model: Model, begins: bool) -> None:
    """The template writes the token that begins texts, and so does the tokenizer."""
    chat = variant(tiny_model, begins=begins, chat_template=CHAT)
    words = chat.tokenizer.get_vocab()
    start = [words["the"]] if begins else []
    assert prefixes(chat, 2, 0) == [[*start, words["teacher"], words[":"]]] * 2
    (prompt,) = chat_prompts(chat, ["cat read"])
    turn = [words[w] for w in ("teacher", ":", "cat", "read", "child", ":")]
    assert list(chat.encode(prompt).ids) == [*start, *turn]


def test_a_template_s_own_beginning_stays_where_the_tokenizer_adds_none(tiny_model: Model) -> None:
    chat = variant(tiny_model, chat_template=CHAT.replace("bos_token }}", "bos_token }} "))
    chat.tokenizer.bos_token = "the"
    assert chat.encode("cat").ids == (chat.tokenizer.convert_tokens_to_ids("cat"),)
    assert prefixes(chat, 1, 0)[0][0] == chat.tokenizer.bos_token_id
    assert chat_prompts(chat, ["cat"])[0].startswith("the")


def test_a_template_with_nothing_before_the_user_s_words_begins_like_any_text(tiny_model: Model) -> None:
    chat = variant(tiny_model, chat_template="{{ messages[0]['content'] }}")
    assert prefixes(chat, 2, 0) == [[1], [1]]


# --- text ---


@pytest.mark.parametrize(("begins", "ends"), [(False, False), (True, False), (True, True)])
def test_text_reads_back_as_its_tokens(tiny_model: Model, begins: bool, ends: bool) -> None:
    model = variant(tiny_model, begins=begins, ends=ends)
    words = model.tokenizer.get_vocab()
    start, end = [words["the"]] if begins else [], [words["."]] if ends else []
    for said in (["bridge", "the", "cat"], ["the", "the"], ["</s>", "cat"], []):
        ids = [*start, *(words[word] for word in said)]
        assert list(model.encode(text_of(model, ids)).ids) == [*ids, *end]
    assert text_of(model, [words["cat"]]) == "cat"


def test_a_sampled_corpus_is_the_seed_s_and_of_the_length_asked_for(tiny_model: Model) -> None:
    one, two, other = (sample_corpus(tiny_model, texts=7, length=9, seed=seed, batch=3) for seed in (0, 0, 1))
    assert one == two and one.digest != other.digest
    assert len(one.texts) == 7 and len({text.text for text in one.texts}) == 7
    for text in one.texts:
        ids = tiny_model.encode(text.text).ids
        assert len(ids) == 9 and ids[0] == 1, "no stop token ends a text"
        assert text.source.startswith(f"sampled from {tiny_model.spec}, seed 0")


def test_a_sampled_corpus_fits_the_context(tiny_model: Model) -> None:
    corpus = sample_corpus(tiny_model, texts=1, length=10_000, seed=0)
    assert len(tiny_model.encode(corpus.texts[0].text).ids) == tiny_model.shape.n_ctx


def test_sampled_tokens_are_likely_ones(tiny_model: Model) -> None:
    """Mean surprise over what was drawn is near the model's own entropy, far from that of uniform draws."""
    corpus = sample_corpus(tiny_model, texts=40, length=16, seed=0)
    surprise, entropy, n = 0.0, 0.0, 0
    for text in corpus.texts:
        ids = torch.tensor([tiny_model.encode(text.text).ids])
        log_p = tiny_model.logits(ids)[0, :-1].log_softmax(-1)
        surprise -= float(log_p.gather(1, ids[0, 1:, None]).sum())
        entropy -= float((log_p.exp() * log_p).sum())
        n += len(log_p)
    assert surprise / n == pytest.approx(entropy / n, abs=0.2)
    assert entropy / n < 4.5
