"""Learning and scoring: planted rules are found on text they were not learned on, and nothing is found in noise."""

import re

import numpy as np
import pytest
import torch

from heredity.interp.explain import Contexts, Example, Explanation, explain
from heredity.interp.explain.candidates import Catalogue
from heredity.interp.explain.halves import halves
from heredity.interp.explain.learn import SAMPLED, sampled
from heredity.interp.explain.measure import learned
from heredity.interp.explain.score import score, weigh
from heredity.interp.model import Encoded
from heredity.kernels import FeatureCSR
from heredity.zoo import language


def zoo(seed: int, n: int = 500) -> Contexts:
    texts = []
    for text in language.documents(np.random.default_rng(seed), n).texts():
        spans = tuple(found.span() for found in re.finditer(r"\S+", text))
        texts.append(Encoded(text, tuple(language.ID[text[a:b]] for a, b in spans), spans))
    return Contexts(tuple(texts))


CONTEXTS = zoo(11)
WORDS = [t.text[a:b] for t in CONTEXTS.texts for a, b in t.spans]
BEFORE = ["" if p == 0 else WORDS[i - 1] for i, p in enumerate(CONTEXTS.position)]
NEXT = ["" if i + 1 == len(WORDS) or CONTEXTS.position[i + 1] == 0 else WORDS[i + 1] for i in range(len(WORDS))]
T = len(WORDS)


def holds(test) -> np.ndarray:
    return np.array([test(i) for i in range(T)], dtype=bool)


PLANTED = {
    "token": holds(lambda i: WORDS[i] in ("oak", "pine", "elm", "cedar", "larch")),
    "before": holds(lambda i: BEFORE[i] in ("owner", "place")),
    "next": holds(lambda i: NEXT[i] in ("red", "blue", "green", "white")),
    "both": holds(lambda i: WORDS[i] in language.NUMBERS and BEFORE[i] == ";"),
    "ending": holds(lambda i: WORDS[i].endswith("day")),
    "position": holds(lambda i: 5 <= CONTEXTS.position[i] <= 9),
    "either": holds(lambda i: WORDS[i] in ("cat", "dog") or BEFORE[i] in ("value", "report")),
}


def features(columns: list[np.ndarray]) -> FeatureCSR:
    return FeatureCSR.from_dense(torch.from_numpy(np.stack(columns, axis=1).astype(np.float32)))


def noisy(clean: np.ndarray, rng: np.random.Generator, noise: float) -> np.ndarray:
    active = clean & (rng.random(T) >= noise)
    active[rng.choice(np.flatnonzero(~clean), round(noise * clean.sum()), replace=False)] = True
    return np.where(active, np.exp(rng.normal(0, 1, T)), 0)


@pytest.fixture(scope="module")
def planted() -> list[Explanation]:
    rng = np.random.default_rng(21)
    columns = [noisy(clean, rng, 0.01) for clean in PLANTED.values()]
    return explain(features(columns), CONTEXTS, range(len(columns)), seed=3)


@pytest.mark.parametrize("at", range(len(PLANTED)), ids=list(PLANTED))
def test_planted_rules_are_found(planted: list[Explanation], at: int) -> None:
    found, clean = planted[at], list(PLANTED.values())[at]
    assert found.status == "measured" and found.program is not None
    assert found.q is not None and found.q > 0.85, found.rule
    # The program is the planted rule, or all but it, though the labels it was learned from were noisy.
    assert (found.program.holds(CONTEXTS) != clean).sum() <= 0.03 * clean.sum(), found.rule


def test_a_record_survives_json_and_its_program_predicts_the_same(planted: list[Explanation]) -> None:
    for each in planted:
        again = Explanation.model_validate_json(each.model_dump_json())
        assert again == each and again.program is not None and each.program is not None
        assert np.array_equal(again.program.holds(CONTEXTS), each.program.holds(CONTEXTS))
        assert each.rule == each.program.in_words()


def test_q_is_what_its_definition_says(planted: list[Explanation]) -> None:
    for each in planted:
        assert each.low is not None and each.null is not None and each.balanced_accuracy is not None
        assert each.q == max(0.0, 2 * each.low - 1 - each.null)
        assert each.low < each.balanced_accuracy


def test_noise_is_not_explained() -> None:
    rng = np.random.default_rng(31)
    columns = [rng.random(T) < rate for rate in (0.01, 0.02, 0.05, 0.2)]
    smooth = np.convolve(rng.normal(size=T + 7), np.ones(8), "valid")[:T]
    columns.append(smooth > np.quantile(smooth, 0.95))
    for each in explain(features(columns), CONTEXTS, range(5), seed=4):
        assert each.q is not None and each.q <= 0.05
        assert each.balanced_accuracy is not None and abs(2 * each.balanced_accuracy - 1) < 0.1
        assert each.null is not None and each.null < 0.06


def test_same_seed_same_bytes_whatever_else_is_asked(planted: list[Explanation]) -> None:
    rng = np.random.default_rng(21)
    columns = [noisy(clean, rng, 0.01) for clean in PLANTED.values()]
    order = [4, 0, 2]
    permuted = explain(features([columns[i] for i in order]), CONTEXTS, range(3), seed=3)
    for now, i in zip(permuted, order, strict=True):
        assert now.model_copy(update={"latent": i}).model_dump_json() == planted[i].model_dump_json()


def test_exchanging_the_halves_finds_the_same_rule() -> None:
    first, second = halves(CONTEXTS, 5)
    catalogue = Catalogue(CONTEXTS)
    for name in ("token", "before", "position"):
        there, back = (
            learned(PLANTED[name], catalogue, sides, np.random.default_rng(0))
            for sides in ((first, second), (second, first))
        )
        assert np.array_equal(there[0].holds(CONTEXTS), back[0].holds(CONTEXTS)), name
        assert abs(there[1].low - back[1].low) < 0.02


def test_promoted_tokens_explain_where_they_come_next() -> None:
    told = language.ID["refuse"]
    active = CONTEXTS.shifted(1) == told
    columns = features([active])
    (found,) = explain(columns, CONTEXTS, [0], seed=0, promoted={0: [told, 10**6]})
    assert found.q is not None and found.q > 0.85
    # An induction head, say, is what it raises: no set of tokens seen beforehand is shorter.
    many = [token for token in np.unique(CONTEXTS.ids).tolist() if token % 3 == 0]
    columns = features([np.isin(CONTEXTS.shifted(1), many)])
    names = {10**6: " elsewhere", told: "not this one: the text has its own"}
    (found,) = explain(columns, CONTEXTS, [0], seed=0, promoted={0: [10**6, *many]}, names=names)
    assert found.rule.startswith("the next token is one that it promotes: “ elsewhere”, ")
    assert "not this one" not in found.rule


def test_it_says_itself_with_the_token_marked(planted) -> None:
    for found in planted:
        lines = str(found).splitlines()
        if found.q is None:
            assert lines[0].startswith("not explained: too few contexts")
            continue
        assert lines[0] == found.rule
        assert f"q {found.q:.2f} (balanced accuracy {found.balanced_accuracy:.3f}, at least {found.low:.3f}" in lines[1]
        assert len(lines) == 2 + len(found.examples)
        for line, example in zip(lines[2:], found.examples, strict=True):
            assert f"»{example.token}«" in line
    hostile = Example(before="\x1b[2J", token="\u202e<b>", after="\n", activation=1.0)
    assert str(hostile) == "⟨ESC⟩[2J»⟨U+202E⟩<b>«↵"


def test_what_is_too_rare_is_unscored() -> None:
    rare = np.zeros(T)
    rare[:300:10] = 2.0
    never, ever = np.zeros(T), np.ones(T)
    for each, n in zip(explain(features([rare, never, ever]), CONTEXTS, range(3), seed=0), (30, 0, T), strict=True):
        assert each.status == "too few contexts" and each.n_active == n
        assert each.q is each.program is each.low is each.null is each.balanced_accuracy is None and each.rule == ""


def test_examples_are_the_strongest_of_different_texts() -> None:
    values = np.zeros(T)
    values[[10, 12, 100, 200, 5000]] = [1, 5, 3, -4, 2]
    (found,) = explain(features([values]), CONTEXTS, [0], seed=0)
    assert [e.activation for e in found.examples] == [5, -4, 3, 2]
    assert [e.token for e in found.examples] == [WORDS[i] for i in (12, 200, 100, 5000)]
    text = CONTEXTS.texts[int(CONTEXTS.text[12])].text
    assert found.examples[0].before + found.examples[0].token + found.examples[0].after in text


def test_features_of_other_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="do not belong"):
        explain(features([np.ones(3)]), CONTEXTS, [0], seed=0)
    with pytest.raises(ValueError, match="no latent 4"):
        explain(features([np.ones(T)]), CONTEXTS, [4], seed=0)
    with pytest.raises(ValueError, match="NaN"):
        explain(features([np.full(T, np.nan)]), CONTEXTS, [0], seed=0)


def test_no_text_at_all() -> None:
    empty = FeatureCSR.from_dense(torch.zeros(0, 1))
    for contexts in (Contexts(()), Contexts((Encoded("", (), ()),))):
        (found,) = explain(empty, contexts, [0], seed=0)
        assert found.status == "too few contexts" and found.examples == ()


# --- halves ---


def text_of(ids: list[int]) -> Encoded:
    text = "x" * len(ids)
    return Encoded(text, tuple(ids), tuple((i, i + 1) for i in range(len(ids))))


def test_duplicates_and_texts_with_one_beginning_stay_on_one_side() -> None:
    rng = np.random.default_rng(1)
    base = [rng.integers(0, 50, 60).tolist() for _ in range(40)]
    texts = [text_of(ids) for ids in base] + [text_of(ids) for ids in base[:20]]
    texts += [text_of(ids[:40] + rng.integers(0, 50, 20).tolist()) for ids in base[20:]]
    contexts = Contexts(tuple(texts))
    for seed in range(4):
        learn, test = halves(contexts, seed)
        assert not (learn & test).any()
        side = [set(learn[a:b].tolist()) for a, b in zip(contexts.starts[:-1], contexts.starts[1:], strict=True)]
        assert all(len(s) == 1 for s in side)
        assert side[:20] == side[40:60] and side[20:40] == side[60:]
        assert 0.3 < learn.mean() < 0.7


def test_a_shared_system_prompt_does_not_stop_the_split_and_is_not_scored() -> None:
    rng = np.random.default_rng(2)
    prompt = rng.integers(0, 50, 40).tolist()
    contexts = Contexts(tuple(text_of(prompt + rng.integers(0, 50, 30).tolist()) for _ in range(60)))
    learn, test = halves(contexts, 0)
    assert 0.3 < learn.mean() < 0.7
    assert not (test & (contexts.position >= 15) & (contexts.position < 40)).any()
    assert (test & (contexts.position >= 41)).sum() > 0.9 * (~learn & (contexts.position >= 41)).sum()
    # No context of 16 tokens or more stands on both sides.
    seen = {contexts.texts[t].ids[: p + 1] for t, p in zip(contexts.text[learn], contexts.position[learn], strict=True)}
    for t, p in zip(contexts.text[test], contexts.position[test], strict=True):
        assert p < 15 or contexts.texts[t].ids[: p + 1] not in seen


def test_the_order_of_texts_does_not_matter() -> None:
    back = Contexts(CONTEXTS.texts[::-1])
    sides = {t.text: bool(s) for t, s in zip(CONTEXTS.texts, halves(CONTEXTS, 7)[0][CONTEXTS.starts[:-1]], strict=True)}
    again = {t.text: bool(s) for t, s in zip(back.texts, halves(back, 7)[0][back.starts[:-1]], strict=True)}
    assert sides == again


# --- score ---


def test_weights_against_their_definition() -> None:
    rng = np.random.default_rng(3)
    contexts = Contexts(tuple(text_of(rng.integers(0, 12, 30).tolist()) for _ in range(20)))
    active, within = rng.random(600) < 0.1, rng.random(600) < 0.7
    weights = weigh(active, within, contexts)
    on, off = active & within, ~active & within
    n, expected, left = on.sum(), np.zeros(600), 1.0
    same, follows, near = np.zeros((3, 600))
    before = np.where(contexts.position > 0, np.roll(contexts.ids, 1), -1)
    for i in np.flatnonzero(off):
        equal = contexts.ids == contexts.ids[i]
        same[i] = min((equal & on).sum(), (equal & off).sum()) / (equal & off).sum()
        equal = before == before[i]
        follows[i] = min((equal & on).sum(), (equal & off).sum()) / (equal & off).sum()
        near[i] = any(
            on[j] and contexts.text[j] == contexts.text[i] for j in range(max(0, i - 2), min(600, i + 3)) if j != i
        )
    for hard in (same, follows, near):
        share = min(0.3, hard.sum() / n)
        expected += hard / hard.sum() * share
        left -= share
    expected[off] += left / off.sum()
    expected[on] = 1 / n
    assert np.allclose(weights, expected, atol=1e-12)
    assert np.isclose(weights[on].sum(), 1) and np.isclose(weights[off].sum(), 1) and not weights[~within].any()


def test_a_broad_rule_is_worth_little_against_hard_negatives() -> None:
    # Active on one tree in five at random: "a tree" finds all of them and is wrong four times of five.
    trees = holds(lambda i: WORDS[i] in language.TREES)
    active = trees & (np.random.default_rng(5).random(T) < 0.2)
    everywhere = np.where(active, 1 / active.sum(), 1 / (~active).sum())
    plain = score(trees, active, everywhere, CONTEXTS.text)
    hard = score(trees, active, weigh(active, np.ones(T, bool), CONTEXTS), CONTEXTS.text)
    assert 2 * plain.balanced_accuracy - 1 > 0.9
    assert 2 * hard.balanced_accuracy - 1 < 0.7


def test_the_bound_covers() -> None:
    """Texts with rates of their own, so that tokens depend on each other: the bound holds about 95 times in 100."""
    rng, below, runs = np.random.default_rng(6), 0, 400
    text = np.repeat(np.arange(60), 20)
    for _ in range(runs):
        rate = rng.beta(4, 1, 60)[text]  # mean 0.8
        active = rng.random(1200) < 0.3
        predicted = np.where(rng.random(1200) < rate, active, ~active)
        weights = np.where(active, 1 / active.sum(), 1 / (~active).sum())
        below += score(predicted, active, weights, text).low <= 0.8
    assert 0.92 <= below / runs <= 0.995


def test_no_error_on_few_texts_is_not_certainty() -> None:
    active = np.tile([True, False], 40)
    weights = np.full(80, 1 / 40)
    lows = [score(active, active, weights, np.arange(80) // (80 // n)).low for n in (5, 10, 40)]
    assert lows == sorted(lows) and lows[0] < 0.85 and lows[-1] < 0.98


def test_samples_keep_the_weights_on_average() -> None:
    rng = np.random.default_rng(8)
    n = SAMPLED * 6
    active, weights = rng.random(n) < 0.5, rng.random(n)
    for side in (active, ~active):
        weights[side] /= weights[side].sum()
    value, text = rng.random(n) < 0.3, np.zeros(n, dtype=np.int64)
    sample = sampled(active, weights, text, np.random.default_rng(0))
    assert len(sample.rows) <= 2 * SAMPLED
    drawn = np.abs(sample.weights) * value[sample.rows]
    for side in (active, ~active):
        assert abs(drawn[side[sample.rows]].sum() - weights[side & value].sum()) < 0.02
