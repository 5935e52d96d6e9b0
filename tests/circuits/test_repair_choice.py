"""Which of the edits tried is taken."""

from heredity.circuits.repair import FREE, MARGIN, Tried, preferred

TARGET = 0.9
BEYOND = TARGET + MARGIN * (1 - TARGET)


def tried(closed: float, cost: float, kept: float = 1.0) -> Tried:
    return Tried("restore", 1.0, 1, closed, cost, kept)


def test_of_free_edits_the_one_that_takes_back_most_and_else_the_cheapest() -> None:
    free, better, dear = tried(BEYOND, FREE / 9), tried(0.99, FREE / 2), tried(1.0, 9 * FREE)
    assert preferred([free, better, dear], TARGET) is better
    assert preferred([tried(0.5, 0.0), dear, tried(0.99, 2 * FREE)], TARGET).cost == 2 * FREE


def test_a_free_edit_at_the_target_goes_before_a_costly_one_beyond_it() -> None:
    short, costly = tried(0.924, FREE / 9), tried(0.96, 50 * FREE)
    assert preferred([costly, short], TARGET) is short
    assert preferred([costly, tried(0.89, FREE / 9)], TARGET) is costly
    # Not one that takes a declared behaviour with it.
    assert preferred([costly, tried(0.924, FREE / 9, kept=0.5)], TARGET) is costly


def test_an_edit_that_misses_the_target_is_applied_only_where_it_costs_nothing() -> None:
    assert tried(0.91, 50 * FREE).pays(TARGET) and tried(0.5, FREE / 2).pays(TARGET)
    assert not tried(0.5, 50 * FREE).pays(TARGET)
    # Nor one that takes a declared behaviour with it, whatever it costs.
    assert not tried(0.99, 0.0, kept=0.5).pays(TARGET)


def test_where_none_reaches_the_target_the_one_that_takes_back_most_and_keeps_what_was_declared() -> None:
    some, more, harmful = tried(0.4, 0.1), tried(0.6, 0.1), tried(0.8, 0.0, kept=0.1)
    assert preferred([some, harmful, more], TARGET) is more
