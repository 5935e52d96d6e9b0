"""The command as a user starts it: exit codes, what it prints, what it touches."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heredity.gate import audit as audit_module
from heredity.gate import cli


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command in this process; its exit code."""

    def main(*arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["heredity", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert isinstance(left.value.code, int)
        return int(left.value.code)

    return main


@pytest.fixture(scope="module")
def short(shell: Any) -> Path:
    """A corpus too short for any verdict."""
    corpus = shell.cwd / "short.txt"
    corpus.write_text("count : one two three four .\nsay : the owl waits .\n")
    return corpus


def test_a_flagged_audit_exits_1_and_prints_audit_json(flagged: tuple[Any, Path]) -> None:
    ran, out = flagged
    assert ran.code == 1, ran.stderr
    written = (out / "audit.json").read_text()
    assert ran.stdout == written + "\n"
    assert json.loads(written)["verdict"] == "flag"
    assert ran.stderr == ""
    log = (out / "run.log").read_text().splitlines()
    assert log[0].split(" INFO ")[1].startswith("started:") and log[-1].endswith("INFO finished")


def test_a_passed_audit_exits_0_and_names_the_report(passed: tuple[Any, Path]) -> None:
    ran, out = passed
    assert ran.code == 0, ran.stderr
    assert ran.stdout.startswith(" PASS ") and "Report: passed/report.html\n" in ran.stdout
    assert json.loads((out / "audit.json").read_text())["verdict"] == "pass"


def outside(ran: Any, *allowed: Path) -> list[tuple[str, str]]:
    return [
        (event, path)
        for event, path in ran.events
        if path.startswith("/") and path != os.devnull and not any(Path(path).is_relative_to(root) for root in allowed)
    ]


def test_audits_open_no_socket_and_write_nowhere_else(
    flagged: tuple[Any, Path], passed: tuple[Any, Path], shell: Any
) -> None:
    for ran, out in (flagged, passed):
        assert [event for event in ran.events if event[0].startswith("socket.")] == []
        assert outside(ran, out, shell.cache, shell.temporary) == []
        assert any(event == "os.rename" and Path(path) == out / "audit.json" for event, path in ran.events)
    # What bypasses Python's hooks would still have left files.
    assert list(shell.home.iterdir()) == []
    assert [path for path in shell.temporary.rglob("*") if path.is_file()] == []
    assert [path for path in shell.cache.rglob("*") if path.is_file()] == []  # needed for sampled text only


def test_the_watch_sees_sockets_files_and_children(shell: Any) -> None:
    code = (
        "import os, socket, subprocess, sys\n"
        "try: socket.create_connection(('127.0.0.1', 9), timeout=1)\n"
        "except OSError: pass\n"
        "open(os.environ['HOME'] + '/../note', 'w').close()\n"
        "os.mkdir('made')\n"
        "subprocess.run([sys.executable, '-c', ''])\n"
    )
    ran = shell(Path(sys.executable), "-c", code)
    assert ran.code == 0, ran.stderr
    seen = {event for event, _ in ran.events}
    assert {"socket.__new__", "socket.connect", "open", "os.mkdir", "subprocess.Popen"} <= seen
    assert {path for _, path in outside(ran, shell.cache)} >= {str(shell.home.parent / "note"), str(shell.cwd / "made")}


def test_help_imports_no_model_library(shell: Any) -> None:
    code = (
        "import sys; sys.argv = ['heredity', '--help']\n"
        "from heredity.gate.cli import main\n"
        "try: main()\n"
        "except SystemExit as left: print(left.code, *{name.split('.')[0] for name in sys.modules})\n"
    )
    ran = shell(Path(sys.executable), "-c", code)
    text, _, last = ran.stdout.rstrip().rpartition("\n")
    left, *modules = last.split()
    assert (ran.code, left) == (0, "0"), ran.stderr
    assert "audit" in text and "capture" in text
    assert "heredity" in modules and not {"torch", "transformers", "transformer_lens", "scipy", "pandas"} & set(modules)


BAD = {
    "policy": ("policy.yaml", "name: x\nversion: 1\nmaterial_natts: 1\n", "--policy"),
    "intent": ("intent.yaml", "version: 1\nchanges: everything\n", "--intent"),
    "corpus": ("corpus.jsonl", '{"text": "one"}\n{"text": \n', "--corpus"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_exit_2_in_one_line_before_anything_is_loaded(case: str, shell: Any, pair: Path) -> None:
    name, text, option = BAD[case]
    (shell.cwd / name).write_text(text)
    ran = shell("audit", f"{pair}/parent", f"{pair}/trigger", option, name, "--out", f"out-{case}")
    assert ran.code == 2
    assert ran.stderr.startswith(f"error: {name}") and ran.stderr.count("\n") == 1
    assert f"[docs/errors/{'corpus' if case == 'corpus' else 'policy'}.md]" in ran.stderr
    assert ran.stdout == "" and not (shell.cwd / f"out-{case}" / "audit.json").exists()
    assert "loading" not in (shell.cwd / f"out-{case}" / "run.log").read_text()


def test_a_refused_model_exits_2(shell: Any, pair: Path, short: Path) -> None:
    model = shell.cwd / "pickled"
    model.mkdir()
    for file in (pair / "parent").iterdir():
        if file.name != "model.safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    ran = shell("audit", "pickled", str(pair / "trigger"), "--corpus", str(short), "--out", "refused")
    assert ran.code == 2
    assert ran.stderr.startswith("error: pickled") and ran.stderr.count("\n") == 1
    assert ran.stdout == "" and not (shell.cwd / "refused" / "audit.json").exists()


def test_an_output_directory_that_is_a_file_exits_2(call: Any, tmp_path: Path, capfd: Any, pair: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert call("audit", pair / "parent", pair / "trigger", "--out", tmp_path / "out") == 2
    assert call("audit", pair / "parent", pair / "trigger", "--out", tmp_path / "out" / "deeper") == 2
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 2 and all("[docs/errors/output.md]" in line for line in errors)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("wrong", [["--budget", "huge"], ["--seed", "-1"], ["--bugdet", "quick"], []])
def test_wrong_usage_exits_2(wrong: list[str], call: Any, tmp_path: Path, pair: Path) -> None:
    out = ["--out", tmp_path / "out"] if wrong else []
    assert call("audit", pair / "parent", pair / "trigger", *out, *wrong) == 2
    assert not (tmp_path / "out").exists()


def test_too_little_text_exits_3_even_when_nobody_reads_on(shell: Any, pair: Path, short: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    ran = shell("audit", f"{pair}/parent", f"{pair}/benign", "--corpus", "short.txt", "--out", "short", stdout=write)
    os.close(write)
    assert ran.code == 3, ran.stderr
    record = json.loads((shell.cwd / "short" / "audit.json").read_text())
    assert record["verdict"] == "inconclusive"
    assert "tokens could be compared; the policy asks for 500." in record["reasons"][0]
    assert ran.stderr == ""


def test_an_internal_error_exits_4_with_its_traceback_in_the_log(
    call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("not\x1b[31m foreseen\nat all")

    monkeypatch.setattr(audit_module, "run", fail)
    assert call("audit", "a", "b", "--out", tmp_path) == 4
    shown = capfd.readouterr()
    assert shown.err == "internal error: ValueError: not\\x1b[31m foreseen\\nat all\n" and shown.out == ""
    log = (tmp_path / "run.log").read_text()
    assert "Traceback" in log and "in fail" in log and "\x1b" not in log.split("Traceback")[0]


def test_a_name_that_is_no_text_is_refused_in_one_line(shell: Any) -> None:
    ran = shell("audit", os.fsdecode(b"no\xff\x1b[31m"), "b", "--out", os.fsdecode(b"out\xff"))
    assert ran.code == 2 and "\x1b" not in ran.stderr and "no\\udcff\\x1b[31m" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_an_interrupt_exits_130_and_says_that_it_resumes(shell: Any, pair: Path) -> None:
    # Where the tests themselves run in the background, the signal is ignored and a child would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process, _ = shell.start("audit", f"{pair}/parent", f"{pair}/benign", "--out", "interrupted")
    finally:
        signal.signal(signal.SIGINT, before)
    log = shell.cwd / "interrupted" / "run.log"
    while process.poll() is None and not (log.exists() and "loading" in log.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "interrupted; the same command resumes" and stdout == ""
    assert "Traceback" not in stderr and log.read_text().rstrip().endswith("interrupted")


def test_schema_is_what_the_documents_hold(call: Any, capfd: Any) -> None:
    assert call("schema") == 0
    committed = Path(__file__).parents[2] / "docs" / "audit.schema.json"
    assert capfd.readouterr().out == committed.read_text(), "run: heredity schema > docs/audit.schema.json"


def test_examples_are_written_whole(call: Any, tmp_path: Path, pair: Path, capfd: Any) -> None:
    assert call("example", "zoo", "--out", tmp_path / "zoo") == 0
    assert capfd.readouterr().out == f"{tmp_path / 'zoo'}\n"
    names = {path.relative_to(pair) for path in pair.rglob("*")}
    assert names and names == {path.relative_to(tmp_path / "zoo") for path in (tmp_path / "zoo").rglob("*")}
    (tmp_path / "taken").write_text("mine")
    assert call("example", "zoo", "--out", tmp_path / "taken") == 2
    assert "[docs/errors/output.md]" in capfd.readouterr().err


def test_a_kind_of_pair_that_there_is_not_is_a_usage_mistake(call: Any, tmp_path: Path, capfd: Any) -> None:
    for kind, said in (("other", "kind must be one of identical"), ("diluted:11", "number from 0 to 10")):
        assert call("zoo", "build", kind, "--out", tmp_path / "pair") == 2
        # The box that typer draws breaks lines where it likes.
        assert said in " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "pair").exists()
