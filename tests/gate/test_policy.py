"""Policy and intent files: the shipped policy, and every refusal with a file that has the fault."""

import hashlib
from pathlib import Path

import pytest
import yaml

from heredity.gate import policy as policy_module
from heredity.gate.policy import Policy, load_rules
from heredity.interp.errors import PolicyError

SHIPPED = Path(policy_module.__file__).with_name("policy.yaml")
CHANGE = "- {id: a, description: b, phrases: [double]}"


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "rules.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def changed(**values: object) -> str:
    return yaml.safe_dump(yaml.safe_load(SHIPPED.read_text()) | values)


def test_the_shipped_policy_is_the_default_and_explains_every_field(tmp_path: Path) -> None:
    rules = load_rules(None, None)
    assert rules.policy_sha256 == hashlib.sha256(SHIPPED.read_bytes()).hexdigest()
    assert (rules.intent, rules.intent_path, rules.intent_sha256) == (None, None, None)
    copied = load_rules(written(tmp_path, SHIPPED.read_bytes()), None)
    assert copied == rules
    lines = SHIPPED.read_text().splitlines()
    for name in Policy.model_fields.keys() - {"name", "version"}:
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{name}:"))
        assert lines[at - 1].startswith("#"), f"{name} is not explained"


def test_a_policy_of_ones_own(tmp_path: Path) -> None:
    rules = load_rules(written(tmp_path, changed(name="mine", material_nats=2, unconfirmed="flag")), None)
    assert (rules.policy.name, rules.policy.material_nats, rules.policy.unconfirmed) == ("mine", 2.0, "flag")
    assert rules.policy_sha256 != load_rules(None, None).policy_sha256


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"material_natts": 1.0}, "material_natts"),
        ({"material_nats": "1.0"}, "material_nats"),
        ({"material_nats": True}, "material_nats"),
        ({"material_nats": 0}, "material_nats"),
        ({"material_nats": float("nan")}, "material_nats"),
        ({"material_nats": float("inf")}, "material_nats"),
        ({"fewest_contexts": 2.5}, "fewest_contexts"),
        ({"fewest_tokens": -1}, "fewest_tokens"),
        ({"false_alarm": 1.1}, "false_alarm"),
        ({"control_share": -0.1}, "control_share"),
        ({"visible_nats": 0}, "visible_nats"),
        ({"unconfirmed": "pass"}, "unconfirmed"),
        ({"unconfirmed": False}, "unconfirmed"),
        ({"version": 2}, "version"),
        ({"name": ["a"]}, "name"),
        ({"declared_share": None}, "declared_share"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, object], field: str, tmp_path: Path) -> None:
    path = written(tmp_path, changed(**change))
    with pytest.raises(PolicyError) as refused:
        load_rules(path, None)
    assert refused.value.where == f"{path}, field {field}"


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    content = yaml.safe_load(SHIPPED.read_text())
    del content["causal_share"]
    with pytest.raises(PolicyError, match=r"field causal_share: field required"):
        load_rules(written(tmp_path, yaml.safe_dump(content)), None)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
NOT_YAML = {
    "tab": "version:\t1\n\tchanges: []",
    "unclosed": "version: [1",
    "bytes": b"version: \xff\xfe",
    "binary": b"\x00\x01\x02",
    "two documents": "version: 1\n---\nversion: 1\n",
    "python object": "!!python/object/apply:os.system ['touch pwned']",
    "unhashable key": "? [a]\n: b\n",
    "date": "version: 2026-99-99",
    "timestamp": "version: !!timestamp x",
    "integer": "version: !!int x",
    "long integer": "version: " + "1" * 5000,
    "nesting": "[" * 100_000,
    "undefined alias": "version: *gone",
}


@pytest.mark.parametrize("case", NOT_YAML)
def test_what_is_not_yaml_is_refused_in_one_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, NOT_YAML[case])
    for arguments in ((path, None), (None, path)):
        with pytest.raises(PolicyError, match="not valid YAML") as refused:
            load_rules(*arguments)
        assert refused.value.where == str(path) and "\n" not in str(refused.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("text", ["", "just text", "[1, 2]", "1", "~", BOMB, "&a [*a]", "&a {version: *a}"])
def test_yaml_that_is_no_intent_is_refused(text: str, tmp_path: Path) -> None:
    """Among them ten to the twelfth values behind aliases, and lists that hold themselves."""
    with pytest.raises(PolicyError) as refused:
        load_rules(None, written(tmp_path, text))
    assert len(str(refused.value)) < 700


@pytest.mark.parametrize(
    "changes",
    [
        "everything",
        "[{id: a, description: b}]",
        "[{id: a, description: b, phrases: []}]",
        '[{id: a, description: b, phrases: [""]}]',
        '[{id: a, description: b, phrases: [" "]}]',  # would stand in every text
        "[{id: a, description: b, phrases: double}]",
        "[{id: a, description: b, phrases: [1]}]",
        '[{id: "", description: b, phrases: [double]}]',
        "[{id: a, description: b, phrases: [double], when: always}]",
        '[{id: "a\\ud800", description: b, phrases: [double]}]',
    ],
)
def test_a_declaration_that_declares_nothing_is_refused(changes: str, tmp_path: Path) -> None:
    with pytest.raises(PolicyError):
        load_rules(None, written(tmp_path, f"version: 1\nchanges: {changes}\n"))


def test_an_intent_is_kept_with_its_digest(tmp_path: Path) -> None:
    text = f"version: 1\nchanges:\n  {CHANGE}\n"
    rules = load_rules(None, written(tmp_path, text))
    assert rules.intent is not None and rules.intent.changes[0].phrases == ("double",)
    assert rules.intent_sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert load_rules(None, written(tmp_path, "version: 1\nchanges: []\n")).intent is not None


def test_unreadable_and_too_large_files(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="No such file"):
        load_rules(tmp_path / "absent.yaml", None)
    with pytest.raises(PolicyError, match="Is a directory"):
        load_rules(None, tmp_path)
    with pytest.raises(PolicyError, match="larger than 1 MB"):
        load_rules(written(tmp_path, SHIPPED.read_bytes() + b"#" * 1_000_000), None)
