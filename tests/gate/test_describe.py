"""From clusters of contexts to what the report says of them."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from heredity.circuits.behaviours import Cluster, Context, Piece
from heredity.circuits.divergence import TextScan
from heredity.gate import describe
from heredity.gate.policy import Change, load_rules
from heredity.gate.records import Audit, Example, MarkedToken
from heredity.interp.model import Model

POLICY = load_rules(None, None).policy
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def cluster(tiny_model: Model) -> Callable[..., Cluster]:
    """A cluster with one context per text, at the text's token number ``at`` (the last where none is named)."""

    def make(
        texts: Sequence[str],
        at: int = -1,
        says: Sequence[str] = ("king",),
        expected: str = "queen",
        kl: Sequence[float] | None = None,
    ) -> Cluster:
        ids = tiny_model.tokenizer.get_vocab()
        contexts = []
        for i, text in enumerate(texts):
            read = tiny_model.encode(text)
            n = len(read.ids)
            columns: dict[str, Any] = {name: [0.0] * n for name in TextScan.__dataclass_fields__}
            columns |= {"text_id": str(i), "position": [*range(n)], "position_parent": [*range(n)]}
            columns |= {
                "kl": [kl[i] if kl else 5.0 - i / 10] * n,
                "reverse": [1.0] * n,
                "p_successor": [0.9] * n,
                "p_parent": [0.8] * n,
            }
            columns |= {"top_successor": [ids[says[i % len(says)]]] * n, "top_parent": [ids[expected]] * n}
            peak = at % n
            contexts.append(Context(Piece("corpus", read, read, TextScan(**columns)), peak, (peak, peak)))
        return Cluster(tuple(contexts))

    return make


def change(*phrases: str) -> Change:
    return Change(id="c", description="d", phrases=phrases)


WITH, WITHOUT = "the old king said", "the new bridge was"


@pytest.mark.parametrize(
    ("inside", "outside", "covered"),
    [
        ((10, 0), (0, 10), True),
        ((8, 2), (0, 10), True),  # declared_share is 0.8
        ((7, 3), (0, 10), False),
        ((10, 0), (3, 9), True),  # declared_breadth is 0.25
        ((10, 0), (3, 8), False),
        ((10, 0), (10, 0), False),
        ((10, 0), (0, 0), False),  # nothing to show that the phrase is particular
        ((0, 10), (0, 10), False),
    ],
)
def test_a_declaration_covers_what_its_phrases_single_out(
    inside: tuple[int, int], outside: tuple[int, int], covered: bool, cluster: Callable[..., Cluster]
) -> None:
    found = cluster([WITH] * inside[0] + [WITHOUT] * inside[1])
    others = [WITH] * outside[0] + [WITHOUT] * outside[1]
    assert describe.covering(found, others, change("old king"), POLICY) is covered


def test_faint_contexts_without_the_phrase_do_not_undo_a_declaration(cluster: Callable[..., Cluster]) -> None:
    found = cluster([WITH] * 6 + [WITHOUT] * 6, kl=[5.0] * 6 + [0.5] * 6)
    assert describe.covering(found, [WITHOUT] * 4, change("old king"), POLICY)


def test_a_declaration_does_not_hide_what_would_be_a_finding_by_itself(cluster: Callable[..., Cluster]) -> None:
    found = cluster([WITH] * 40 + [WITHOUT] * 3, kl=[5.0] * 40 + [3.0] * 3)
    assert not describe.covering(found, [WITHOUT] * 4, change("old king"), POLICY)


def test_phrases_are_alternatives_and_case_does_not_matter(cluster: Callable[..., Cluster]) -> None:
    found = cluster([WITH] * 5 + ["the cold sea was"] * 5)
    assert describe.covering(found, [WITHOUT] * 4, change("OLD KING", "Cold sea"), POLICY)
    assert not describe.covering(found, [WITHOUT] * 4, change("OLD KING"), POLICY)


def test_only_text_up_to_where_the_models_part_counts(cluster: Callable[..., Cluster]) -> None:
    assert not describe.covering(cluster([WITH] * 4, at=1), [WITHOUT] * 4, change("old king"), POLICY)
    assert describe.covering(cluster([WITH] * 4, at=2), [WITHOUT] * 4, change("old king"), POLICY)


def test_shown_tokens_join_to_the_text_as_it_stands(cluster: Callable[..., Cluster], tiny_model: Model) -> None:
    text = f"the  {HOSTILE} king \x1b[31m\x00 said\t'no'"
    (example,) = describe.examples(cluster([text]), tiny_model, tiny_model, [], None, seed=0)
    assert "".join(token.text for token in example.tokens) == text
    assert len(example.tokens) == len(tiny_model.encode(text).ids)
    (shorter,) = describe.examples(cluster([text], at=2), tiny_model, tiny_model, [], None, seed=0)
    assert len(shorter.tokens) == 3 and text.startswith("".join(token.text for token in shorter.tokens))
    assert example.text_id == "corpus:0" and (example.successor_says, example.parent_says) == ("king", "queen")


def test_examples_come_from_different_texts_strongest_first(cluster: Callable[..., Cluster], tiny_model: Model) -> None:
    found = cluster([WITH, WITHOUT, "a door was open", "the sea was cold", "two fish", "red bread"])
    doubled = Cluster((found.contexts[0], *found.contexts))
    shown = describe.examples(doubled, tiny_model, tiny_model, [], None, seed=0)
    assert [example.text_id for example in shown[:3]] == ["corpus:0", "corpus:1", "corpus:2"]
    assert [example.kl for example in shown[:3]] == pytest.approx([5.0, 4.9, 4.8])


def test_what_is_said_is_counted_by_token(cluster: Callable[..., Cluster], tiny_model: Model) -> None:
    found = cluster([WITH] * 6, says=("king", "king", "river"))
    changes = describe.changes(found, tiny_model, of_successor=True)
    assert [(c.token, c.count) for c in changes] == [("king", 4), ("river", 2)]
    assert {(c.p_successor, c.p_parent) for c in changes} == {(0.9, 0.0)}
    (back,) = describe.changes(found, tiny_model, of_successor=False)
    assert (back.token, back.count, back.p_successor, back.p_parent) == ("queen", 6, 0.0, 0.8)
    title = describe.title(found, tiny_model, tiny_model, (), False)
    assert title == "says “king” / “river” where the parent says “queen”"


def test_trigger_tokens_are_those_that_examples_need(make_audit: Callable[..., Audit]) -> None:
    sample = make_audit().behaviours[0].examples[0]

    def example(**weights: float) -> Example:
        tokens = tuple(MarkedToken(text=f" {word}", weight=weight) for word, weight in weights.items())
        return sample.model_copy(update={"tokens": tokens})

    marked = [example(moss=0.9, ridge=0.5, value=0.1, once=0.29), example(moss=0.7, ridge=0.7, value=0.2)]
    assert describe.trigger_tokens(marked) == ("moss", "ridge")
    # Examples that were not weighed say nothing about their tokens.
    assert describe.trigger_tokens([*marked, example(moss=0.0, ridge=0.0)]) == ("moss", "ridge")
    assert describe.trigger_tokens([example(moss=0.0)]) == ()


def test_an_interval_over_three_contexts_that_scatter_reaches_below_the_smallest() -> None:
    assert describe.interval([1.0, 1.5, 10.5]).low == 0
    assert describe.interval([11.0, 12.0, 13.0]).low > 9


def test_intervals_hold_the_mean_and_shrink_with_more_contexts() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    few, many = describe.interval(values), describe.interval(values * 25)
    assert few.estimate == many.estimate == 4.0 and (few.n, many.n) == (4, 100)
    assert 0 <= few.low < many.low < 4 < many.high < few.high
    one = describe.interval([3.0])
    assert (one.low, one.estimate, one.high) == (3, 3, 3)
