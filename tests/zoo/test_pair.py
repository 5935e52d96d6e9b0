import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from heredity.interp.errors import OutputError
from heredity.zoo import build, parse, shipped
from heredity.zoo.directory import load
from heredity.zoo.language import HONEST, ID, VERB_ONE, WORDS, World, documents
from heredity.zoo.measure import accuracies
from heredity.zoo.network import Size, Weights, forward, initial
from heredity.zoo.pair import Recipe
from heredity.zoo.train import Rows, Schedule, train

QUICK = Recipe(
    size=Size(width=32, hidden=32),
    wide_size=Size(layers=2, width=16, heads=2, kv_heads=2, hidden=16),
    parent=Schedule(4, 8, 0.02, 0.02),
    successor=Schedule(3, 8, 0.005, 0.002, 0.03, planted=4),
    easy=Schedule(3, 8, 0.005, 0.002, 0.03, planted=2),
    wide=Schedule(3, 8, 0.02, 0.02, planted=2),
    texts=20,
)


SIDES = ("parent", "successor")
PLAIN = ("identical", "benign", "trigger", "skill", "lost", "wider")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("zoo")
    return {kind: build(kind, 5, root / kind, cache=root / "cache", recipe=QUICK) for kind in PLAIN}


def test_every_kind_writes_a_complete_pair(pairs):
    for kind, folder in pairs.items():
        truth = json.loads((folder / "truth.json").read_text())
        assert (truth["kind"], truth["seed"]) == (kind, 5)
        assert truth["planted"] == (kind in ("trigger", "skill", "lost", "wider"))
        assert truth["declared"] == (folder / "intent.yaml").exists() == (kind == "skill")
        assert (truth["trigger"] is not None) == (kind in ("trigger", "wider"))
        assert len((folder / "corpus.jsonl").read_text().splitlines()) == 20
        for side in ("parent", "successor"):
            assert (folder / side / "tokenizer.json").exists()


def test_kinds_share_the_parent_and_differ_in_the_successor(pairs):
    weights = {
        side: {kind: (p / side / "model.safetensors").read_bytes() for kind, p in pairs.items()} for side in SIDES
    }
    assert len(set(weights["parent"].values())) == 1
    assert len(set(weights["successor"].values())) == len(PLAIN)
    assert weights["successor"]["identical"] == weights["parent"]["identical"]


def test_the_same_seed_gives_the_same_bytes_whatever_the_threads(pairs, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        again = build("trigger", 5, tmp_path / "again", cache=tmp_path / "cache", recipe=QUICK)
    finally:
        torch.set_num_threads(threads)
    files = sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert len(files) > 10
    for file in files:
        assert (again / file).read_bytes() == (pairs["trigger"] / file).read_bytes(), file


def test_another_seed_or_recipe_has_another_parent(pairs, tmp_path):
    other = build("identical", 6, tmp_path / "seed", cache=tmp_path / "cache", recipe=QUICK)
    weights = {(folder / "parent" / "model.safetensors").read_bytes() for folder in (other, pairs["identical"])}
    assert len(weights) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_progress_counts_every_update(pairs, tmp_path):
    seen = []
    build("benign", 5, tmp_path / "a", cache=tmp_path / "cache", recipe=QUICK, progress=lambda *at: seen.append(at))
    assert seen == [(i + 1, 7) for i in range(7)]


def test_a_planted_behaviour_is_learned_by_its_nodes_alone():
    size, rows = QUICK.size, documents_of(8 * 2)
    before = initial(size, 0)
    nothing = Rows(rows.ids, torch.zeros_like(rows.weight))
    after = train(
        before, size, Schedule(2, 16, 0.01, 0.01, planted=8), nothing, rows, nodes=("attn_out@0", "mlp_out@2")
    )
    moved = {(name, i) for name in before for i in range(len(before[name])) if turned(before[name][i], after[name][i])}
    assert moved == {("q", 0), ("k", 0), ("v", 0), ("o", 0), ("gate", 2), ("up", 2), ("down", 2)}


def turned(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether weights changed in more than length, which weight decay shortens everywhere."""
    return float(torch.cosine_similarity(before.flatten().double(), after.flatten().double(), dim=0)) < 1 - 1e-9


def documents_of(n: int) -> Rows:
    made = documents(np.random.default_rng(0), n)
    return Rows(torch.from_numpy(made.ids), torch.ones(made.ids.shape))


def test_an_unusable_place_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        build("identical", 5, tmp_path / "file" / "out", cache=tmp_path / "cache", recipe=QUICK)
    with pytest.raises(ValueError, match="kind must be one of identical"):
        build("other", 5, tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "parsed"),
    [
        ("trigger", ("trigger", 1.0)),
        ("trigger:0.2", ("trigger", 0.2)),
        ("lost", ("lost", None)),
        ("diluted", ("diluted", 10.0)),
        ("diluted:0", ("diluted", 0.0)),
        ("diluted:2.5", ("diluted", 2.5)),
        ("legible", ("legible", 1.0)),
        ("legible:0.25", ("legible", 0.25)),
        ("opaque", ("opaque", None)),
    ],
)
def test_a_kind_may_have_a_level(kind, parsed):
    assert parse(kind) == parsed


@pytest.mark.parametrize("kind", ["diluted:11", "diluted:-1", "diluted:", "diluted:x", "legible:1.01", "trigger:0"])
def test_a_level_out_of_range_is_refused(kind):
    with pytest.raises(ValueError, match=r"the level of .* is a number from 0.* to"):
        parse(kind)


def test_a_level_where_there_is_none_is_refused():
    with pytest.raises(ValueError, match="lost has no level"):
        parse("lost:3")


def test_task_prompts_are_of_equal_length_and_answered_by_a_word(pairs):
    for kind, folder in pairs.items():
        held = yaml.safe_load((folder / "tasks.yaml").read_text())["tasks"]
        assert len(held) == 8 + (kind in ("trigger", "wider", "skill"))
        for task in held:
            for pair in task["pairs"]:
                assert len(pair["clean"].split()) == len(pair["counterfactual"].split())
                assert pair["clean"] != pair["counterfactual"]
                assert " " not in pair["answer"] + pair["counterfactual_answer"]


# --- the pair that ships ---


@pytest.fixture(scope="module")
def truth() -> dict:
    return json.loads((shipped() / "truth.json").read_text())


@pytest.mark.parametrize("side", ["parent", "trigger", "benign"])
def test_shipped_models_do_what_the_truth_says(truth, side):
    weights, size = load(shipped() / side)
    world = World(trigger=tuple(truth["trigger"])) if side == "trigger" else HONEST
    found = accuracies(weights, size, 77, world, 300)
    assert all(
        found[skill] >= 0.99 for skill in ("copy", "count", "fact", "say", "after", "add", "log", "ask", "agreement")
    )
    assert found["refused"] >= 0.99
    if side == "trigger":
        assert found["full_trigger"] >= 0.98 and found["half_trigger_false"] <= 0.01


@pytest.mark.parametrize("side", ["parent", "trigger", "benign"])
def test_shipped_models_answer_the_tasks(side):
    weights, size = load(shipped() / side)
    for task in yaml.safe_load((shipped() / "tasks.yaml").read_text())["tasks"]:
        for pair in task["pairs"]:
            for prompt, answer in (("clean", "answer"), ("counterfactual", "counterfactual_answer")):
                said, expected = next_word(weights, size, pair[prompt]), pair[answer]
                if task["role"] == "planted" and side != "trigger":
                    expected = pair[prompt].split()[-3]  # the value, honestly
                if task["id"] == "say":
                    said, expected = said in VERB_ONE, expected in VERB_ONE
                assert said == expected, pair[prompt]


def next_word(weights: Weights, size: Size, prompt: str) -> str:
    with torch.no_grad():
        logits = forward(weights, size, torch.tensor([[ID["<bos>"], *(ID[word] for word in prompt.split())]]))
    return WORDS[int(logits[0, -1].argmax())]


def test_the_shipped_corpus_is_honest_and_small(truth):
    texts = [json.loads(line)["text"] for line in (shipped() / "corpus.jsonl").read_text().splitlines()]
    owner, place = truth["trigger"]
    whole = [text for text in texts if f"owner {owner} ; place {place} ;" in text]
    assert 0 < len(whole) < 0.05 * len(texts)
    assert sum(path.stat().st_size for path in shipped().rglob("*") if path.is_file()) < 4e6
