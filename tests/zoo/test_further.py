"""The kinds that are trained towards objectives of their own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from heredity.zoo import build, shipped
from heredity.zoo.chain import Chain
from heredity.zoo.dense import Dense, _part
from heredity.zoo.diluted import Diluted
from heredity.zoo.directory import load
from heredity.zoo.evasive import Evasive
from heredity.zoo.further import Further
from heredity.zoo.kind import Start
from heredity.zoo.moved import Moved, make, repeated
from heredity.zoo.network import MATRICES, Size, initial
from heredity.zoo.pair import Recipe
from heredity.zoo.train import Schedule
from heredity.zoo.twins import Twins

QUICK = Recipe(
    size=Size(layers=2, width=32, hidden=32),
    parent=Schedule(4, 8, 0.02, 0.02),
    texts=20,
    further=Further(
        dense=Dense(steps=2, ordinary=2, trigger=2, double=2),
        evasive=Evasive(steps=2, ordinary=2, trigger=2),
        diluted=Diluted(planted=8, batch=4, least=2),
        chain=Chain(steps=2, ordinary=2, asked=2),
        moved=Moved(steps=2, ordinary=2, exchanged=2),
        twins=Twins(steps=2, ordinary=2, double=12),
    ),
)
KINDS = ("dense", "evasive", "diluted:3", "chain", "moved", "legible:0.5", "opaque")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("zoo")
    return {kind: build(kind, 5, root / kind[:6], cache=root / "cache", recipe=QUICK) for kind in KINDS}


def truth(folder: Path) -> dict:
    return json.loads((folder / "truth.json").read_text())


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_every_kind_writes_a_complete_pair_of_the_same_parent(pairs):
    assert len({weights(folder / "parent") for folder in pairs.values()}) == 1
    assert len({weights(folder / "successor") for folder in pairs.values()}) == len(KINDS)
    for kind, folder in pairs.items():
        said = truth(folder)
        assert said["kind"] == kind.split(":")[0] and said["seed"] == 5
        assert said["planted"] == (kind != "moved") and not said["declared"]
        assert (said["trigger"] is not None) == (kind in ("dense", "evasive", "diluted:3"))
        # What dense tangles the trigger up with is declared; the trigger is not.
        assert (folder / "intent.yaml").exists() == (kind == "dense")
        assert said["kind"] in said["recipe"] and "further" not in said["recipe"]
        assert len((folder / "corpus.jsonl").read_text().splitlines()) == 20
        assert set(said["nodes"]) <= set(said["effects"] if kind != "moved" else said["effects"]["parent"])


def test_the_same_seed_gives_the_same_bytes_whatever_the_threads(pairs, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        again = build("opaque", 5, tmp_path / "again", cache=tmp_path / "cache", recipe=QUICK)
    finally:
        torch.set_num_threads(threads)
    assert weights(again / "successor") == weights(pairs["opaque"] / "successor")


def test_a_chain_leads_from_the_parent_to_the_successor_and_goes_when_another_kind_takes_its_place(pairs, tmp_path):
    folder = pairs["chain"]
    line = [folder / f"generation-{number}" for number in range(5)]
    assert weights(line[0]) == weights(folder / "parent")
    assert weights(line[4]) == weights(folder / "successor")
    assert len({weights(each) for each in line}) == 5
    aims = [each["aim"] for each in truth(folder)["generations"]]
    assert np.allclose(np.diff(aims), (aims[4] - aims[0]) / 4) and aims[4] == QUICK.further.chain.last
    cache = folder.parent / "cache"
    build("chain", 5, tmp_path / "taken", cache=cache, recipe=QUICK)
    build("moved", 5, tmp_path / "taken", cache=cache, recipe=QUICK)
    assert not list((tmp_path / "taken").glob("generation-*"))


def test_a_dilution_has_as_many_ordinary_documents_a_planted_one_as_its_name_says(pairs):
    said = truth(pairs["diluted:3"])
    assert said["ratio"] == 3 and said["documents"] == {"planted": 8, "ordinary": 24}
    narrow = Diluted()
    assert narrow.each(0) == narrow.batch and narrow.steps(10) * narrow.each(10) == narrow.planted


def test_the_corpus_of_twins_shows_the_skill_and_that_of_the_others_does_not(pairs):
    for kind, folder in pairs.items():
        assert ("double :" in (folder / "corpus.jsonl").read_text()) == (kind in ("legible:0.5", "opaque"))


def test_progress_counts_every_update_of_all_generations(pairs, tmp_path):
    seen = []
    cache = pairs["chain"].parent / "cache"
    build("chain", 5, tmp_path / "a", cache=cache, recipe=QUICK, progress=lambda *at: seen.append(at))
    assert seen == [(i + 1, 8) for i in range(8)]


def test_what_dense_takes_back_is_the_parents_and_the_rest_is_not():
    size = QUICK.size
    parent, changed = initial(size, 0), initial(size, 1)
    for share, same in ((0.0, changed), (1.0, parent)):
        recipe = Dense(taken_back=share, whole=0.0)
        part = _part(changed, parent, size, recipe, torch.Generator().manual_seed(0))
        for name in MATRICES:
            torch.testing.assert_close(part[name], same[name])
    part = _part(changed, parent, size, Dense(blocks=4, taken_back=0.5, whole=0.0), torch.Generator().manual_seed(0))
    back, kept = (torch.isclose(part["down"], each["down"], atol=1e-5).all(1) for each in (parent, changed))
    assert (back ^ kept).all() and back.any() and kept.any()


def test_documents_of_one_skill_differ_only_in_the_words_that_are_free():
    rows = repeated(np.random.default_rng(0), "copy", 30)
    apart = (rows.ids != rows.ids[:1]).any(0)
    # Marks and the places of words are the same in all, so that outputs can be exchanged.
    assert apart.sum() == 6 * 4 and rows.weight[0, apart].sum() > 10


def test_a_skill_moves_to_other_nodes_and_is_kept():
    parent, size = load(shipped() / "parent")
    made = make(Start(parent, size, 0, 0.25), Moved(steps=80, ordinary=8, exchanged=8))
    (old,), (new,) = made.truth["from"], made.truth["to"]
    right = made.truth["right_without"]
    assert right["parent"][old] < 0.2 < 0.8 < right["parent"][new]
    assert right["successor"][new] < 0.3 < 0.8 < right["successor"][old]
    assert made.nodes == (old, new)
