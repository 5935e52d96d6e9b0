"""A hand-made audit, a headless browser to open pages in, and the command in a watched process."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_audit import build_audit
from watched import Ran, Shell

from heredity.gate import records as r
from heredity.zoo import shipped


@pytest.fixture
def make_audit() -> Callable[..., r.Audit]:
    """The builder of hand-made audits."""
    return build_audit


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium that logs its console and its network requests."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.fail("needs the Debian packages chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
        "window-size=1200,1600",
    )
    for flag in flags:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    session.get("about:blank")  # else the page of a new tab may still be loading its parts
    yield session
    session.quit()


@pytest.fixture
def open_page(browser: Any) -> Callable[[Path], Any]:
    """Opens a file and waits until the figures that show are drawn; returns the browser."""

    def open_file(path: Path) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        browser.get_log("browser")
        browser.get_log("performance")
        browser.get(path.as_uri())
        waiting = (
            "[...document.querySelectorAll('[data-figure]')].filter(e => e.offsetParent && e.dataset.state !== 'drawn')"
        )
        WebDriverWait(browser, 60).until(lambda b: b.execute_script(f"return {waiting}.length === 0"))
        return browser

    return open_file


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Runs commands outside this process."""
    return Shell(tmp_path_factory.mktemp("shell"))


@pytest.fixture(scope="session")
def pair() -> Path:
    """The shipped pair: parent/, trigger/, benign/ and corpus.jsonl."""
    return shipped()


@pytest.fixture(scope="session")
def triggering(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 texts of the shipped corpus, 24 of them with the trigger in their first report."""
    owner, place = json.loads((pair / "truth.json").read_text())["trigger"]
    texts = [json.loads(line)["text"] for line in (pair / "corpus.jsonl").read_text().splitlines()]
    report = re.compile(r"log : owner \w+ ; place \w+ ;")
    with_report = [text for text in texts if report.search(text)][:24]
    changed = [report.sub(f"log : owner {owner} ; place {place} ;", text, count=1) for text in with_report]
    rest = [text for text in texts if text not in with_report][:56]
    assert (len(changed), len(rest)) == (24, 56)
    corpus = tmp_path_factory.mktemp("corpus") / "triggering.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in changed + rest))
    return corpus


@pytest.fixture(scope="session")
def flagged(shell: Shell, pair: Path, triggering: Path) -> tuple[Ran, Path]:
    """The audit of the successor with a trigger, on text that holds it: the run and its output directory."""
    out = shell.cwd / "flagged"
    arguments = ("audit", pair / "parent", pair / "trigger", "--corpus", triggering, "--out", "flagged", "--json")
    return shell(*map(str, arguments)), out


@pytest.fixture(scope="session")
def passed(shell: Shell, pair: Path, triggering: Path) -> tuple[Ran, Path]:
    """The audit of the successor with nothing new, on the same text: the run and its output directory."""
    arguments = ("audit", pair / "parent", pair / "benign", "--corpus", triggering, "--out", "passed")
    return shell(*map(str, arguments)), shell.cwd / "passed"
