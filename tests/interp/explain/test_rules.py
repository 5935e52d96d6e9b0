"""Every rule against a plain loop over the tokens, its words, and its JSON."""

import re
from collections.abc import Callable

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from heredity.interp.explain import Contexts
from heredity.interp.explain.rules import (
    Affix,
    All,
    Any,
    Inside,
    Ngram,
    Not,
    Position,
    Promoted,
    Recent,
    Repeat,
    Role,
    Rule,
    Shape,
    TokenIn,
)
from heredity.interp.model import Encoded

TEXTS = (
    'The cat (a big one [really]) sat.\nIt said: "hello there" and ran\n\n- one: two (three\n\nfour',
    "a b a b c a b",
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello 42!<|im_end|>",
    "",
)
_VOCABULARY: dict[str, int] = {}


def encoded(text: str) -> Encoded:
    """Words with the space before them, marks, line breaks and template tokens."""
    spans = tuple(m.span() for m in re.finditer(r"<\|\w+\|>| ?\w+| ?[^\w\s]|\n+| +", text))
    return Encoded(text, tuple(_VOCABULARY.setdefault(text[a:b], len(_VOCABULARY)) for a, b in spans), spans)


CONTEXTS = Contexts(tuple(encoded(text) for text in TEXTS))
STRINGS = [[t.text[a:b] for a, b in t.spans] for t in CONTEXTS.texts]


def ids(*names: str) -> tuple[int, ...]:
    return tuple(_VOCABULARY[name] for name in names)


def by_loop(test: Callable[[list[str], int], bool]) -> np.ndarray:
    return np.array([test(tokens, at) for tokens in STRINGS for at in range(len(tokens))], dtype=bool)


def words_at(rule: Rule) -> list[str]:
    return [CONTEXTS.around(int(row))[1].strip() for row in np.flatnonzero(rule.holds(CONTEXTS))]


def get(tokens: list[str], at: int) -> str | None:
    return tokens[at] if 0 <= at < len(tokens) else None


@pytest.mark.parametrize("offset", [-3, -2, -1, 0, 1, 2])
def test_token_sets(offset: int) -> None:
    rule = TokenIn(offset=offset, ids=ids("a", " b"), names=("a", " b"))
    assert np.array_equal(rule.holds(CONTEXTS), by_loop(lambda t, at: get(t, at + offset) in ("a", " b")))


def test_sequences() -> None:
    rule = Ngram(grams=(ids(" a", " b"), ids(" b", " c")), names=((" a", " b"), (" b", " c")))
    ends = by_loop(lambda t, at: (get(t, at - 1), t[at]) in ((" a", " b"), (" b", " c")))
    assert np.array_equal(rule.holds(CONTEXTS), ends)
    assert ends.sum() == 3


@pytest.mark.parametrize("within", [1, 2, 5])
def test_recent(within: int) -> None:
    rule = Recent(within=within, ids=ids(" b", ":"), names=(" b", ":"))
    expected = by_loop(lambda t, at: any(get(t, at - k) in (" b", ":") for k in range(1, within + 1)))
    assert np.array_equal(rule.holds(CONTEXTS), expected)


def test_earlier_in_the_line() -> None:
    rule = Recent(within=None, ids=ids(":"), names=(":",))
    assert np.array_equal(rule.holds(CONTEXTS), Inside(place="after a colon").holds(CONTEXTS))


def test_repeats() -> None:
    def pair_before(t: list[str], at: int) -> bool:
        return at > 0 and any((t[i - 1], t[i]) == (t[at - 1], t[at]) for i in range(1, at))

    def next_pair(t: list[str], at: int) -> bool:
        return at + 1 < len(t) and pair_before(t, at + 1)

    expected = {
        "seen": lambda t, at: t[at] in t[:at],
        "induced": pair_before,
        "next seen": lambda t, at: at + 1 < len(t) and t[at + 1] in t[: at + 1],
        "next induced": next_pair,
    }
    for what, test in expected.items():
        assert np.array_equal(Repeat(what=what).holds(CONTEXTS), by_loop(test)), what


@pytest.mark.parametrize(("first", "last"), [(0, 2), (3, 3), (2, 5), (4, None)])
def test_positions(first: int, last: int | None) -> None:
    held = Position(first=first, last=last).holds(CONTEXTS)
    assert np.array_equal(held, by_loop(lambda t, at: first <= at and (last is None or at <= last)))


def test_brackets_quotes_and_lines() -> None:
    # A bracket that is never closed counts as open until the blank line after it.
    inside = words_at(Inside(place="round brackets"))
    assert inside == ["a", "big", "one", "[", "really", "]", "three"]
    assert words_at(Inside(place="square brackets")) == ["really"]
    assert words_at(Inside(place="double quotes")) == ["hello", "there"]
    assert [w for w in words_at(Inside(place="a list item")) if w] == ["-", "one", ":", "two", "(", "three"]
    assert [w for w in words_at(Inside(place="after a colon")) if w] == [
        '"',
        *"hello there".split(),
        '"',
        "and",
        "ran",
        "two",
        "(",
        "three",
    ]
    assert words_at(Inside(place="a line's first token"))[:2] == ["The", "It"]


def test_roles() -> None:
    assert [w for w in words_at(Role(role="system")) if w] == ["Be", "kind", "."]
    assert [w for w in words_at(Role(role="user")) if w] == ["Hi"]
    assert [w for w in words_at(Role(role="assistant")) if w] == ["Hello", "42", "!"]
    template = [w for w in words_at(Role(role="template")) if w]
    assert template.count("<|im_start|>") == 3 and template.count("<|im_end|>") == 3 and "user" in template


def test_shapes_and_affixes() -> None:
    strip = [s.strip() for tokens in STRINGS for s in tokens]
    capital = Shape(shape="starts with a capital").holds(CONTEXTS)
    assert [s for s, held in zip(strip, capital, strict=True) if held] == [s for s in strip if s[:1].isupper()]
    assert words_at(Shape(shape="holds a digit")) == ["42"]
    assert set(words_at(Affix(end="ends", texts=("ere", "lly")))) == {"there", "really"}
    assert words_at(Affix(end="starts", texts=("the",))) == ["there"], "a token that is all prefix is none"


def test_a_token_the_tokenizer_added_has_no_characters_but_a_name() -> None:
    contexts = Contexts((Encoded("hi yo", (1, 5, 6, 2), ((0, 0), (0, 2), (2, 5), (0, 0))),))
    assert Shape(shape="was added by the tokenizer").holds(contexts).tolist() == [True, False, False, True]
    assert contexts.names[1] == "<1>" and contexts.around(0)[1] == "<1>"
    assert Inside(place="a line's first token").holds(contexts).tolist() == [True, False, False, False]


def test_names_tell_tokens_apart_whose_spans_leave_the_space_out() -> None:
    contexts = Contexts((Encoded("the the", (7, 8), ((0, 3), (4, 7))), Encoded("xthe", (9, 7), ((0, 1), (1, 4)))))
    assert len(set(contexts.names.values())) == 3


def test_words() -> None:
    rules = {
        "this token is “a” or “ b”": TokenIn(offset=0, ids=(1, 2), names=("a", " b")),
        "the token before is “\\n\\x1b[31m”": TokenIn(offset=-1, ids=(1,), names=("\n\x1b[31m",)),
        "the next token is “a”": TokenIn(offset=1, ids=(1,), names=("a",)),
        "here ends “a +  b”": Ngram(grams=((1, 2),), names=(("a", " b"),)),
        "this token holds a digit": Shape(shape="holds a digit"),
        "this token ends with “ing”": Affix(end="ends", texts=("ing",)),
        "among the first 4 tokens of the text": Position(first=0, last=3),
        "it is token 4 of the text": Position(first=3, last=3),
        "after the first 4 tokens of the text": Position(first=4, last=None),
        "inside backticks": Inside(place="backticks"),
        "in the user's turn": Role(role="user"),
        "this token occurred earlier in the text": Repeat(what="seen"),
        "“if” stands among the 4 tokens before": Recent(within=4, ids=(1,), names=("if",)),
        "the next token is one that it promotes: “a”": Promoted(ids=(1,), names=("a",)),
        "not: inside backticks": Not(rule=Inside(place="backticks")),
        "inside backticks, and it is token 4 of the text": All(
            rules=(Inside(place="backticks"), Position(first=3, last=3))
        ),
        "inside backticks; or in the user's turn": Any(rules=(Inside(place="backticks"), Role(role="user"))),
        "never": Any(rules=()),
    }
    adapter = TypeAdapter(Rule)
    for words, rule in rules.items():
        assert rule.in_words() == words
        again = adapter.validate_json(rule.model_dump_json())
        assert again == rule and np.array_equal(again.holds(CONTEXTS), rule.holds(CONTEXTS))
        assert rule.holds(Contexts(())).shape == (0,)


def test_long_sets_are_cut_in_words_only() -> None:
    rule = TokenIn(offset=0, ids=tuple(range(20)), names=tuple(f"w{i}" for i in range(20)))
    assert rule.in_words().endswith("“w11” or 8 more") and "w12" not in rule.in_words()
    assert rule.holds(CONTEXTS).sum() == np.isin(CONTEXTS.ids, range(20)).sum()


def test_logic() -> None:
    a, b = Shape(shape="is made of letters"), Position(first=0, last=3)
    x, y = a.holds(CONTEXTS), b.holds(CONTEXTS)
    assert np.array_equal(All(rules=(a, b)).holds(CONTEXTS), x & y)
    assert np.array_equal(Any(rules=(a, b)).holds(CONTEXTS), x | y)
    assert np.array_equal(Not(rule=a).holds(CONTEXTS), ~x)
    assert not Any(rules=()).holds(CONTEXTS).any()


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Rule).validate_python({"kind": "shape", "shape": "holds a digit", "code": "import os"})
