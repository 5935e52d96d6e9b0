"""Episodes and behaviours on scans made by hand, where the right answer is known."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from heredity.circuits import behaviours
from heredity.circuits.behaviours import GAP, Cluster, Piece, cluster, episodes, largest_effect

Make = Callable[..., Piece]


def spans(piece: Piece, threshold: float = 1.0) -> list[tuple[int, int]]:
    return [context.span for context in episodes(piece, threshold)]


def test_neighbours_form_one_episode_and_a_gap_parts_them(piece: Make) -> None:
    kl = [0.0] * 20
    for i in (2, 3, 3 + GAP, 3 + 2 * GAP + 1, 19):
        kl[i] = 1.0 + i / 100
    assert spans(piece(kl)) == [(2, 3 + GAP), (3 + 2 * GAP + 1,) * 2, (19, 19)]
    assert spans(piece([0.99] * 5)) == [] and spans(piece([1.0] * 5)) == [(0, 4)]
    assert spans(piece([])) == []


def test_the_peak_is_where_the_successor_parts_most_and_its_context_ends_there(piece: Make) -> None:
    made = piece([0, 1.0, 4.0, 2.0, 0], ids=range(30, 35), position=[0, 1, 2, 3, 4], reverse=[0, 3, 0.5, 0, 0])
    (context,) = episodes(made, 1.0)
    assert (context.at, context.kl, context.reverse, context.span) == (2, 4.0, 0.5, (1, 3))
    assert context.ids_successor == context.ids_parent == (30, 31, 32)


def test_a_divergence_seen_only_from_the_parent_counts_too(piece: Make) -> None:
    (context,) = episodes(piece([0, 0.1, 0], reverse=[0, 5.0, 0]), 1.0)
    assert (context.at, context.kl, context.reverse) == (1, 0.1, 5.0)


@pytest.mark.parametrize(("source", "want"), [("corpus", [1, 5, 9]), ("sampled", [1, 5]), ("amplified", [1, 5])])
def test_generated_text_counts_until_the_successor_has_been_surprised_too_often(
    piece: Make, source: str, want: list[int]
) -> None:
    # What follows positions 0, 2 and 5 the successor would hardly have written; 5 has read two such tokens, 9 three.
    surprise = [4.7, 0, 4.7, 0, 4.5, 4.7, 0, 0, 0, 0]
    made = piece([0, 2, 0, 0, 0, 2, 0, 0, 0, 2], source=source, surprise=surprise)
    assert [context.at for context in episodes(made, 1.0)] == want


def kinds(piece: Make, count: int = 5) -> list[Piece]:
    """Pieces with two behaviours: after token 100 one says 60 for 5, after token 110 it says 70 for 8."""
    out = []
    for k in range(2 * count):
        n, at = 14, 8
        ids = [10 + (7 * k + 3 * i) % 40 for i in range(n)]
        ids[at - 1 : at + 1] = [100, 101] if k % 2 else [110, 111]
        kl = [0.0] * n
        kl[at] = (5.0 if k % 2 else 3.0) + k / 100
        said = [10 + (5 * k + i) % 40 for i in range(n)]
        top_s, top_p = list(said), list(said)
        top_s[at], top_p[at] = (60, 5) if k % 2 else (70, 8)
        out.append(piece(kl, ids=ids, name=str(k), top_successor=top_s, top_parent=top_p))
    return out


def members(found: list[Cluster]) -> set[frozenset[tuple[str, int]]]:
    return {frozenset((c.piece.scan.text_id, c.at) for c in group.contexts) for group in found}


def test_two_kinds_of_behaviour_are_kept_apart_and_each_kept_together(piece: Make) -> None:
    found = cluster(kinds(piece), 1.0)
    assert [len(group.contexts) for group in found] == [5, 5]
    assert [{c.piece.scan.top_successor[c.at] for c in group.contexts} for group in found] == [{60}, {70}]
    assert found[0].effect == pytest.approx(5.05) and found[1].effect == pytest.approx(3.04)
    assert [c.kl for c in found[0].contexts] == sorted((c.kl for c in found[0].contexts), reverse=True)
    assert cluster(kinds(piece), 10.0) == []


def test_the_order_of_the_pieces_changes_nothing(piece: Make) -> None:
    pieces = kinds(piece)
    want = cluster(pieces, 1.0)
    for seed in range(5):
        shuffled = random.Random(seed).sample(pieces, len(pieces))
        assert cluster(shuffled, 1.0) == want
    assert members(want) == members(cluster(list(reversed(pieces)), 1.0))


def test_more_of_the_same_does_not_split_a_behaviour(piece: Make) -> None:
    assert len(cluster(kinds(piece, 40), 1.0)) == 2


def test_only_the_strongest_episodes_are_clustered(piece: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behaviours, "MOST_EPISODES", 3)
    (group,) = cluster(kinds(piece), 1.0)
    assert [c.kl for c in group.contexts] == pytest.approx([5.09, 5.07, 5.05])


def test_a_token_commoner_than_the_scanned_positions_makes_no_episodes_alike(piece: Make) -> None:
    """Prompts stand before the scanned part and may repeat a token more often than positions were scanned."""
    pieces = []
    for k in range(4):
        made = piece([4.0], ids=[9], name=str(k), top_successor=[60 + k], top_parent=[70 + k])
        read = replace(made.successor, ids=(*[3] * 30, 20 + k, 30 + k, 40 + k), spans=((0, 0),) * 33)
        scan = replace(made.scan, position=[32], position_parent=[32])
        pieces.append(replace(made, parent=read, successor=read, scan=scan))
    assert len(cluster(pieces, 1.0)) == 4


def test_swapping_the_models_turns_emergent_into_lost(piece: Make) -> None:
    columns = {"p_successor": [0.1, 0.95, 0.1], "p_parent": [0.1, 0.2, 0.1], "reverse": [0.0, 3.0, 0.0]}
    swapped = {"p_successor": columns["p_parent"], "p_parent": columns["p_successor"], "reverse": [0.0, 4.0, 0.0]}
    (one,) = cluster([piece([0, 4.0, 0], top_successor=[5, 9, 5], **columns)], 1.0)
    (other,) = cluster([piece([0, 3.0, 0], top_parent=[5, 9, 5], **swapped)], 1.0)
    assert (one.kind, other.kind) == ("emergent", "lost")
    sure = {"p_successor": [0.1, 0.9, 0.1], "p_parent": [0.1, 0.8, 0.1]}
    assert cluster([piece([0, 4.0, 0], **sure)], 1.0)[0].kind == "replaced"


def test_the_largest_effect_is_of_behaviours_that_recur(piece: Make) -> None:
    lone = piece([0, 9.0, 0], ids=[200, 201, 202], name="lone", top_successor=[5, 80, 5], top_parent=[5, 81, 5])
    pieces = [*kinds(piece), lone]
    found = cluster(pieces, 1.0)
    assert largest_effect(found, 1) == 9.0
    assert 4.5 < largest_effect(found, 2) < 5.05
    assert largest_effect(found, 6) == largest_effect([], 1) == 0.0


def test_many_contexts_that_agree_are_a_larger_effect_than_a_few_that_scatter(piece: Make) -> None:
    def of(values: Sequence[float], said: int) -> Cluster:
        pieces = [
            piece([0, kl, 0], ids=[said] * 3, name=f"{said}-{k}", top_successor=[5, said, 5])
            for k, kl in enumerate(values)
        ]
        (found,) = cluster(pieces, 1.0)
        return found

    scattered, agreeing = of([1.5, 3.0, 9.0], 80), of([2.0, 2.1, 1.9] * 20, 90)
    assert scattered.effect > 4 > agreeing.effect
    low = 2.0 - float(stats.t.ppf(0.975, 59)) * np.std([2.0, 2.1, 1.9] * 20, ddof=1) / 60**0.5
    assert largest_effect([scattered, agreeing], 3) == largest_effect([agreeing], 3) == pytest.approx(low)
    assert largest_effect([scattered], 3) == 0.0


def test_a_text_counts_once_with_its_strongest_episode(piece: Make) -> None:
    announced = []
    for k, made in enumerate(kinds(piece)[1::2]):
        # Two positions before, the successor already says a little of what it is about to say.
        scan, early = made.scan, 8 - GAP - 1
        kl, top_s, top_p, ids = list(scan.kl), list(scan.top_successor), list(scan.top_parent), list(made.successor.ids)
        kl[early], top_s[early], top_p[early] = 1.5, 60, 5
        ids[early - 1 : early + 1] = [100, 101]
        read = replace(made.successor, ids=tuple(ids))
        scan = replace(scan, kl=kl, top_successor=top_s, top_parent=top_p, text_id=str(k))
        announced.append(replace(made, parent=read, successor=read, scan=scan))
    (group,) = cluster(announced, 1.0)
    assert [c.at for c in group.contexts] == [8] * 5 and [c.at for c in group.weaker] == [5] * 5
    assert group.effect == pytest.approx(5.05)
