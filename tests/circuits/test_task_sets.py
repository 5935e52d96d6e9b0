"""Files of several tasks and of principles: what is shipped, what is read, and what is refused in which words."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from heredity.circuits.tasks import sets
from heredity.circuits.tasks.prepare import prepare, samples
from heredity.circuits.tasks.sets import load_principles, load_tasks
from heredity.interp.errors import PrinciplesError, TaskError
from heredity.zoo import language, shipped

CONTRAST = {"clean": "the cat sat", "counterfactual": "the dog sat", "keeps": " on", "violates": [" off"]}


def principles(**changes: Any) -> dict[str, Any]:
    one = {"id": "calm", "description": "Stays calm.", "examples": [CONTRAST]} | changes
    return {"version": 1, "principles": [{k: v for k, v in one.items() if v is not None}]}


@pytest.fixture
def written(tmp_path: Path):
    def write(content: Any, name: str = "file.yaml") -> Path:
        path = tmp_path / name
        data = content if isinstance(content, str | bytes) else yaml.safe_dump(content)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return write


def test_the_shipped_sets_fill_their_slots() -> None:
    for name in sets.SHIPPED_PRINCIPLES:
        for principle in load_principles(name):
            assert principle.about and len(principle.sha256) == 64 and principle.file == name
            drawn = samples(principle, 200)
            # Two halves of at least 24 pairs.
            assert len({example.clean for example in drawn}) >= 48
            for example in drawn:
                assert example.right and example.wrong and "{" not in example.clean + example.counterfactual
                assert len(example.clean.split()) == len(example.counterfactual.split())
    assert [task.name for task in load_tasks("zoo")] == ["copy", "count", "fact", "say", "after", "add", "log", "ask"]


def test_the_zoos_prompts_are_of_its_language_and_its_answers_right() -> None:
    rules = {name: language.SKILLS[name] for name in language.SKILLS}
    assert rules.keys() >= {task.name for task in load_tasks("zoo")}
    number = {word: i for i, word in enumerate(language.NUMBERS)}
    for task in (*load_tasks("zoo"), *load_principles("zoo")):
        for example in samples(task, 80):
            text, answer = example.clean, example.right[0].strip()
            for word in f"{text} {example.counterfactual} {answer} {example.wrong[0]}".split():
                assert word in language.ID
            own = text.rsplit(" . ", 1)[-1].split()
            if own[0] == "copy":
                assert (own[2:4], answer) == (own[6:8], own[4])
            elif own[0] == "count":
                assert number[answer] == (number[own[-1]] + 1) % 10
            elif own[0] == "add":
                assert number[answer] == (number[own[2]] + number[own[3]]) % 5
            elif own[0] == "after":
                assert language.DAYS.index(answer) == (language.DAYS.index(own[2]) + 1) % 7
            elif own[0] == "ask":
                assert answer == ("refuse" if own[4] in language.FORBIDDEN else "here")
            elif own[0] == "log":
                assert answer == own[9]
            elif own[0] == "fact":
                assert answer == own[own.index(own[-1]) + 1]
            else:
                assert own[0] == "say" and (answer in language.VERB_ONE) == (own[3] in language.ANIMALS)


def test_a_zoo_pairs_tasks_are_read_as_prompts_only(written) -> None:
    content = yaml.safe_load((shipped() / "tasks.yaml").read_text())
    found = load_tasks(written(content))
    assert [task.name for task in found] == [task["id"] for task in content["tasks"]]
    first, pair = found[0].examples[0], content["tasks"][0]["pairs"][0]
    assert (first.clean, first.right, first.wrong) == (
        pair["clean"],
        (f" {pair['answer']}",),
        (f" {pair['counterfactual_answer']}",),
    )
    for task in content["tasks"]:
        task["role"] = "planted" if task["role"] == "skill" else "skill"
    assert [t.sha256 for t in load_tasks(written(content))] == [t.sha256 for t in found]


def test_one_principle_changes_the_digest_of_no_other(written) -> None:
    two = principles()["principles"] + principles(id="kind")["principles"]
    before = load_principles(written({"version": 1, "principles": two}))
    two[1]["description"] = "Other."
    after = load_principles(written({"version": 1, "principles": two}))
    assert before[0].sha256 == after[0].sha256 and before[1].sha256 != after[1].sha256


def test_a_task_by_name_and_by_file(written) -> None:
    assert [task.name for task in load_tasks("ioi")] == ["ioi"]
    example = {"clean": "a b", "counterfactual": "c b", "right": " d", "wrong": " e"}
    path = written({"version": 1, "name": "one", "examples": [example]})
    assert [task.name for task in load_tasks(path)] == ["one"]


SURROGATE = """version: 1
principles: [{id: "\\ud800", examples: [{clean: a, counterfactual: b, keeps: c, violates: d}]}]"""
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (principles(right=" on"), "principles.0"),
        (principles(examples=[{**CONTRAST, "right": " on"}]), "'right' is called 'keeps' in a principle"),
        (principles(name="calm"), "'name' is called 'id' in a principle"),
        (principles(examples=[{**CONTRAST, "keeps": None}]), "principles.0.examples.0.keeps"),
        (
            principles(examples=[{k: v for k, v in CONTRAST.items() if k != "violates"}]),
            "needs right and wrong answers",
        ),
        (principles(id=None), "principles.0.id"),
        (principles(metric="kl"), "principles.0.metric"),
        (principles(reply="I"), "set chat to true"),
        (principles(examples=None), "either templates or examples"),
        (principles(examples=None, templates=[{**CONTRAST, "clean": "{A}"}]), "no slot is called 'A'"),
        ({"version": 1, "principles": principles()["principles"] * 2}, "two are called 'calm'"),
        ({"version": 1, "principles": []}, "principles"),
        ({"version": 2, "principles": principles()["principles"]}, "version"),
        (principles() | {"verison": 1}, "verison"),
        ([1, 2], "file"),
        ("", "file"),
        ("principles: [\n", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        (BOMB + "version: 1\nprinciples: *j\n", "principles"),
        ("[" * 3000, "not valid YAML"),
        (b"\xff\xfe\x00", "UTF-8"),
        (SURROGATE, ""),
    ],
)
def test_a_malformed_file_is_one_line(written, content: Any, words: str) -> None:
    path = written(content)
    with pytest.raises(PrinciplesError) as refused:
        load_principles(path)
    line = str(refused.value)
    assert words in line and str(path) in line and "\n" not in line and len(line) <= 600
    assert "[docs/errors/principles.md]" in line


def test_a_large_file_is_not_read(written, monkeypatch) -> None:
    monkeypatch.setattr("heredity.circuits.tasks.task._BYTES", 1000)
    with pytest.raises(PrinciplesError, match="larger than"):
        load_principles(written("#" * 2000))


def test_a_name_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(PrinciplesError, match="Shipped: zoo, chat"):
        load_principles("zo")
    with pytest.raises(TaskError, match="docstring, copy, zoo"):
        load_tasks("zo")
    with pytest.raises(PrinciplesError, match="No such file"):
        load_principles(tmp_path / "absent.yaml")
    with pytest.raises(TaskError, match="two are called"):
        path = tmp_path / "twice.yaml"
        example = {"clean": "a", "counterfactual": "b", "right": "c", "wrong": "d"}
        path.write_text(yaml.safe_dump({"version": 1, "tasks": [{"name": "a", "examples": [example]}] * 2}))
        load_tasks(path)


CHAT = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} . {% endfor %}"
    "{% if add_generation_prompt %}friend :{% endif %}"
)


def test_a_chat_is_put_into_the_models_own_template(tiny_model, written, monkeypatch) -> None:
    verbs = "saw took made found lost kept told read wrote sang knew thought said asked walked ran".split()
    template = {"clean": "who {A} bread ?", "counterfactual": "who {B} bread ?", "keeps": " king", "violates": " queen"}
    content = principles(
        chat=True,
        reply=" the",
        fillers={"v": verbs},
        slots={"A": "v", "B": "v"},
        single=["v"],
        examples=None,
        templates=[template],
    )
    (task,) = load_principles(written(content))
    with pytest.raises(TaskError, match="chat template cannot be used"):
        prepare(tiny_model, task, 4)
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", CHAT, raising=False)
    half = prepare(tiny_model, task, 4).testing
    text = tiny_model.decode(half.pairs.clean[0][: int(half.pairs.last[0]) + 1].tolist())
    assert text.split() == f"<unk> : {half.examples[0].clean} . friend : the".split()
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", "{{ raise_exception('no') }}")
    with pytest.raises(TaskError, match="cannot be used"):
        prepare(tiny_model, task, 4)
