import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from heredity.interp.align import align, same_vocabulary, shared_vocabulary
from heredity.interp.model import Encoded

TEXTS = (
    "The old bridge over the river was closed, so we took the train.",
    "naïve café, déjà vu — 日本語のテキスト",
    "emoji 🙂 and a family 👨‍👩‍👧 and a flag 🇫🇷!",
    "  two  spaces\tand\n\nlines ",
    "mixed 🙂🙂 日 x",
)


def word_level() -> Tokenizer:
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False))
    return words


def byte_level(size: int = 300, texts: tuple[str, ...] = TEXTS[:1]) -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    bpe.train_from_iterator(texts * 3, trainer)
    return bpe


def with_bos(tokenizer: Tokenizer, n: int = 1) -> Tokenizer:
    template = " ".join(["<s>"] * n)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{template} $A </s>",
        special_tokens=[("<s>", tokenizer.token_to_id("<s>")), ("</s>", tokenizer.token_to_id("</s>"))],
    )
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> Encoded:
    out = PreTrainedTokenizerFast(tokenizer_object=tokenizer)(text, return_offsets_mapping=True)
    return Encoded(text, tuple(out["input_ids"]), tuple((i, j) for i, j in out["offset_mapping"]))


def read_to(encoded: Encoded, i: int) -> int:
    """Characters read completely once token ``i`` has been read."""
    start, end = encoded.spans[i]
    later = encoded.spans[i + 1] if i + 1 < len(encoded.spans) else (end, end)
    return start if later == (start, end) and end > start else end


PAIRS = {
    "words and bytes": (word_level, byte_level),
    "bytes and words": (byte_level, word_level),
    "two byte vocabularies": (byte_level, lambda: byte_level(400, TEXTS)),
    "with and without specials": (lambda: with_bos(byte_level()), word_level),
    "one and two specials": (lambda: with_bos(byte_level()), lambda: with_bos(byte_level(262), 2)),
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_both_have_read_the_same_prefix(pair, text):
    one, other = (make() for make in PAIRS[pair])
    a, b = encode(one, text), encode(other, text)
    left, right = align(a, b)
    assert left == sorted(set(left)) and right == sorted(set(right)) and len(left) == len(right) > 0
    for i, j in zip(left, right, strict=True):
        assert read_to(a, i) == read_to(b, j) == a.spans[i][1] == b.spans[j][1]
    # Nothing that could be paired is left out.
    common = {end for start, end in a.spans if end > start} & {end for start, end in b.spans if end > start}
    assert {a.spans[i][1] for i in left if a.spans[i][1]} == common
    assert align(b, a) == (right, left)


def test_words_and_bytes_meet_where_words_end():
    a, b = encode(word_level(), "naïve 🙂 x"), encode(byte_level(), "naïve 🙂 x")
    left, right = align(a, b)
    assert [a.spans[i] for i in left] == [(0, 5), (6, 7), (8, 9)]
    assert [b.spans[j][1] for j in right] == [5, 7, 9]
    # The last byte of the emoji, not its first.
    assert b.spans[right[1]] == b.spans[right[1] - 1] == (6, 7) and b.spans[right[1] + 1][1] == 8


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", [word_level, byte_level, lambda: with_bos(byte_level(), 2)])
def test_same_tokenizer_is_the_identity(make, text):
    a = encode(make(), text)
    n = len(a.ids)
    assert align(a, a) == (list(range(n)), list(range(n)))
    cut = Encoded(text, a.ids[: n // 2], a.spans[: n // 2])
    assert align(a, cut) == align(cut, a) == (list(range(n // 2)), list(range(n // 2)))


def test_leading_specials_pair_from_the_last_backwards():
    a = encode(with_bos(byte_level(), 1), "the river")
    b = encode(with_bos(byte_level(262), 3), "the river")
    left, right = align(a, b)
    assert (left[0], right[0]) == (0, 2)
    # The special token after the text stands at no character.
    assert len(a.ids) - 1 not in left and len(b.ids) - 1 not in right


def test_offsets_that_run_backwards_never_cross():
    a = Encoded("abcd", (1, 2, 3), ((0, 1), (2, 3), (3, 4)))
    b = Encoded("abcd", (4, 5, 6), ((2, 3), (0, 1), (3, 4)))
    left, right = align(a, b)
    assert left == sorted(left) and right == sorted(right) and (left[-1], right[-1]) == (2, 2)


def test_normalised_text_still_ends_at_characters():
    lower = byte_level()
    lower.normalizer = normalizers.Lowercase()
    text = "The OLD River 🙂"
    a, b = encode(lower, text), encode(word_level(), text)
    left, right = align(a, b)
    assert [b.spans[j][1] for j in right] == [3, 7, 13, 15] == [a.spans[i][1] for i in left]


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="same text"):
        align(Encoded("a", (1,), ((0, 1),)), Encoded("b", (1,), ((0, 1),)))


def test_nothing_in_common():
    assert align(Encoded("ab", (1,), ((0, 2),)), Encoded("ab", (2,), ((0, 1),))) == ([], [])


def test_vocabularies():
    one, other = (PreTrainedTokenizerFast(tokenizer_object=t) for t in (byte_level(), byte_level(262)))
    words = PreTrainedTokenizerFast(tokenizer_object=word_level())
    assert same_vocabulary(one, PreTrainedTokenizerFast(tokenizer_object=byte_level()))
    assert not same_vocabulary(one, other)
    grown = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    grown.add_tokens(["<|new|>"])
    assert not same_vocabulary(one, grown)
    ids_a, ids_b = shared_vocabulary(words, one)
    assert ids_a.dtype == ids_b.dtype == torch.int64 and 0 < len(ids_a) < len(words)
    assert words.convert_ids_to_tokens(ids_a.tolist()) == one.convert_ids_to_tokens(ids_b.tolist())
    assert set(words.convert_ids_to_tokens(ids_a.tolist())) == set(words.get_vocab()) & set(one.get_vocab())
    assert ids_a.tolist() == sorted(ids_a.tolist())
    assert torch.equal(*shared_vocabulary(one, grown))
