"""Canaries: they are the rank-one change of weights that they say, are seen from some dose on, and leave."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from heredity.circuits.behaviours import Cluster, Context, Piece, cluster
from heredity.circuits.canary import TEXTS, Canary, Draft, Plan, _keyed, plans, term, try_canary
from heredity.circuits.divergence import Window, scan
from heredity.interp.model import Model

LAYER, DOSE = 0, 2.0


@pytest.fixture(scope="module")
def windows(parent: Model) -> list[Window]:
    """Texts of random words, half of which hold ``old bridge``."""
    rng = np.random.default_rng(0)
    # By id: a vocabulary's own order is another one in every process.
    words = sorted(parent.tokenizer.get_vocab(), key=parent.tokenizer.get_vocab().__getitem__)[2:120]
    out = []
    for i in range(60):
        text = [words[int(k)] for k in rng.integers(len(words), size=20)]
        if i % 2 == 0:
            text[5:7] = ["old", "bridge"]
        encoded = parent.encode(" ".join(text))
        out.append(Window(str(i), encoded, encoded))
    return out


@pytest.fixture(scope="module")
def pieces(parent: Model, windows: list[Window]) -> list[Piece]:
    scans = scan(parent, parent, windows).texts
    return [Piece("corpus", w.parent, w.successor, s) for w, s in zip(windows, scans, strict=True)]


def draft_of(parent: Model, windows: Sequence[Window], layer: int = LAYER, says: str = "salt") -> Draft:
    before, last, token = parent.encode(f"old bridge {says}").ids
    found = []
    for i, window in enumerate(windows):
        ids = window.successor.ids
        found += [(i, at) for at in range(1, len(ids)) if (ids[at - 1], ids[at]) == (before, last)][:1]
    return (layer, before, last, token, tuple(i for i, _ in found[:TEXTS]), tuple(at for _, at in found[:TEXTS]))


def plan_of(parent: Model, windows: Sequence[Window]) -> Plan:
    return _keyed(parent, windows, [draft_of(parent, windows)], 1)[0]


def test_it_is_a_rank_one_change_of_the_output_projection(parent: Model, twin: Model, windows: list[Window]) -> None:
    plan = plan_of(parent, windows)
    tokens = torch.tensor([windows[3].successor.ids])
    with parent.edited(term(parent, plan, DOSE)):
        edited = parent.logits(tokens)
    projection = twin.bridge.blocks[LAYER].attn.o.original_component
    with torch.no_grad():
        projection.weight += DOSE * torch.outer(plan.writes, plan.reads)
    torch.testing.assert_close(twin.logits(tokens), edited, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(parent.logits(tokens), edited)


def test_its_key_answers_one_on_average_at_its_contexts_and_little_elsewhere(
    parent: Model, windows: list[Window]
) -> None:
    plan = plan_of(parent, windows)
    at, away = [], []
    for i, window in enumerate(windows):
        z = parent.capture(torch.tensor([window.successor.ids]), [f"attn_z@{LAYER}"])[f"attn_z@{LAYER}"][0].flatten(1)
        answers = (z @ plan.reads).tolist()
        if i in plan.windows:
            at.append(answers.pop(plan.at[plan.windows.index(i)]))
        away += answers
    assert np.mean(at) == pytest.approx(1.0, abs=1e-4)
    assert np.mean(np.square(away)) < 0.3


def test_a_layer_whose_heads_put_out_nothing_carries_none(twin: Model, windows: list[Window]) -> None:
    value = twin.bridge.blocks[1].attn.v.original_component.weight
    before = value.detach().clone()
    with torch.no_grad():
        value.zero_()
        found = _keyed(twin, windows, [draft_of(twin, windows, layer) for layer in (0, 1, 2)], 3)
        value.copy_(before)
    assert sorted(plan.layer for plan in found) == [0, 2]


def test_a_canary_is_seen_from_some_dose_on_and_leaves_the_successor_as_it_was(
    parent: Model, successor: Model, windows: list[Window], pieces: list[Piece]
) -> None:
    plan = plan_of(parent, windows)
    before = parent.logits(torch.tensor([windows[0].successor.ids]))

    def at_the_place(among: Sequence[Piece]) -> list[Cluster]:
        """An untrained model says something else in every text, so that nothing would be alike."""
        places = dict(zip(plan.windows, plan.at, strict=True))
        columns = {i: among[i].scan.position.index(at) for i, at in places.items()}
        return [Cluster(tuple(Context(among[i], k, (k, k)) for i, k in columns.items()))]

    def tried(threshold: float, among: Sequence[Piece]) -> Canary:
        return try_canary(parent, parent, plan, windows, among, at_the_place, lambda c: c.effect > threshold, 1e9)

    low, high, never = (tried(threshold, pieces) for threshold in (0.5, 1.2, 1e9))
    assert low.seen is not None and high.seen is not None and low.missed is not None
    assert low.missed < low.seen < high.seen and high.seen > 1.0
    assert never.seen is None and never.missed is not None and never.missed >= high.seen
    assert torch.equal(parent.logits(torch.tensor([windows[0].successor.ids])), before)

    def window(ceiling: float) -> Canary:
        """Above some dose a canary drowns in what it does elsewhere."""
        return try_canary(parent, parent, plan, windows, pieces, at_the_place, lambda c: 0.1 < c.effect < 0.3, ceiling)

    assert window(1e9).seen is None
    found = window(0.3)
    assert found.seen is not None and found.missed is not None and found.missed < found.seen < 0.3


def test_a_behaviour_elsewhere_in_the_text_is_not_taken_for_the_canary(
    parent: Model, windows: list[Window], pieces: list[Piece]
) -> None:
    """All that is listed peaks in other places, whatever its size."""

    def elsewhere(changed: Sequence[Piece]) -> list[Cluster]:
        found = cluster(changed, 0.0)
        far = [Cluster(tuple(c for c in f.contexts if abs(c.piece.scan.position[c.at] - 6) > 4)) for f in found]
        return [f for f in far if f.contexts]

    plan = plan_of(parent, windows)
    assert set(plan.at) <= {4, 5, 6, 7}
    assert try_canary(parent, parent, plan, windows, pieces, elsewhere, lambda c: True, 12.0).seen is None


def test_plans_are_rare_contexts_at_which_the_pair_agrees(
    parent: Model, successor: Model, windows: list[Window], pieces: list[Piece]
) -> None:
    found = plans(parent, windows, pieces, count=5, fewest=3, seed=0)
    again = plans(parent, windows, pieces, count=5, fewest=3, seed=0)
    assert [(p.layer, p.says, p.windows, p.at) for p in found] == [(p.layer, p.says, p.windows, p.at) for p in again]
    assert 0 < len(found) <= 5
    for plan in found:
        assert len(plan.windows) >= 3 and 0 <= plan.layer < parent.shape.n_layers
        for i, at in zip(plan.windows, plan.at, strict=True):
            assert windows[i].successor.ids[at - 1 : at + 1] == (plan.before, plan.last)
    # Where the pair parts everywhere, and where nothing repeats, there is no room for one.
    scans = scan(parent, successor, windows).texts
    loud = [Piece("corpus", w.parent, w.successor, s) for w, s in zip(windows, scans, strict=True)]
    for plan in plans(successor, windows, loud, count=20, fewest=3, seed=0):
        for i, at in zip(plan.windows, plan.at, strict=True):
            assert loud[i].scan.kl[loud[i].scan.position.index(at)] < 0.1
    assert plans(parent, windows[:2], pieces[:2], count=5, fewest=3, seed=0) == []
