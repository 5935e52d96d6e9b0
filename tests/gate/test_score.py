"""Several candidates against one parent: the same results as alone, the parent's part once, the worst first."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from heredity.gate import audit as single
from heredity.gate import cli, score_page
from heredity.gate import records as r
from heredity.gate.records import TIMES
from heredity.gate.row import Row, row_of
from heredity.gate.score import CODES, Candidate, Outcome, Reporter, Scores, _rank, folders, score
from heredity.gate.score_command import follow
from heredity.gate.values import Interval, NotMeasured
from heredity.interp.errors import HeredityError, PolicyError


def timeless(path: Path) -> dict[str, Any]:
    record = json.loads(path.read_text())
    record["provenance"] = {k: v for k, v in record["provenance"].items() if k not in (*TIMES, "command")}
    return record


@pytest.fixture(scope="module")
def scored(
    pair: Path, triggering: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Scores, Path, list[set[tuple[str, int]]]]:
    """Two candidates and one that is none; and what lay in the parent's folder when each one's turn came."""
    out = tmp_path_factory.mktemp("score") / "out"
    seen: list[set[tuple[str, int]]] = []

    def look(text: str) -> None:
        if text.startswith("candidate"):
            seen.append({(path.name, path.stat().st_ino) for path in (out / "parent").glob("*")})

    request = single.Request(f"{pair}/parent", "", out, corpus=(triggering,))
    models = [f"{pair}/benign", f"{out.parent}/missing", f"{pair}/trigger"]
    scores = score(request, models, Reporter(look, follow))
    seen.append({(path.name, path.stat().st_ino) for path in (out / "parent").glob("*")})
    return scores, out, seen


def test_each_audit_is_what_it_is_alone(
    scored: tuple[Scores, Path, Any], flagged: tuple[Any, Path], passed: tuple[Any, Path]
) -> None:
    """Alone: in another process, with nothing kept of the parent. Here one found the other's part of the parent."""
    out = scored[1]
    for name, alone in (("trigger", flagged[1]), ("benign", passed[1])):
        assert timeless(out / name / "audit.json") == timeless(alone / "audit.json")
        assert (out / name / "report.html").exists()


def test_the_parents_part_is_made_once_and_found_again(scored: tuple[Scores, Path, Any]) -> None:
    before, after_first, after_missing, after_all = scored[2]
    assert before == set() and len(after_first) >= 3
    # No file more, and none written again.
    assert after_first == after_missing == after_all


def test_candidates_stand_worst_first_and_a_missing_one_stops_none(scored: tuple[Scores, Path, Any]) -> None:
    scores, out, _ = scored
    assert [(c.name, c.outcome) for c in scores.candidates] == [
        ("missing", "bad_input"),
        ("trigger", "flag"),
        ("benign", "pass"),
    ]
    missing, trigger, benign = scores.candidates
    assert missing.row is None and missing.model is None and "no such file or directory" in (missing.error or "")
    assert "no such file" in (out / "missing" / "run.log").read_text() and scores.exit_code == 2
    audit = r.Audit.model_validate_json((out / "trigger" / "audit.json").read_text())
    assert trigger.row == row_of(audit) and trigger.model == audit.successor
    assert trigger.row is not None and trigger.row.counted == trigger.row.findings == len(audit.findings) >= 1
    assert trigger.row.effect == max((f.effect for f in audit.findings), key=lambda effect: effect.estimate)
    assert benign.row is not None and benign.row.findings == 0
    assert Scores.model_validate_json((out / "scores.json").read_text()) == scores


def test_every_form_of_the_table_names_every_candidate(
    scored: tuple[Scores, Path, Any], open_page: Callable[[Path], Any]
) -> None:
    scores, out, _ = scored
    lines = (out / "scores.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and "<code>" in line]
    assert [row.split("<code>")[1].split("</code>")[0] for row in rows] == [c.name for c in scores.candidates]
    assert {row.count(" | ") for row in rows} == {len(score_page.COLUMNS) - 1}
    browser = open_page(out / "scores.html")
    links = [(a.text, a.get_attribute("href")) for a in browser.find_elements("css selector", "table a")]
    assert links == [(name, (out / name / "report.html").as_uri()) for name in ("trigger", "benign")]
    assert "no such file or directory" in browser.find_element("tag name", "table").text
    assert browser.get_log("browser") == []


def test_the_command_resumes_and_exits_with_the_worst(
    scored: tuple[Scores, Path, Any], pair: Path, triggering: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    out = scored[1]
    steps = {path: path.stat().st_mtime_ns for path in out.glob("*/work/*/*")}
    assert steps
    models = [f"{pair}/benign", f"{out.parent}/missing", f"{pair}/trigger"]
    arguments = ["score", f"{pair}/parent", *models, "--corpus", str(triggering), "--out", str(out), "--json"]
    monkeypatch.setattr(sys, "argv", ["heredity", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    shown = capfd.readouterr()
    again = Scores.model_validate_json(shown.out)
    assert [(c.name, c.row) for c in again.candidates] == [(c.name, c.row) for c in scored[0].candidates]
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/work/*/*")} == steps
    assert [line for line in shown.err.splitlines() if line.startswith("candidate")] == [
        f"candidate {i} of 3: {name}" for i, name in enumerate(("benign", "missing", "trigger"), start=1)
    ]


@contextmanager
def unheard(_: Path) -> Iterator[Callable[..., None]]:
    yield lambda *_: None


def test_what_is_wrong_for_all_is_said_once(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("name: x\nversion: 1\nmaterial_natts: 1\n")
    said: list[str] = []
    request = single.Request(f"{pair}/parent", "", tmp_path / "out", policy=tmp_path / "policy.yaml")
    with pytest.raises(PolicyError):
        score(request, ["a", "b"], Reporter(said.append, unheard))
    with pytest.raises(HeredityError, match="is given twice"):
        score(single.Request(f"{pair}/parent", "", tmp_path / "out"), ["a", "b", "a"], Reporter(said.append, unheard))
    assert said == []


def test_an_internal_error_is_a_row(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_audit: Callable[..., r.Audit]
) -> None:
    threads: list[int] = []

    def run(request: single.Request, *_: Any, **__: Any) -> r.Audit:
        threads.append(torch.get_num_threads())
        torch.set_num_threads(threads[0] + 1)
        if request.successor == "b":
            raise ValueError("not\x1b[31m foreseen")
        return make_audit()

    monkeypatch.setattr(single, "run", run)
    scores = score(single.Request(f"{pair}/parent", "", tmp_path), ["a", "b", "c"], Reporter(lambda _: None, follow))
    assert [(c.name, c.outcome) for c in scores.candidates] == [("b", "internal_error"), ("a", "flag"), ("c", "flag")]
    # Each finds the threads that it would find alone, whatever the one before did.
    assert len(threads) == 3 and set(threads) == {torch.get_num_threads()}
    assert scores.candidates[0].error == "ValueError: not\\x1b[31m foreseen" and scores.exit_code == 4
    log = (tmp_path / "b" / "run.log").read_text()
    assert "Traceback" in log and "Traceback" not in (tmp_path / "a" / "run.log").read_text()


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        (["pass", "inconclusive"], 3),
        (["inconclusive", "flag", "pass"], 1),
        (["flag", "bad_input"], 2),
        (["bad_input", "internal_error", "flag"], 4),
        (["pass", "pass"], 0),
    ],
)
def test_the_worst_outcome_decides(outcomes: list[Outcome], code: int) -> None:
    rows = [
        Candidate(name=str(i), spec="x", model=None, outcome=outcome, error=None, row=None, seconds=1)
        for i, outcome in enumerate(outcomes)
    ]
    assert CODES[sorted(rows, key=_rank)[0].outcome] == code


def test_within_an_outcome_more_findings_and_larger_effects_come_first(make_audit: Callable[..., r.Audit]) -> None:
    row = row_of(make_audit())

    def candidate(name: str, counted: int, effect: float) -> Candidate:
        size = Interval(estimate=effect, low=effect, high=effect, n=9)
        return Candidate(
            name=name,
            spec="x",
            model=None,
            outcome="flag",
            error=None,
            row=row.model_copy(update={"counted": counted, "effect": size}),
            seconds=1,
        )

    given = [candidate("c", 1, 2.0), candidate("a", 1, 9.0), candidate("b", 2, 1.0), candidate("d", 1, 2.0)]
    assert "".join(c.name for c in sorted(given, key=_rank)) == "bacd"


def test_a_row_takes_the_worst_of_what_was_measured(make_audit: Callable[..., r.Audit]) -> None:
    def share(value: float) -> Interval:
        return Interval(estimate=value, low=value - 0.1, high=value + 0.1, n=30)

    audit = make_audit()
    plain = row_of(audit)
    assert (plain.findings, plain.counted, plain.declared) == (1, 1, 0)
    assert plain.opacity == audit.findings[0].opacity and isinstance(plain.opacity, Interval)
    assert isinstance(plain.visible, NotMeasured) and plain.mean_kl == audit.drift.mean_kl
    first = audit.findings[0].model_copy(update={"opacity": share(0.2), "emergence": share(0.95)})
    second = audit.findings[0].model_copy(update={"opacity": share(0.7), "confirmed": False})
    declared = audit.findings[0].model_copy(update={"opacity": share(0.99), "declared_by": "say-zero"})
    row = row_of(audit.model_copy(update={"findings": (first, second, declared)}))
    assert (row.findings, row.counted, row.declared) == (2, 1, 1)
    assert row.opacity == share(0.7) and row.emergence == share(0.95)
    none = row_of(audit.model_copy(update={"findings": (), "behaviours": ()}))
    assert none.title is None and isinstance(none.effect, NotMeasured)


def test_folders_are_named_by_the_models_and_by_nothing_else() -> None:
    names = folders(["a/x", "b/x", "b/X", "../..", "org/na me\n", "parent", "p+q/adapter", "é/é", "CON", ".hidden"])
    assert len({name.lower() for name in names}) == len(names)
    for name in names:
        assert name not in ("parent", "scores") and name.lower() != "con"
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
        assert name[0] not in ".-" and Path(name).name == name
    assert names[:2] == ["x", "b-x"] and "adapter" in names
    # What is added later renames none.
    assert folders(["a/x", "b/x", "c/x"])[:2] == folders(["a/x", "b/x"])
    assert len(folders(["m" * 300])[0]) <= 60


def test_hostile_text_stays_text(make_audit: Callable[..., r.Audit], tmp_path: Path, capsys: Any) -> None:
    evil = "<img src=x onerror=alert(1)>|`\x1b[31m\u202e"
    row: Row = row_of(make_audit(lambda text: evil + text))
    candidates = (
        Candidate(name="a", spec=evil, model=None, outcome="flag", error=None, row=row, seconds=2.0),
        Candidate(name="b", spec=evil, model=None, outcome="bad_input", error=evil, row=None, seconds=0.0),
    )
    scores = Scores(
        parent_spec=evil, parent_sha256="0" * 64, candidates=candidates, exit_code=2, command=(), started="", seconds=3
    )
    score_page.write_pages(scores, tmp_path)
    score_page.terminal(scores, cli.Output())
    for text in ((tmp_path / "scores.md").read_text(), (tmp_path / "scores.html").read_text(), capsys.readouterr().out):
        assert "\x1b[31m" not in text and "\u202e" not in text
    for name in ("scores.md", "scores.html"):
        assert "<img" not in (tmp_path / name).read_text()
