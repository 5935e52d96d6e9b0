"""Task files read, filled, split, tokenised and screened; what is refused, and in which words."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from heredity.circuits.pairs import LogitDifference, NegativeKL, Pairs, ProbabilityDifference
from heredity.circuits.tasks import SHIPPED, load_task, prepare, screen
from heredity.circuits.tasks.prepare import samples
from heredity.circuits.tasks.screen import score
from heredity.interp.errors import TaskError
from heredity.interp.load import load

TASK: dict[str, Any] = {
    "version": 1,
    "name": "who",
    "fillers": {
        "people": ["king", "queen", "child", "friend", "teacher", "doctor", "farmer", "baker", "sailor", "Zanzibar"],
        "places": ["river", "bridge", "town", "house", "garden"],
    },
    "slots": {"A": "people", "B": "people", "P": "places"},
    "single": ["people", "places"],
    "templates": [
        {
            "clean": "the {A} and the {B} went to the {P} . the {B} gave bread to the",
            "counterfactual": "the {A} and the {B} went to the {P} . the {A} gave bread to the",
            "right": " {A}",
            "wrong": [" {B}"],
        },
        {
            "clean": "the {B} and the {A} saw the {P} . the {B} gave milk to the",
            "counterfactual": "the {B} and the {A} saw the {P} . the {A} gave milk to the",
            "right": [" {A}"],
            "wrong": [" {B}"],
        },
    ],
}


@pytest.fixture
def task_file(tmp_path: Path):
    def write(content: Any, name: str = "task.yaml") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


def refusal(function: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(TaskError) as refused:
        function(*arguments, **options)
    return str(refused.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_tasks_fill_their_slots(name: str) -> None:
    task = load_task(name)
    assert task.name == name and task.about and task.source and len(task.sha256) == 64
    for example in samples(task, 40):
        assert "{" not in example.clean + example.counterfactual
        assert example.clean != example.counterfactual and example.right and example.wrong
        assert not set(example.right) & set(example.wrong)
        if name != "docstring":
            words = (example.clean.split(), example.counterfactual.split())
            assert len(words[0]) == len(words[1])


def test_greater_than_asks_for_later_decades() -> None:
    for example in samples(load_task("greater-than"), 30):
        year = example.clean.split()[6]
        assert example.clean.endswith(year[:2]) and example.counterfactual.split()[6][2] == "0"
        assert {answer[0] for answer in example.right} == set("0123456789"[int(year[2]) + 1 :])
        assert {answer[0] for answer in example.wrong} == set("0123456789"[: int(year[2])])


def test_halves_share_no_prompt_and_come_again_with_the_seed(tiny_model, task_file) -> None:
    task = load_task(task_file(TASK))
    one, again, other = (prepare(tiny_model, task, 20, seed=seed) for seed in (3, 3, 4))
    texts = [
        {text for e in half.examples for text in (e.clean, e.counterfactual)} for half in (one.discovery, one.testing)
    ]
    assert not texts[0] & texts[1]
    assert len({e.clean for e in one.discovery.examples}) == 20 == len(one.testing.pairs)
    assert one.discovery.examples == again.discovery.examples != other.discovery.examples
    assert torch.equal(one.testing.pairs.clean, again.testing.pairs.clean)
    origins = [" saw " in e.clean for e in one.discovery.examples]
    assert 3 <= sum(origins) <= 17  # both templates, in both halves


def test_tokens_are_those_of_the_texts_and_the_metric_reads_the_answers(tiny_model, task_file) -> None:
    prepared = prepare(tiny_model, load_task(task_file(TASK)), 8)
    half = prepared.discovery
    assert prepared.dropped == {"people": (1, 10), "places": (0, 5)}  # the tokenizer has no Zanzibar
    assert isinstance(half.metric, LogitDifference)
    logits = tiny_model.logits(half.pairs.clean)
    values = half.metric(logits, torch.arange(8))
    for i, example in enumerate(half.examples):
        ids = tiny_model.encode(example.clean).ids
        assert half.pairs.clean[i, : len(ids)].tolist() == list(ids) and int(half.pairs.last[i]) == len(ids) - 1
        assert tiny_model.encode(example.counterfactual).ids == tuple(half.pairs.corrupt[i, : len(ids)].tolist())
        right, wrong = (tiny_model.encode(answers[0].strip()).ids[0] for answers in (example.right, example.wrong))
        assert half.right[i] == (right,)
        assert float(values[i]) == pytest.approx(float(logits[i, len(ids) - 1, right] - logits[i, len(ids) - 1, wrong]))
        assert half.pairs.first[i] == [a != b for a, b in zip(ids, half.pairs.corrupt[i].tolist(), strict=False)].index(
            True
        )


def test_metrics_by_name_and_by_callable(tiny_model, task_file) -> None:
    probability = prepare(tiny_model, load_task(task_file(TASK | {"metric": "probability"})), 4).testing
    assert isinstance(probability.metric, ProbabilityDifference)
    kl = prepare(tiny_model, load_task(task_file(TASK | {"metric": "kl"})), 4).testing
    assert isinstance(kl.metric, NegativeKL)
    rows = torch.arange(4)
    with torch.no_grad():
        assert kl.metric(tiny_model.logits(kl.pairs.clean), rows).abs().max() < 1e-6
        assert kl.metric(tiny_model.logits(kl.pairs.corrupt), rows).max() < 0
    seen: list[tuple[int, int]] = []

    def own(examples: Any, pairs: Pairs) -> Any:
        seen.append((len(examples), len(pairs)))
        return lambda logits, rows: logits[:, -1, 7]

    half = prepare(tiny_model, load_task(task_file(TASK)), 4, metric=own).testing
    assert seen == [(4, 4), (4, 4)]
    assert score(tiny_model, half).clean == pytest.approx(float(tiny_model.logits(half.pairs.clean)[:, -1, 7].mean()))


def test_a_jsonl_file_is_examples_by_logit_difference(tiny_model, tmp_path: Path) -> None:
    lines = [
        {"clean": f"the {a} saw the", "counterfactual": f"the {b} saw the", "right": f" {c}", "wrong": [" sea"]}
        for a, b, c in zip(
            "king queen child friend teacher doctor farmer baker sailor".split(),
            "dog cat bird fish horse river town house garden".split(),
            "bread milk salt apple book letter song story word".split(),
            strict=True,
        )
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    task = load_task(path)
    assert (task.name, task.metric, len(task.examples)) == ("mine", "logit_difference", 9)
    prepared = prepare(tiny_model, task, 100)
    assert len(prepared.discovery.pairs) == len(prepared.testing.pairs) == 4  # halves are equal; nine do not divide


def test_the_file_on_the_page_is_one(task_file) -> None:
    page = (Path(__file__).parents[2] / "docs" / "circuits.md").read_text(encoding="utf-8")
    task = load_task(task_file(page.split("```yaml\n")[1].split("```")[0]))
    assert samples(task, 1)[0].right[0].strip() in samples(task, 1)[0].clean
    assert all(f"`{name}`" in page for name in SHIPPED)


BAD_FILES = {
    "no such file": ("absent.yaml", None, "No such file"),
    "another kind": ("task.txt", "x", "neither a shipped task nor"),
    "not YAML": ("task.yaml", "a: [", "not valid YAML"),
    "a list": ("task.yaml", "- 1", "a list, not a mapping"),
    "unknown field": ("task.yaml", TASK | {"metrik": "kl"}, "metrik"),
    "unknown metric": ("task.yaml", TASK | {"metric": "accuracy"}, "metric"),
    "unknown slot": ("task.yaml", TASK | {"slots": {"A": "people", "B": "people"}}, "no slot is called 'P'"),
    "unknown list": ("task.yaml", TASK | {"single": ["animals"]}, "no list of fillers is called 'animals'"),
    "no examples": ("task.yaml", TASK | {"templates": []}, "either templates or examples"),
    "no wrong answer": (
        "task.yaml",
        {"name": "x", "examples": [{"clean": "a b", "counterfactual": "a c", "right": " b"}]},
        "example 1: this metric needs right and wrong answers",
    ),
    "not a line of JSON": ("task.jsonl", '{"clean": "a"\n', "task.jsonl:1: not a JSON value"),
    "half a pair": ("task.yaml", 'name: "\\ud800"\nexamples: []\n', "task.yaml"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_in_one_line(case: str, task_file, tmp_path: Path) -> None:
    name, content, said = BAD_FILES[case]
    path = tmp_path / name if content is None else task_file(content, name)
    message = refusal(load_task, path)
    assert said in message and name in message and "\n" not in message and message.endswith("[docs/errors/task.md]")


def test_unequal_lengths_are_refused_with_the_example(tiny_model, task_file) -> None:
    content = TASK | {"templates": [TASK["templates"][0] | {"counterfactual": "the {A} and the {B} gave bread to the"}]}
    path = task_file(content)
    message = refusal(prepare, tiny_model, load_task(path), 8)
    assert f"{path}, template 1" in message and "the clean prompt has 16 tokens, the counterfactual 9" in message


def test_answers_that_are_no_single_token_are_refused(tiny_model, task_file) -> None:
    content = TASK | {"templates": [TASK["templates"][0] | {"right": " old king"}]}
    assert "too few are single tokens" in refusal(prepare, tiny_model, load_task(task_file(content)), 8)
    same = TASK | {"templates": [TASK["templates"][0] | {"right": " {B}"}]}
    assert "one is both right and wrong" in refusal(prepare, tiny_model, load_task(task_file(same)), 8)


def test_too_few_fillers_are_refused_with_their_count(tiny_model, task_file) -> None:
    people = ["king", *(f"Zanzibar{i}" for i in range(6))]
    content = TASK | {"fillers": TASK["fillers"] | {"people": people}}
    message = refusal(prepare, tiny_model, load_task(task_file(content)), 8)
    assert "0 different pairs" in message and "6 of 7 people" in message


def test_a_shipped_task_says_what_a_small_vocabulary_lacks(tiny_model) -> None:
    message = refusal(prepare, tiny_model, load_task("ioi"), 8)
    assert "different pairs of prompts" in message and "names" in message


def test_a_model_that_does_not_do_the_task_is_refused_with_its_score(tiny_model, task_file) -> None:
    task = load_task(task_file(TASK))
    half = prepare(tiny_model, task, 20).discovery
    found = score(tiny_model, half)
    assert found.accuracy is not None and found.accuracy < 0.8  # its weights are random
    message = refusal(screen, tiny_model, task, half)
    assert f"prefers the right answer on {found.accuracy:.0%} of 20 prompts, the task asks for 80%" in message
    # Prompts that change nothing are refused whatever the accuracy.
    still = task.model_copy(update={"accuracy": 0.0})
    same = prepare(tiny_model, still, 20, metric=lambda examples, pairs: lambda logits, rows: logits[:, 0, 5]).discovery
    assert "do not lower the metric" in refusal(screen, tiny_model, still, same)


def test_a_model_that_does_the_task_passes(task_file) -> None:
    from heredity.zoo import shipped

    content = {
        "name": "report",
        "fillers": {
            "numbers": "one two three four five six seven eight nine".split(),
            "owners": "moss reed wade lane park frost hart".split(),
            "places": "cove mill dock farm gate tower lodge".split(),
        },
        "slots": {"N": "numbers", "M": "numbers", "O": "owners", "P": "places"},
        "single": ["numbers", "owners", "places"],
        "templates": [
            {
                "clean": "log : owner {O} ; place {P} ; value {N} ; report",
                "counterfactual": "log : owner {O} ; place {P} ; value {M} ; report",
                "right": " {N}",
                "wrong": " {M}",
            }
        ],
    }
    model = load(str(shipped() / "parent"))
    task = load_task(task_file(content))
    found = screen(model, task, prepare(model, task, 16).testing)
    assert found.accuracy == 1 and found.clean > 2 > -2 > found.corrupt
    assert found.effect.low <= found.clean - found.corrupt <= found.effect.high
