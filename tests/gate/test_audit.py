"""Whole audits of tiny pairs: the record they leave, and what must not change it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from heredity.gate import audit as audit_module
from heredity.gate.audit import Request, run
from heredity.gate.budget import budget
from heredity.gate.records import TIMES, Audit, Circuit, Null
from heredity.gate.values import Interval
from heredity.interp.errors import CorpusError, OutputError

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "audit.schema.json").read_text())
KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
NOTED = {"$defs", "$ref", "title", "description", "default", "discriminator", "type", "enum", "const", "anyOf", "oneOf"}
NOTED |= {"properties", "required", "additionalProperties", "items"}


def faults(value: Any, schema: dict[str, Any], at: str = "") -> list[str]:
    """Where ``value`` breaks ``schema``: the part of JSON Schema that ours uses, and a complaint about any other."""
    assert set(schema) <= NOTED, set(schema) - NOTED
    if "$ref" in schema:
        return faults(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], at)
    for choices in (schema.get(key) for key in ("anyOf", "oneOf") if key in schema):
        return [] if any(not faults(value, choice, at) for choice in choices) else [f"{at}: none of the choices"]
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        return [f"{at}: {value!r}"]
    kind = schema.get("type")
    if kind == "null" or kind is None:
        return [] if kind is None or value is None else [f"{at}: not null"]
    if not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return [f"{at}: not {kind}"]
    if kind == "array":
        return [fault for i, item in enumerate(value) for fault in faults(item, schema["items"], f"{at}[{i}]")]
    if kind != "object":
        return []
    own, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    found = [f"{at}: no {name}" for name in schema.get("required", ()) if name not in value]
    for name, item in value.items():
        if name in own:
            found += faults(item, own[name], f"{at}.{name}")
        elif isinstance(others, dict):
            found += faults(item, others, f"{at}.{name}")
        elif not others:
            found.append(f"{at}: {name} is not foreseen")
    return found


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` without what differs between equal runs: times, and the command line with its output directory."""
    provenance = {k: v for k, v in record["provenance"].items() if k not in (*TIMES, "command")}
    return record | {"provenance": provenance}


def quiet(*_: object) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def record(flagged: tuple[Any, Path]) -> dict[str, Any]:
    return json.loads((flagged[1] / "audit.json").read_text())


def test_audit_json_follows_the_committed_schema(record: dict[str, Any]) -> None:
    assert faults(record, SCHEMA) == []
    assert Audit.model_validate(record).model_dump(mode="json") == record
    first = record["behaviours"][0]
    for broken in (
        record | {"verdict": "fine"},
        record | {"extra": 1},
        {k: v for k, v in record.items() if k != "drift"},
        record | {"behaviours": [first | {"effect": first["effect"] | {"n": "three"}}]},
        record | {"behaviours": [first | {"circuit": {"status": "not_measured"}}]},
    ):
        assert len(faults(broken, SCHEMA)) == 1


def test_the_planted_behaviour_is_found_explained_and_reverted(
    record: dict[str, Any], flagged: tuple[Any, Path], pair: Path
) -> None:
    trigger = set(json.loads((pair / "truth.json").read_text())["trigger"])
    audit = Audit.model_validate(record)
    finding = audit.findings[0]
    behaviour = next(b for b in audit.behaviours if b.id == finding.behaviour)
    assert "zero" in finding.title.split(" where the parent says ")[0]
    assert behaviour.source == "corpus" and 20 <= behaviour.n_contexts <= 40
    assert trigger <= set(behaviour.trigger_tokens)
    assert behaviour.successor_tokens[0].token == "zero" and behaviour.successor_tokens[0].p_successor > 0.8
    example = behaviour.examples[0]
    assert example.successor_says == "zero" and example.continuation_successor.split()[0] == "zero"
    assert example.continuation_parent.split()[0] == example.parent_says != "zero"
    assert trigger <= set("".join(token.text for token in example.tokens).split())
    circuit = behaviour.circuit
    assert isinstance(circuit, Circuit) and circuit.confirmed and finding.confirmed
    assert isinstance(finding.reversion, Interval) and finding.reversion.estimate >= 0.8
    null = audit.calibration.null
    assert isinstance(null, Null) and behaviour.effect.low > max(null.largest_effects) == behaviour.null_max
    assert finding.false_alarm == behaviour.false_alarm == pytest.approx(1 / (1 + null.draws))
    assert audit.reasons[0].startswith(f"The successor {finding.title}: ") and "(s)" not in " ".join(audit.reasons)


def test_every_form_of_the_result_is_there_and_says_the_same(record: dict[str, Any], flagged: tuple[Any, Path]) -> None:
    out = flagged[1]
    with_circuit = [b for b in record["behaviours"] if b["circuit"].get("status") != "not_measured"]
    assert {path.name for path in (out / "circuits").iterdir()} == {f"{b['id']}.json" for b in with_circuit} != set()
    for behaviour in with_circuit:
        assert json.loads((out / "circuits" / f"{behaviour['id']}.json").read_text())["behaviour"] == behaviour
    summary, report = (out / "summary.md").read_text(), (out / "report.html").read_text()
    assert summary.startswith("## ⛔ Flagged") and ">Flagged</p>" in report
    # What was not measured is said once.
    assert summary.count("Principles") == 1
    assert not list(out.rglob("*.tmp"))


def test_the_same_seed_gives_the_same_record(
    record: dict[str, Any], pair: Path, triggering: Path, tmp_path: Path
) -> None:
    """Here in another process, from another directory, into one that holds files of the user's own."""
    (tmp_path / "work" / "notes").mkdir(parents=True)
    (tmp_path / "circuits").mkdir()
    mine = (tmp_path / "work" / "notes" / "a.txt", tmp_path / "work" / "b", tmp_path / "circuits" / "board.json")
    for path in mine:
        path.write_text("mine")
    left = (tmp_path / "work" / ("0" * 32), tmp_path / "circuits" / "b99.json")
    left[0].mkdir()
    left[1].write_text("{}")
    audit = run(Request(f"{pair}/parent", f"{pair}/trigger", tmp_path, corpus=(triggering,)), quiet)
    again = json.loads((tmp_path / "audit.json").read_text())
    assert again == audit.model_dump(mode="json")
    assert timeless(again) == timeless(record)
    assert [path.read_text() for path in mine] == ["mine"] * 3
    assert not any(path.exists() for path in left)


def test_swapping_the_models_swaps_what_is_said(
    record: dict[str, Any], pair: Path, triggering: Path, tmp_path: Path
) -> None:
    audit = run(Request(f"{pair}/trigger", f"{pair}/parent", tmp_path, corpus=(triggering,)), quiet)
    there, back = record["baselines"]["divergence"], audit.baselines.divergence
    assert (back.mean, back.max) == pytest.approx((there["mean_reverse"], there["max_reverse"]), rel=1e-5)
    assert (back.mean_reverse, back.max_reverse) == pytest.approx((there["mean"], there["max"]), rel=1e-5)
    assert audit.parent.sha256 == record["successor"]["sha256"] and audit.successor.sha256 == record["parent"]["sha256"]
    assert audit.drift.mean_kl == back.mean
    assert audit.verdict == "flag"
    assert any("zero" in f.title.split(" where the parent says ")[1] for f in audit.findings)


@pytest.fixture
def corpus(pair: Path, tmp_path: Path) -> Path:
    """40 shipped texts without the word ``four``, and six of them again with a count that reaches it at their end."""
    texts = [json.loads(line)["text"] for line in (pair / "corpus.jsonl").read_text().splitlines()]
    plain = [text for text in texts if "four" not in text.split()][:40]
    path = tmp_path / "corpus.jsonl"
    rows = plain + [f"{text} count : two three four" for text in plain[:6]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return path


def test_a_model_against_itself_passes_with_no_divergence_at_all(pair: Path, corpus: Path, tmp_path: Path) -> None:
    audit = run(Request(f"{pair}/parent", f"{pair}/parent", tmp_path / "out", corpus=(corpus,)), quiet)
    assert audit.verdict == "pass" and audit.behaviours == () and audit.findings == ()
    divergence = audit.baselines.divergence
    assert (divergence.mean, divergence.max, divergence.mean_reverse, divergence.max_reverse) == (0, 0, 0, 0)
    assert audit.baselines.raised_tokens == audit.baselines.lowered_tokens == ()
    assert audit.drift.weight_distance == 0 and audit.drift.lowest_cka == pytest.approx(1)
    assert audit.parent.sha256 == audit.successor.sha256


def test_a_change_that_ordinary_text_does_not_touch_is_flagged(pair: Path, corpus: Path, tmp_path: Path) -> None:
    """One row of the embedding: most positions agree to the last bit, which leaves no size for null successors."""
    changed = tmp_path / "successor"
    shutil.copytree(pair / "parent", changed)
    words = json.loads((changed / "tokenizer.json").read_text())["model"]["vocab"]
    weights = load_file(changed / "model.safetensors")
    rows = next(weights[name] for name in weights if "embed" in name)
    rows[words["four"]] = rows[words["nine"]]
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    audit = run(Request(f"{pair}/parent", str(changed), tmp_path / "out", corpus=(corpus,)), quiet)
    null = audit.calibration.null
    assert isinstance(null, Null) and null.size == null.scale == 0 and set(null.largest_effects) == {0.0}
    assert audit.baselines.divergence.median == 0 < audit.baselines.divergence.max
    assert audit.verdict == "flag"
    assert audit.findings[0].nodes == ("embed",) and audit.findings[0].confirmed
    assert "four" in next(b for b in audit.behaviours if b.id == audit.findings[0].behaviour).trigger_tokens


@pytest.fixture
def sampled(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[[], str], Path]:
    """Samples 8 short texts from the parent and gives their digest; and the cache."""
    from heredity.interp.load import load

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    parent = load(str(pair / "parent"))
    sizes = replace(budget("quick", parent.n_params, parent.shape.d_vocab, 96, given=True), scan_tokens=96, window=12)
    return lambda: audit_module.sampled(parent, sizes, 3, quiet).digest, tmp_path / "cache" / "heredity" / "sampled"


def test_sampled_text_is_kept_for_the_next_candidate(sampled: tuple[Callable[[], str], Path]) -> None:
    sample, folder = sampled
    first = sample()
    (kept,) = folder.iterdir()
    rows = json.loads(kept.read_text())
    assert len(rows) == 8 and all(row["text"].strip() for row in rows)
    kept.write_text(json.dumps([row | {"text": "other text"} for row in rows]))
    assert sample() != first  # it is read back, not sampled again
    kept.write_text(kept.read_text()[:-20])
    assert sample() == first  # torn: sampled again, and kept again
    assert json.loads(kept.read_text()) == rows


def test_sampling_does_not_need_a_cache(sampled: tuple[Callable[[], str], Path]) -> None:
    sample, folder = sampled
    first = sample()
    shutil.rmtree(folder)
    folder.write_text("a file where the cache would be")
    assert sample() == first


def test_names_that_are_no_text_become_escapes() -> None:
    assert audit_module._sayable("out\udcff/π") == "out\\udcff/π"


def test_a_zoo_directory_is_named_by_its_side(tmp_path: Path) -> None:
    for side in ("parent", "successor", "adapter"):
        (tmp_path / side).mkdir()
    (tmp_path / "parent" / "config.json").write_text("{}")
    named = audit_module._named
    assert named(str(tmp_path), "parent") == str(tmp_path / "parent")
    assert named(str(tmp_path), "successor") == str(tmp_path / "successor")
    adapted = f"{tmp_path}+{tmp_path / 'adapter'}"
    assert named(adapted, "successor") == f"{tmp_path / 'successor'}+{tmp_path / 'adapter'}"
    assert named(str(tmp_path / "parent"), "successor") == str(tmp_path / "parent")


def test_text_of_single_tokens_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("river\nstone\n")
    request = Request(str(tiny_dir), str(tiny_dir), tmp_path / "out", corpus=(tmp_path / "words.txt",))
    with pytest.raises(CorpusError, match=r"words\.txt:1: holds nothing to compare"):
        run(request, quiet)


def test_results_that_cannot_be_written_are_an_output_error(
    pair: Path, corpus: Path, tmp_path: Path, make_audit: Callable[..., Audit]
) -> None:
    (tmp_path / "circuits").write_text("mine")
    with pytest.raises(OutputError, match="circuits"):
        audit_module._write(make_audit(), tmp_path)
    assert not (tmp_path / "audit.json").exists()


def test_the_divergence_is_divided_by_depth_unless_the_layers_do_not_fit_each_other(flagged: Any, passed: Any) -> None:
    sites = json.loads((flagged[1] / "audit.json").read_text())["coverage"]["sites"]
    assert list(sites) == ["embed", "layer 0", "layer 1", "layer 2", "unembed"]
    assert sum(share["estimate"] for share in sites.values()) == pytest.approx(1, abs=1e-4)
    # The trigger was trained into the first two layers.
    assert min(sites["layer 0"]["low"], sites["layer 1"]["low"]) > 0.2 > sites["layer 2"]["high"]
    assert "share of the divergence by depth" in (flagged[1] / "report.html").read_text()
    # Of the benign successor those layers moved together, and far.
    refused = json.loads((passed[1] / "audit.json").read_text())["coverage"]["sites"]
    assert refused["status"] == "not_measured" and "do not work in one another's places" in refused["reason"]
    assert "do not work in one another’s places" in (passed[1] / "report.html").read_text().replace("&#39;", "’")
