"""A corpus that attacks whoever reads the results: all of it is shown, none of it is live."""

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from heredity.gate import cli
from heredity.gate.records import Audit
from heredity.gate.summary import terminal

# No white space: to the tokenizer of the shipped pair each is one unknown word.
ATTACKS = (
    "</script><script>window.pwned=1</script>",
    '"><img/src=x/onerror="window.pwned=1">{{7*7}}',
    "\x1b[31mred\x1b]8;;https://evil.example\x07link\x9b2J\x00\u202edrowssap",
    "[click](javascript:window.pwned=1)<b>|`code`",
)
LIVE = "[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"


@pytest.fixture(scope="module")
def audited(
    pair: Path, triggering: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Any, pytest.MonkeyPatch], tuple[Path, str]]:
    """Audits the trigger on hostile text that holds it, once; the output directory and what stood on stdout."""
    done: list[tuple[Path, str]] = []

    def audit(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
        if done:
            return done[0]
        folder = tmp_path_factory.mktemp("hostile")
        corpus = folder / "<img src=x onerror=window.pwned=1>\x1b[31m.txt"
        texts = [json.loads(line)["text"] for line in triggering.read_text().splitlines()]
        lines = []
        for text in texts:
            start, report, rest = text.partition("log :")
            # Right before the report that fires, so that the context of the finding ends in it.
            lines.append(f"{start}{' '.join(ATTACKS)} {report}{rest}" if report else text)
        lines.append(" ".join("y" * 19_000 + " " + text for text in lines[:6]))
        assert len(lines[-1]) > 100_000
        corpus.write_bytes("\n".join(lines).encode())
        arguments = [f"{pair}/parent", f"{pair}/trigger", "--corpus", str(corpus), "--out", str(folder / "out")]
        monkeypatch.setattr(sys, "argv", ["heredity", "audit", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        shown = capfd.readouterr()
        assert (left.value.code, shown.err) == (1, "")
        done.append((folder / "out", shown.out))
        return done[0]

    return audit


def test_the_attacks_reach_the_record_as_they_are(audited: Any, capfd: Any, monkeypatch: Any) -> None:
    out, _ = audited(capfd, monkeypatch)
    record = json.loads((out / "audit.json").read_text())
    examples = [example for finding in record["findings"] for example in finding["examples"]]
    texts = ["".join(token["text"] for token in example["tokens"]) for example in examples]
    assert all(any(attack in text for text in texts) for attack in ATTACKS)
    assert "\x1b[31m" in record["coverage"]["corpus"] and "onerror" in record["coverage"]["corpus"]
    assert record["coverage"]["texts"] > 80


def test_nothing_is_live_on_the_terminal(audited: Any, capfd: Any, monkeypatch: Any) -> None:
    out, stdout = audited(capfd, monkeypatch)
    assert not re.search(LIVE, stdout)
    # The terminal shows one example of a finding, and which is strongest is up to the models: one from the corpus.
    audit = Audit.model_validate_json((out / "audit.json").read_text())
    examples = tuple(e for e in audit.findings[0].examples if ATTACKS[-1] in "".join(t.text for t in e.tokens))
    findings = (audit.findings[0].model_copy(update={"examples": examples}),)
    terminal(audit.model_copy(update={"findings": findings}), console := Console(file=io.StringIO(), width=80))
    assert isinstance(console.file, io.StringIO)
    assert not re.search(LIVE, console.file.getvalue())
    shown = re.sub(r"\s+", "", console.file.getvalue())
    assert "[click](javascript:window.pwned=1)" in shown and "⟨ESC⟩[31mred" in shown


def test_nothing_is_live_in_the_summary(audited: Any, capfd: Any, monkeypatch: Any) -> None:
    from markdown_it import MarkdownIt

    out, _ = audited(capfd, monkeypatch)
    summary = (out / "summary.md").read_text()
    assert not re.search(LIVE, summary)
    rendered = MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(summary)
    assert set(re.findall(r"<(\w+)", rendered)) <= set("h2 h3 p ul li table thead tbody tr th td code".split())
    assert not re.search(LIVE, (out / "run.log").read_text())


def test_nothing_is_live_in_the_report(
    audited: Any, capfd: Any, monkeypatch: Any, open_page: Callable[[Path], Any]
) -> None:
    out, _ = audited(capfd, monkeypatch)
    page = out / "report.html"
    browser = open_page(page)
    browser.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert browser.execute_script("return typeof window.pwned") == "undefined"
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in sent if not url.startswith(("data:", "blob:"))] == [page.as_uri()]
    count = "return document.querySelectorAll(arguments[0]).length"
    assert browser.execute_script(count, "script") == 3
    assert browser.execute_script(count, "img, iframe, object, embed, form, link, base, audio, video, b [href]") == 0
    text = browser.execute_script("return document.querySelector('main').textContent")
    assert not re.search(LIVE, text.replace("\n", " "))
    shown = ("<script>window.pwned=1</script>", "onerror=", "⟨ESC⟩", "javascript:window")
    assert all(part in text for part in shown)  # as text
    assert page.stat().st_size < 8_000_000
    assert browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth") <= 0
