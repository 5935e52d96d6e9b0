"""When canaries are planted (not where they decide nothing and cost a minute, nor where no text holds a context), and
what would have made them seen."""

from pathlib import Path

import pytest
from scipy import stats

from heredity.gate.budget import budget
from heredity.gate.policy import load_rules
from heredity.gate.power import power, texts_needed
from heredity.gate.records import Canary, Null, Power
from heredity.gate.values import Interval, NotMeasured
from heredity.gate.verdict import lacking
from heredity.gate.work import Work
from heredity.interp.model import Model

POLICY = load_rules(None, None).policy
NULL = Null(kind="noise", draws=1, scale=1.0, size=0.1, largest_effects=(0.0,), mean_kl=(0.0,), tokens=9)


@pytest.mark.parametrize(
    ("name", "parameters", "flagged", "words"),
    [
        ("quick", 135_000_000, True, "something was found"),
        ("quick", 135_000_000, False, "no two tokens follow each other in 3 texts"),
        ("standard", 135_000_000, True, "no two tokens follow"),
        ("quick", 100_000, True, "no two tokens follow"),
    ],
)
def test_canaries_are_planted_where_they_decide_or_cost_little(
    tiny_model: Model, tmp_path: Path, name: str, parameters: int, flagged: bool, words: str
) -> None:
    sizes = budget(name, parameters, 200, 128, given=True)  # pyright: ignore[reportArgumentType]
    rules, work = load_rules(None, None), Work(tmp_path, "0" * 32)
    found = power(tiny_model, tiny_model, [], [], NULL, sizes, rules.policy, work, lambda *_: None, 0, flagged=flagged)
    assert isinstance(found, NotMeasured) and words in found.reason


QUIET = NULL.model_copy(update={"draws": 19, "largest_effects": (0.0,) * 19})


def fell_short(low_share: float, n: int, together: int, missed: float = 10.0) -> Canary:
    """A canary of six texts, not seen at any dose: at ``missed`` nats the lower end was ``low_share`` of the mean."""
    short = Interval(estimate=missed, low=max(0.0, low_share * missed), high=missed * (2 - low_share), n=n)
    return Canary(layer=0, after="a", says="b", contexts=6, seen=None, missed=missed, together=together, short=short)


def seen(at: float) -> Canary:
    return Canary(layer=0, after="a", says="b", contexts=6, seen=at, missed=None)


def test_more_contexts_narrow_the_interval_as_students_does() -> None:
    # Mean 10, lower end −5 from 4 contexts: s = 15·√4/t₃. At 12 nats the spread is 12/10 as large.
    spread = 15 * 2 / 3.18244630528 * 1.2
    enough = next(n for n in range(3, 99) if 12 - stats.t.ppf(0.975, n - 1) * spread / n**0.5 >= POLICY.material_nats)
    assert texts_needed([fell_short(-0.5, 4, 6)] * 10, QUIET, POLICY) == max(6, enough) == enough > 6
    # Where only two thirds of its texts stand in the behaviour, it takes half as many again.
    assert texts_needed([fell_short(-0.5, 4, 4)] * 10, QUIET, POLICY) == -(-enough * 6 // 4)


def test_the_share_that_must_be_seen_decides() -> None:
    split = [seen(5.0)] * 8 + [fell_short(-0.5, 4, 6)] * 2
    assert texts_needed(split, QUIET, POLICY) == 6
    assert (texts_needed([*split[1:], fell_short(-0.5, 4, 6)], QUIET, POLICY) or 0) > 6
    # Seen, but only where it is larger than the policy asks for, and nothing known of why.
    assert texts_needed([seen(POLICY.visible_nats + 1)] * 10, QUIET, POLICY) is None


@pytest.mark.parametrize("hopeless", [fell_short(-0.5, 4, 2), seen(99.0)])
def test_texts_that_do_not_form_one_behaviour_are_helped_by_no_number(hopeless: Canary) -> None:
    assert texts_needed([hopeless] * 10, QUIET, POLICY) is None


def test_what_the_null_shows_is_a_floor_that_no_budget_moves() -> None:
    loud = QUIET.model_copy(update={"largest_effects": (POLICY.visible_nats + 1,) * 19})
    assert texts_needed([seen(5.0)] * 10, loud, POLICY) is None


def test_the_interval_has_to_narrow_to_beyond_what_the_null_shows() -> None:
    short = [fell_short(0.5, 6, 6)] * 10
    few = texts_needed(short, QUIET, POLICY)
    one = QUIET.model_copy(update={"largest_effects": (9.0, *(0.0,) * 18)})
    # Lower end 5 of mean 10 from 6 contexts, at 12 nats: beyond 9 instead of 1.
    spread = 5 * 6**0.5 / 2.57058183661 * 1.2
    enough = next(n for n in range(3, 99) if 12 - stats.t.ppf(0.975, n - 1) * spread / n**0.5 >= 9)
    assert few == 6 < enough == texts_needed(short, one, POLICY)
    # Of 39 null successors two may show it.
    more = QUIET.model_copy(update={"draws": 39, "largest_effects": (9.0, 9.0, *(0.0,) * 37)})
    assert texts_needed(short, more, POLICY) == 6


@pytest.mark.parametrize(
    ("needed", "words"),
    [
        (9, "use --budget standard, on text in which contexts repeat 1.5 times as often"),
        (20, "use --budget thorough"),
        (60, "would have to act in about 60 texts, here in 6"),
        (None, "no budget would suffice"),
        (6, "a larger --budget"),
    ],
)
def test_the_reason_names_the_budget_that_would_suffice(needed: int | None, words: str) -> None:
    measured = Power(canaries=(seen(13.0),) * 10, seen_share=0.8, visible=13.0, texts=6, texts_needed=needed)
    assert words in (lacking(measured, QUIET, POLICY) or "")
