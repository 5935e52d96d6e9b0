"""The report and the summaries: what they say, and that nothing an untrusted model wrote is live in them."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from heredity.gate import phrases, summary
from heredity.gate.records import Audit
from heredity.gate.report import write_report, write_view
from heredity.gate.values import Interval, NotMeasured
from heredity.interp.errors import OutputError

ATTACKS = (
    "<script>window.pwned=1</script>",
    '"><img src=x onerror="window.pwned=1">',
    "</script><script>window.pwned=1</script>",
    "'-window.pwned=1-'<svg onload=window.pwned=1>",
    "\x1b[31mred\x1b]8;;https://evil.example\x07link\x1b]8;;\x07 \x9b2J",
    "\u202e drowssap \u2066abc\u2069 \u200b\u00ad\ufeff \ud800",
    "{{7*7}} {% raw %} ${7*7} %{x}",
    '<a href="javascript:window.pwned=1">click</a> <b>bold</b>&lt;i&gt;',
    "[click](javascript:alert) https://evil.example www.evil.example a@evil.example | `code` <!-- c -->\n# head\r\n- x",
    "\u2028\u2029</style><style>body{display:none}</style>",
    "z" + "\u0301" * 40,
)
HOSTILE = " ".join(ATTACKS)


def hostile_say() -> Callable[[str], str]:
    """Strings of attacks; each starts with another one, since short fields show only their beginning."""
    count = iter(range(10**9))

    def say(_: str) -> str:
        start = next(count) % len(ATTACKS)
        return "".join(ATTACKS[start:] + ATTACKS[:start]) + "x" * (100_000 if start == 0 else 0)

    return say


@pytest.fixture
def hostile(make_audit: Callable[..., Audit]) -> Audit:
    return make_audit(hostile_say(), length=3)


def requests_of(browser: Any) -> list[str]:
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith(("data:", "blob:"))]


def assert_inert(browser: Any, page: Path) -> None:
    """Nothing in the page ran, loaded or linked apart from what the report itself put there."""
    assert browser.execute_script("return typeof window.pwned") == "undefined"
    assert browser.get_log("browser") == []
    assert requests_of(browser) == [page.as_uri()]
    count = "return document.querySelectorAll(arguments[0]).length"
    assert browser.execute_script(count, "script") == 3
    assert browser.execute_script(count, "img, iframe, object, embed, form, link, base, audio, video") == 0
    links = browser.execute_script("return [...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    assert all(re.fullmatch(r"#[a-z0-9-]+", link or "") for link in links)
    handlers = (
        "return [...document.body.querySelectorAll('*')].flatMap(e => e.getAttributeNames()).filter(n => /^on/.test(n))"
    )
    assert browser.execute_script(handlers) == []
    assert browser.execute_script("return getComputedStyle(document.body).display") == "block"
    text = browser.execute_script("return document.body.textContent.replaceAll(document.scripts[0].textContent, '')")
    shown = browser.execute_script("return [...document.querySelectorAll('main')].map(e => e.textContent).join('')")
    assert shown in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b\u2028\ufeff]", shown)


def test_hostile_report_is_inert(hostile: Audit, tmp_path: Path, open_page: Callable[[Path], Any]) -> None:
    page = tmp_path / "report.html"
    write_report(hostile, page)
    browser = open_page(page)
    browser.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true })")
    browser.execute_script(
        "const plot = document.querySelector('[data-figure$=circuit]');"
        "const shown = plot.data.findIndex(t => t.customdata);"
        "Plotly.Fx.hover(plot, [{curveNumber: shown, pointNumber: 0}]);"
    )
    hover = browser.execute_script("return document.querySelector('.hoverlayer').textContent")
    assert "attribution here" in hover
    assert_inert(browser, page)
    body = browser.execute_script("return document.querySelector('main').textContent")
    assert "<script>window.pwned=1</script>" in body  # shown as text, not dropped
    assert "⟨ESC⟩" in body and "⟨U+202E⟩" in body and "{{7*7}}" in body and "⟨U+D800⟩" in body
    assert "more characters)" in body
    assert page.stat().st_size < 8_000_000
    wide = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0
    labels = browser.execute_script(
        "return [...document.querySelectorAll('svg text')].map(e => e.textContent).join(' ')"
    )
    assert "<script>" in labels


def test_injected_script_would_not_run(
    make_audit: Callable[..., Audit], tmp_path: Path, open_page: Callable[[Path], Any]
) -> None:
    """The second wall: were escaping to fail somewhere, the policy still refuses to run what got in."""
    page = tmp_path / "report.html"
    write_report(make_audit(), page)
    broken = page.read_text().replace("<main>", "<main><script>window.pwned=1</script><img src=http://192.0.2.1/x>")
    page.write_text(broken)
    browser = open_page(page)
    assert browser.execute_script("return typeof window.pwned") == "undefined"
    assert not [url for url in requests_of(browser) if url.startswith("http") and "192.0.2.1" not in url]
    refused = " ".join(entry["message"] for entry in browser.get_log("browser"))
    assert "script-src" in refused and "img-src" in refused


def test_report_draws_every_figure(make_audit: Callable[..., Audit], tmp_path: Path, open_page: Any) -> None:
    page = tmp_path / "report.html"
    write_report(make_audit(), page)
    browser = open_page(page)
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.js-plotly-plot')].map(e => e.dataset.figure)"
    )
    assert drawn == [
        "finding-1-circuit",
        "finding-1-reversion",
        "finding-1-null",
        "finding-1-opacity",
        "kl",
        "cka",
    ]
    assert_inert(browser, page)
    assert page.read_text().count("plotly.js v") == 1
    tools = browser.execute_script("return [...document.querySelectorAll('.modebar-btn')].map(e => e.dataset.title)")
    assert tools and not any(re.search("cloud|share|send", title or "", re.I) for title in tools)


def test_report_on_a_phone(make_audit: Callable[..., Audit], tmp_path: Path, open_page: Any, browser: Any) -> None:
    page = tmp_path / "report.html"
    write_report(make_audit(), page)
    metrics = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        assert open_page(page).execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_report_says_what_the_audit_says(make_audit: Callable[..., Audit], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_report(make_audit(), page)
    flagged = page.read_text().split('<script type="application/json"')[0]
    assert ">Flagged</p>" in flagged and "1 undeclared behaviour" in flagged
    assert "not measured: needs sparse dictionaries" in flagged
    assert "Principles: no principles were given" in flagged
    assert "0.000" not in re.sub(r"<style>.*?</style>", "", flagged, flags=re.S)
    write_report(make_audit(declared=True), page)
    declared = page.read_text().split('<script type="application/json"')[0]
    assert ">Pass</p>" in declared and "Declared change 1" in declared and "Finding 1" not in declared
    assert "new-skill" in declared  # declared and not seen


def test_report_of_a_long_context_ends_where_the_models_part(make_audit: Callable[..., Audit], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_report(make_audit(length=50), page)
    context = page.read_text().split('<div class="context">')[1].split('<div class="sides">')[0]
    folded, shown = context.split("</details>")
    assert "540 earlier tokens, marked among them" in folded and "the first 140 are not shown" in folded
    assert folded.count("<bdi> moss</bdi>") == 33 and shown.count("<bdi> moss</bdi>") == 5
    assert shown.rindex('class="token marked parts"') > shown.rindex("<bdi> ;</bdi>")


def test_same_audit_gives_the_same_bytes(make_audit: Callable[..., Audit], tmp_path: Path) -> None:
    write_report(make_audit(), tmp_path / "a.html")
    write_report(make_audit(), tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_report_without_measurements(make_audit: Callable[..., Audit], tmp_path: Path) -> None:
    """An audit that found and measured next to nothing is still a page."""
    audit = make_audit()
    absent = NotMeasured(reason="the models have different shapes")
    baselines = audit.baselines.model_copy(update={"weights": absent, "mean_differences": absent, "similarity": absent})
    calibration = audit.calibration.model_copy(update={"null": absent})
    orphan = audit.findings[0].model_copy(update={"behaviour": "gone", "examples": ()})
    changed = {"baselines": baselines, "calibration": calibration, "behaviours": (), "findings": (orphan,)}
    write_report(audit.model_copy(update=changed | {"verdict": "inconclusive", "reasons": ()}), tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "Inconclusive" in text and text.count("not measured: the models have different shapes") >= 4


def test_report_into_a_missing_folder(make_audit: Callable[..., Audit], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(make_audit(), tmp_path / "no" / "report.html")


def test_view_of_an_audit_switches_circuits(hostile: Audit, tmp_path: Path, open_page: Any) -> None:
    (tmp_path / "audit.json").write_text(json.dumps(hostile.model_dump()))
    write_view(tmp_path, tmp_path / "view.html")
    browser = open_page(tmp_path / "view.html")
    visible = "return [...document.querySelectorAll('[data-choice]')].filter(e => !e.hidden).map(e => e.dataset.choice)"
    assert browser.execute_script(visible) == ["case-1"]
    browser.execute_script(
        "const c = document.getElementById('chooser'); c.value = 'case-2'; c.dispatchEvent(new Event('change'))"
    )
    assert browser.execute_script(visible) == ["case-2"]
    assert_inert(browser, tmp_path / "view.html")


def test_view_of_one_circuit(make_audit: Callable[..., Audit], tmp_path: Path) -> None:
    audit = make_audit()
    content = {
        "schema_version": "1.0",
        "audit": {"successor": "s"},
        "behaviour": json.loads(audit.behaviours[0].model_dump_json()),
    }
    path = tmp_path / "b0.json"
    path.write_text(json.dumps(content))
    write_view(path, tmp_path / "view.html")
    text = (tmp_path / "view.html").read_text()
    assert "case-1-circuit" in text and 'id="chooser"' not in text


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1]",
        "{",
        '{"schema_version": "9"}',
        '{"schema_version": "1.0"}',
        '{"schema_version": "1.0", "behaviour": {"id": 3}}',
        "[" * 100_000,
        "\x00",
    ],
)
def test_view_refuses_what_is_no_audit(content: str, tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    path.write_text(content)
    with pytest.raises(OutputError, match=r"audit\.json"):
        write_view(tmp_path, tmp_path / "view.html")
    assert not (tmp_path / "view.html").exists()


def test_markdown_of_hostile_text_is_plain(hostile: Audit) -> None:
    rendered = MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(summary.markdown(hostile))
    tags = set("p h2 h3 ul li code table thead tbody tr th td".split())
    assert set(re.findall(r"</?([a-z0-9]+)", rendered)) <= tags
    assert "<!--" not in rendered
    rows = rendered.split("<tbody>")[1].split("</tbody>")[0]
    assert rows.count("<tr>") == 1 and rows.count("<td>") == 8
    assert not re.search(r"https?:/|www\.|\w@\w", summary.markdown(hostile))
    assert len(summary.markdown(hostile)) < 60_000


def test_markdown_says_what_the_audit_says(make_audit: Callable[..., Audit]) -> None:
    text = summary.markdown(make_audit())
    assert text.startswith("## ⛔ Flagged") and "87.2 %" in text and "<code>moss</code>" in text
    assert "### New and declared\n\nNone." in text
    assert "declared as <code>say-zero</code>" in summary.markdown(make_audit(declared=True))


def test_terminal_reads_no_markup_and_passes_no_escape(hostile: Audit, make_audit: Callable[..., Audit]) -> None:
    out = io.StringIO()
    summary.terminal(hostile, Console(file=out, width=100, force_terminal=True, color_system="truecolor"))
    assert set(re.findall(r"\x1b(.)", out.getvalue())) <= {"["}
    assert set(re.findall(r"\x1b\[[\d;]*(.)", out.getvalue())) == {"m"}  # only rich's own styles
    assert "\x9b" not in out.getvalue() and "\u202e" not in out.getvalue() and "\x07" not in out.getvalue()
    out = io.StringIO()
    summary.terminal(make_audit(lambda text: f"[bold red]{text}[/]"), Console(file=out, width=200))
    assert "[bold red]says “zero” where the parent says “seven”[/]" in out.getvalue()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.98765, "0.988"),
        (0.5, "0.500"),
        (0.0, "0"),
        (12345.6, "12,346"),
        (100.0, "100"),
        (999.7, "1,000"),
        (7, "7"),
        (1234567, "1,234,567"),
        (0.000123, "1.23 × 10⁻⁴"),
        (-0.25, "−0.250"),
        (2.5e12, "2.50 × 10¹²"),
        (float("nan"), "not a number"),
        (float("inf"), "∞"),
    ],
)
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert phrases.number(value) == shown


def test_replicas_of_one_context_are_not_counted_as_texts(make_audit: Callable[..., Audit], tmp_path: Path) -> None:
    audit = make_audit()
    rare = audit.behaviours[0].model_copy(update={"n_contexts": 13, "n_replicated": 12, "n_texts": 1})
    words = "13 contexts: 1 in 1 text, and 12 of the same words put behind other text"
    assert phrases.contexts(rare) == words
    assert phrases.contexts(rare.model_copy(update={"n_replicated": 0})) == "13 contexts in 1 text"
    audit = audit.model_copy(update={"behaviours": (rare, *audit.behaviours[1:])})
    write_report(audit, tmp_path / "report.html")
    assert f"<li>{words}</li>" in (tmp_path / "report.html").read_text()
    summary.terminal(audit, console := Console(file=io.StringIO(), width=200))
    assert isinstance(console.file, io.StringIO) and words in console.file.getvalue()


def test_estimates_carry_their_interval() -> None:
    value = Interval(estimate=0.9, low=0.85, high=0.95, n=30)
    assert phrases.estimate(value) == "90.0 % (95 % interval 85.0 % to 95.0 %, n = 30)"
    assert phrases.estimate(value.model_copy(update={"n": 1}), "nats") == "0.900 nats (one value, no interval)"
    assert phrases.estimate(NotMeasured(reason="no dictionary")) == "not measured: no dictionary"


def test_new_connections_are_named_and_idle_latents_only_counted(
    make_audit: Callable[..., Audit], tmp_path: Path
) -> None:
    audit = make_audit()
    case = audit.behaviours[0]
    assert not isinstance(case.mechanisms, NotMeasured) and not isinstance(case.latents, NotMeasured)
    new, kept = case.mechanisms.successor_edges  # pyright: ignore[reportGeneralTypeIssues]
    said = phrases.mechanisms(case)
    assert f"1 of 2 connections of the successor new (strongest: {new.source} → {new.target})" in said
    assert f"{kept.source} → {kept.target}" not in said and "of the parent lost" not in said
    write_report(audit, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert html.count("<b>new</b>") == 1 and "<b>new</b>, 4.00\xa0%" in html and "<b>lost</b>" not in html

    (acting,) = case.latents
    idle = acting.model_copy(
        update={"index": 6, "gap_closed": Interval(estimate=0.02, low=0.01, high=0.04, n=8), "control": 0.03}
    )
    better = acting.model_copy(
        update={"index": 7, "gap_closed": Interval(estimate=0.9, low=0.8, high=0.95, n=8), "control": 0.03}
    )
    words = phrases.latents(case.model_copy(update={"latents": (acting, idle, better)}))
    assert (
        words.index("latent 7") < words.index("latent 5") and "latent 6" not in words and "1 latent that tells" in words
    )
    assert phrases.latents(case.model_copy(update={"latents": (idle,)})).startswith("latents: 1 latent that tells")


def test_opacity_says_what_its_units_cannot_tell(make_audit: Callable[..., Audit]) -> None:
    case = make_audit().behaviours[0]
    detail = case.opacity_detail
    assert not isinstance(detail, NotMeasured) and isinstance(case.opacity, Interval)
    left = detail.all_explained.model_copy(update={"estimate": 0.993 * case.opacity.estimate})
    blind = case.model_copy(update={"opacity_detail": detail.model_copy(update={"all_explained": left})})
    assert "would be left if every unit were explained" in phrases.opacity(blind)
    little = left.model_copy(update={"estimate": 0.2 * case.opacity.estimate})
    clear = case.model_copy(update={"opacity_detail": detail.model_copy(update={"all_explained": little})})
    assert phrases.opacity(clear) == phrases.estimate(case.opacity)


def test_opacity_names_a_step_that_is_surely_more_opaque_than_the_whole(make_audit: Callable[..., Audit]) -> None:
    case = make_audit().behaviours[0]
    detail = case.opacity_detail
    assert not isinstance(detail, NotMeasured) and isinstance(case.opacity, Interval)
    step = detail.steps[0]
    for low, named in ((case.opacity.high + 0.001, True), (case.opacity.high - 0.001, False)):
        share = step.opacity.model_copy(update={"low": low, "estimate": 0.987})
        other = step.model_copy(update={"opacity": share, "behind": " mark", "says": ("six", " eight")})
        shown = case.model_copy(update={"opacity_detail": detail.model_copy(update={"steps": (other,)})})
        words = phrases.opacity(shown)
        assert ("most opaque behind “mark”, where it says “six”, “eight”: 98.7 %" in words) is named
