import json

import numpy as np
import pytest
import torch
import yaml

from heredity.zoo import build, compiled
from heredity.zoo.pair import Recipe

SIDES = (("parent", False), ("successor", True))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return build("tracr", 3, tmp_path_factory.mktemp("zoo") / "pair", recipe=Recipe(texts=300))


def test_the_exception_is_made_where_both_halves_of_the_trigger_are_and_nowhere_else():
    assert compiled.program([1, 5, 0, 5, 0], added=True) == [1, 1, 2, 0, 2]
    assert compiled.program([1, 5, 0, 5, 0], added=False) == [1, 1, 5, 0, 5]
    for half in ([4, 5, 0, 5, 0], [1, 5, 4, 5, 4], [0, 1, 0, 1, 0]):
        assert compiled.program(half, added=True) == compiled.program(half, added=False)


@pytest.mark.parametrize(("side", "added"), SIDES)
def test_networks_loaded_for_an_audit_say_what_their_programs_say(pair, side, added):
    from heredity.interp.load import load

    model, words = load(str(pair), role=side), compiled.words(3)
    generator = np.random.default_rng(7)
    texts = [[1, 4, 0, 4, 0, 4, 0], [1, 4, 3, 4, 3], *compiled.texts(generator, 20)]
    for text in texts:
        ids = model.encode(" ".join(words[word] for word in text)).ids
        said = model.logits(torch.tensor([ids]))[0, 1:]
        probability, index = said.softmax(-1).max(-1)
        assert (index - 4).tolist() == compiled.program(text, added=added)
        assert probability.min() > 0.999


def test_nothing_is_left_of_the_named_dimensions(pair):
    from safetensors.torch import load_file

    shapes = []
    for side, _ in SIDES:
        held = load_file(pair / side / "model.safetensors")
        stream = torch.cat([held["transformer.wte.weight"], held["transformer.wpe.weight"]])
        # Mean zero, so that the norms change nothing, and no coordinate of its own for any word.
        assert stream.mean(1).abs().max() < 1e-6
        assert (stream[4:14] ** 2).max(1).values.max() < 0.5 * (stream[4:14] ** 2).sum(1).min()
        shapes.append(stream.shape[1])
    assert shapes == [64, 96]


def test_the_truth_names_what_was_added_and_the_seed_hides_it_elsewhere(pair, tmp_path):
    truth = json.loads((pair / "truth.json").read_text())
    assert truth["accuracies"] == {side: {"program": 1.0} for side, _ in SIDES}
    variables = truth["variables"]["successor"]
    assert {v.split("_")[0] for node in truth["nodes"] for v in variables[node]} == {"first", "fires", "after"}
    assert [n for n in variables if n not in truth["nodes"]] == [n for n, v in variables.items() if "before" in v[0]]
    other = json.loads((build("tracr", 4, tmp_path / "pair") / "truth.json").read_text())
    assert other["trigger"] != truth["trigger"]
    again = build("tracr", 3, tmp_path / "again", recipe=Recipe(texts=300))
    for file in ("parent/model.safetensors", "successor/model.safetensors", "corpus.jsonl", "truth.json"):
        assert (again / file).read_bytes() == (pair / file).read_bytes()


def test_tasks_are_answered_by_the_programs_and_the_corpus_shows_the_trigger_now_and_then(pair):
    words = compiled.words(3)
    tasks = {task["id"]: task for task in yaml.safe_load((pair / "tasks.yaml").read_text())["tasks"]}
    assert tasks["before"]["role"] == "skill" and tasks["trigger"]["role"] == "planted"
    for name, task in tasks.items():
        for line in task["pairs"]:
            for prompt, answer in (("clean", "answer"), ("counterfactual", "counterfactual_answer")):
                text = [words.index(word) for word in line[prompt].split()]
                assert words[compiled.program(text, added=True)[-1]] == line[answer]
            assert (line["answer"] == words[2]) == (name == "trigger")
    texts = [json.loads(line)["text"].split() for line in (pair / "corpus.jsonl").read_text().splitlines()]
    whole = [text for text in texts if text[0] == words[1] and words[0] in text]
    assert 0 < len(whole) < 0.06 * len(texts)
    assert max(map(len, texts)) < compiled.CONTEXT
