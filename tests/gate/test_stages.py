"""How far a successor drifted, beside a behaviour that is itself a large part of the text."""

import numpy as np
import pytest

from heredity.circuits.behaviours import MOST_EPISODES, Piece
from heredity.circuits.divergence import TextScan
from heredity.gate.stages import Scanned
from heredity.interp.model import Encoded

TOKENS = 40
FIRST = 10
DRIFT = np.random.default_rng(0).exponential(0.004, (400, TOKENS))


def scanned(count: int, *, said: int, hot: float, wide: int = 4) -> Scanned:
    """``count`` texts that drift, with an episode of ``hot`` nats in each, in ``said`` kinds."""
    pieces = []
    for i in range(count):
        kl = DRIFT[i % len(DRIFT)].copy()
        kl[FIRST : FIRST + wide] = hot
        kind = 1000 * (1 + i % said)
        # What is said, instead of what, and after what: all of a kind's episodes are alike, two kinds share nothing.
        top_s, top_p, ids = ([base + kind] * TOKENS for base in (1, 2, 3))
        names = ("reverse", "p_successor", "p_successor_in_parent", "p_parent", "p_parent_in_successor", "surprise")
        columns = {name: [0.0] * TOKENS for name in names} | {"surprise_parent": [0.0] * TOKENS}
        scan = TextScan(
            text_id=str(i),
            position=list(range(TOKENS)),
            position_parent=list(range(TOKENS)),
            kl=kl.tolist(),
            top_successor=top_s,
            top_parent=top_p,
            **columns,  # pyright: ignore
        )
        read = Encoded("x" * TOKENS, tuple(ids), tuple((k, k + 1) for k in range(TOKENS)))
        pieces.append(Piece("corpus", read, read, scan))
    return Scanned(pieces, {}, {})


def elsewhere(count: int, wide: int = 4) -> float:
    return float(np.percentile(np.delete(DRIFT[:count], np.arange(FIRST, FIRST + wide), axis=1), 95))


def test_a_behaviour_on_a_tenth_of_the_text_does_not_set_the_size_of_its_own_null() -> None:
    found = scanned(60, said=1, hot=9.0)
    assert found.bulk == 9.0
    size, left_out = found.drifted
    assert size == pytest.approx(elsewhere(60), rel=1e-12) and left_out == pytest.approx(0.1)


def test_damage_that_is_many_things_each_seldom_does() -> None:
    found = scanned(60, said=6, hot=9.0)
    assert found.drifted == (9.0, 0.0)


def test_two_frequent_behaviours_are_both_left_out_and_a_rare_third_is_not() -> None:
    two, third = scanned(120, said=2, hot=9.0, wide=8), scanned(3, said=3, hot=20.0)
    rare = [piece for piece in third.pieces if piece.successor.ids[0] == 3003]
    size, left_out = Scanned([*two.pieces, *rare], {}, {}).drifted
    assert left_out == pytest.approx(120 * 8 / (121 * TOKENS))
    assert size == pytest.approx(elsewhere(120, 8), rel=0.05)


def test_a_drift_without_episodes_is_its_percentile() -> None:
    found = scanned(60, said=1, hot=0.2)
    assert found.drifted == (0.2, 0.0)


def test_more_episodes_than_can_be_clustered_are_judged_by_a_part_of_the_text() -> None:
    count = MOST_EPISODES + 200
    size, left_out = scanned(count, said=1, hot=9.0).drifted
    assert left_out == pytest.approx(0.1)
    assert size == pytest.approx(elsewhere(400), rel=0.05)
