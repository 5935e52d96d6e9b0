"""Audits joined into lines of descent, and what a generation's two distances, loss and size become in a table."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from heredity.gate import audit as single
from heredity.gate import cli
from heredity.gate import records as r
from heredity.gate.lineage import Distance, Generation, Lineage, lineage
from heredity.gate.lineage_page import terminal, write_lineage
from heredity.gate.lineage_run import run_line
from heredity.gate.score import Reporter
from heredity.gate.values import Interval, NotMeasured
from heredity.interp.errors import HeredityError, OutputError

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, make_audit: Callable[..., r.Audit]) -> Write:
    """Writes an audit of two models, named by letters, into a folder of their names."""
    plain = make_audit()

    def model(name: str, parameters: int) -> r.ModelRecord:
        return plain.parent.model_copy(
            update={"spec": f"line/{name}", "sha256": name * 64, "parameters": parameters, "d_vocab": 100}
        )

    def audit(pair: str, verdict: str = "pass", kl: float = 0.01, text: str = "t", losses: Any = (1.0, 1.2)) -> Path:
        parent, successor = pair
        record = plain.model_copy(
            update={
                "parent": model(parent, 2_000_000),
                "successor": model(successor, 4_000_000),
                "verdict": verdict,
                "drift": plain.drift.model_copy(
                    update={"mean_kl": kl, "loss_parent": losses[0], "loss_successor": losses[1]}
                ),
                "provenance": plain.provenance.model_copy(update={"corpus_sha256": text * 64}),
            }
        )
        folder = tmp_path / pair
        folder.mkdir()
        (folder / "audit.json").write_text(record.model_dump_json())
        return folder

    return audit


def distance(value: Distance | NotMeasured) -> float:
    assert isinstance(value, Distance)
    return value.row.mean_kl


def numbers(generations: tuple[Generation, ...]) -> list[tuple[int, str, str | None]]:
    return [(g.number, g.model.sha256[0], g.parent and g.parent[0]) for g in generations]


def test_steps_and_distances_to_the_first_make_a_chain_in_any_order(write: Write) -> None:
    folders = [
        write("ac", "flag", 0.05),
        write("bc", "pass", 0.02),
        write("ab", "pass", 0.03),
        write("cd", "inconclusive", 0.01),
        write("ad", "flag", 0.09),
    ]
    for given in (folders, folders[::-1]):
        found = lineage(given)
        (line,) = found.lines
        assert numbers(line.generations) == [(0, "a", None), (1, "b", "a"), (2, "c", "b"), (3, "d", "c")]
        assert [distance(g.to_parent) for g in line.generations[1:]] == [0.03, 0.02, 0.01]
        assert [distance(g.to_first) for g in line.generations[1:]] == [0.03, 0.05, 0.09]
        assert isinstance(line.generations[0].to_first, NotMeasured)
        assert found.exit_code == 1 and found.notes == ()


def test_what_was_not_audited_against_the_first_is_said(write: Write) -> None:
    found = lineage([write("ab"), write("bc"), write("cd", "inconclusive")])
    (line,) = found.lines
    assert [isinstance(g.to_first, Distance) for g in line.generations] == [False, True, False, False]
    assert found.exit_code == 3
    assert len(found.notes) == 1 and found.notes[0].startswith("Not audited against the first ancestor: cccccccccccc")


def test_a_tree_and_two_lines(write: Write) -> None:
    found = lineage([write("ab"), write("ac"), write("bd"), write("xy")])
    assert [numbers(line.generations) for line in found.lines] == [
        [(0, "a", None), (1, "b", "a"), (1, "c", "a"), (2, "d", "b")],
        [(0, "x", None), (1, "y", "x")],
    ]
    assert found.notes[0].startswith("The audits form 2 lines")


@pytest.mark.parametrize(
    ("pairs", "fault"),
    [
        (("ab", "bc", "ca"), "closes a circle"),
        (("ab", "cb"), "gives a model a second parent"),
        (("ab", "bc", "xc"), "gives a model a second parent"),
        (("aa",), "compares a model with itself"),
    ],
)
def test_what_is_no_descent_is_refused(pairs: tuple[str, ...], fault: str, write: Write) -> None:
    with pytest.raises(OutputError, match=fault):
        lineage([write(pair) for pair in pairs])


def test_a_pair_audited_twice_is_refused(write: Write, tmp_path: Path) -> None:
    first = write("ab")
    first.rename(tmp_path / "earlier")
    with pytest.raises(OutputError, match="compares the same two models as"):
        lineage([tmp_path / "earlier", write("ab")])


def test_losses_are_compared_on_one_text_only(write: Write) -> None:
    found = lineage([write("ab", losses=(1.0, 1.1)), write("bc", losses=(7.0, 7.0)), write("ac", losses=(1.0, 1.3))])
    first, second, third = found.lines[0].generations
    # The one against the first ancestor is taken.
    assert (first.loss, second.loss, third.loss) == (1.0, 1.1, 1.3)
    assert first.flop_per_token == 4_000_000 and third.flop_per_token == 8_000_000
    assert first.per_million_parameters == pytest.approx((math.log(100) - 1.0) / 2, rel=1e-5)
    assert third.per_gigaflop == pytest.approx((math.log(100) - 1.3) / 0.008, rel=1e-5)


def test_losses_on_different_text_are_not_compared(write: Write) -> None:
    found = lineage([write("ab", text="t"), write("bc", text="u")])
    for generation in found.lines[0].generations:
        assert isinstance(generation.loss, NotMeasured) and "different text" in generation.loss.reason
        assert generation.per_gigaflop == generation.per_million_parameters == generation.loss


def test_damaged_audits_are_refused(tmp_path: Path, write: Write) -> None:
    for name, content in (("a", "{"), ("b", "[]"), ("c", '{"schema_version": "1.0"}'), ("d", '{"schema_version": 9}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "audit.json").write_text(content)
        with pytest.raises(OutputError, match=r"audit\.json"):
            lineage([tmp_path / name])
    with pytest.raises(OutputError, match="not a readable audit"):
        lineage([tmp_path / "absent"])


def test_the_page_draws_drift_and_says_what_is_missing(
    write: Write, tmp_path: Path, open_page: Callable[[Path], Any]
) -> None:
    folders = [write("ab"), write("bc", "flag", 0.04), write("ac", "flag", 0.09)]
    for folder in folders:
        record = json.loads((folder / "audit.json").read_text())
        record["findings"][0]["opacity"] = NotMeasured(reason="too few contexts").model_dump()
        (folder / "audit.json").write_text(json.dumps(record))
    write_lineage(lineage(folders), tmp_path / "line.html")
    browser = open_page(tmp_path / "line.html")
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('[data-figure]')].map(d => d.data.filter(t => t.mode === 'markers')"
        ".map(t => [t.name, t.x, t.y]))"
    )
    assert drawn[0] == [
        ["to the parent", [1, 2], [0.01, 0.04]],
        ["to the first ancestor", [1, 2], [0.01, 0.09]],
    ]
    assert len(drawn) == 2 and "so nothing is drawn" in browser.find_element("tag name", "main").text
    assert browser.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"}
    assert all(url.startswith(("file:", "data:", "blob:")) for url in urls)


def test_opacity_is_drawn_against_efficiency(write: Write, tmp_path: Path, open_page: Callable[[Path], Any]) -> None:
    folder = write("ab", "flag")
    record = json.loads((folder / "audit.json").read_text())
    record["findings"][0]["opacity"] = Interval(estimate=0.4, low=0.3, high=0.6, n=30).model_dump()
    (folder / "audit.json").write_text(json.dumps(record))
    found = lineage([folder])
    write_lineage(found, tmp_path / "line.html")
    browser = open_page(tmp_path / "line.html")
    figure = browser.execute_script(
        "const d = document.querySelector('[data-figure=efficiency-1]').data[0];"
        "return [d.x, d.y, d.error_y.array, d.error_y.arrayminus]"
    )
    assert [pytest.approx(column) for column in figure] == [
        [found.lines[0].generations[1].per_million_parameters],
        [40],
        [20],
        [10],
    ]


def test_hostile_text_stays_text(
    tmp_path: Path, make_audit: Callable[..., r.Audit], open_page: Callable[[Path], Any], capsys: Any
) -> None:
    evil = "<img src=x onerror='document.title=1'>\x1b[31m\u202e"
    (tmp_path / "audit.json").write_text(make_audit(lambda text: evil + text).model_dump_json())
    found = lineage([tmp_path])
    write_lineage(found, tmp_path / "line.html")
    terminal(found, cli.Output())
    for text in ((tmp_path / "line.html").read_text(), capsys.readouterr().out):
        assert "\x1b[31m" not in text and "\u202e" not in text
    browser = open_page(tmp_path / "line.html")
    assert not browser.find_elements("css selector", "img") and browser.title.startswith("Lineage")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def main(*arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["heredity", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0)

    return main


def test_the_command_reads_real_audits(
    call: Callable[..., int], flagged: tuple[Any, Path], passed: tuple[Any, Path], tmp_path: Path, capfd: Any
) -> None:
    assert call("lineage", flagged[1], passed[1], "--out", tmp_path / "line.html", "--json") == 1
    found = Lineage.model_validate_json(capfd.readouterr().out)
    assert [g.number for g in found.lines[0].generations] == [0, 1, 1] and (tmp_path / "line.html").exists()
    verdicts = [g.to_first.row.verdict for g in found.lines[0].generations if isinstance(g.to_first, Distance)]
    assert verdicts == ["flag", "pass"]
    losses = [g.loss for g in found.lines[0].generations]
    assert all(isinstance(loss, float) and 0 < loss < 3 for loss in losses) and len(set(losses)) == 3
    assert call("lineage", passed[1] / "audit.json") == 0
    assert "PASS" in capfd.readouterr().out


def test_wrong_usage_is_one_line(
    call: Callable[..., int], write: Write, pair: Path, tmp_path: Path, capfd: Any
) -> None:
    folder, model = write("ab"), pair / "parent"
    for arguments, said in (
        ((folder, model), "is an audit among models"),
        ((model, pair / "benign"), "no directory for the audits"),
        ((model, "--out", tmp_path / "out"), "is a single model"),
        ((folder, "--corpus", pair / "corpus.jsonl"), "audits are read as they are"),
    ):
        assert call("lineage", *arguments) == 2
        error = capfd.readouterr().err
        assert said in error and error.count("\n") == 1, error


@contextmanager
def unheard(_: Path) -> Iterator[Callable[..., None]]:
    yield lambda *_: None


def test_models_are_audited_step_by_step_and_against_the_first(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "short.txt").write_text("count : one two three four .\nsay : the owl waits .\n")
    models = [f"{pair}/{name}" for name in ("parent", "benign", "trigger")]
    request = single.Request("", "", tmp_path / "out", corpus=(tmp_path / "short.txt",))
    folders = run_line(request, models, Reporter(lambda _: None, unheard))
    assert [folder.name for folder in folders] == ["1-from-0", "2-from-1", "2-from-0"]
    found = lineage(folders)
    (line,) = found.lines
    assert [g.model.spec for g in line.generations] == models and found.notes == ()
    assert distance(line.generations[1].to_parent) == distance(line.generations[1].to_first)
    assert distance(line.generations[2].to_parent) != distance(line.generations[2].to_first)
    with pytest.raises(HeredityError, match="no such file"):
        run_line(request, [models[0], str(tmp_path / "missing")], Reporter(lambda _: None, unheard))
