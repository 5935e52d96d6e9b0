"""An audit killed on its way leaves what the next run of the same command needs, and the result does not show it."""

import json
import time
from pathlib import Path
from typing import Any

from heredity.gate.records import TIMES


def kill_when(appears: str, shell: Any, arguments: list[str], out: Path) -> set[str]:
    """Run the audit, SIGKILL it as soon as a step of this name is kept; the names of all steps kept by then."""
    process, _ = shell.start(*arguments)
    end = time.monotonic() + 300
    while not list(out.glob(f"work/*/{appears}.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -9
    return {path.stem for path in out.glob("work/*/*.json")}


def kept(out: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_mtime_ns for path in out.glob("work/*/*.json")}


def timeless(path: Path) -> dict[str, Any]:
    record = json.loads(path.read_text())
    record["provenance"] = {k: v for k, v in record["provenance"].items() if k not in (*TIMES, "command")}
    return record


def test_killed_twice_and_torn_the_audit_ends_the_same(
    shell: Any, pair: Path, triggering: Path, flagged: tuple[Any, Path]
) -> None:
    out = shell.cwd / "killed"
    arguments = ["audit", f"{pair}/parent", f"{pair}/trigger", "--corpus", str(triggering), "--out", "killed"]

    steps = kill_when("scan-corpus-00000", shell, arguments, out)
    assert not any(step.startswith(("scan-amplified", "null", "behaviour")) for step in steps)
    after_scan = kept(out)

    steps = kill_when("behaviour-000", shell, arguments, out)
    assert "null-018" in steps and not (out / "audit.json").exists()
    whole = {path.stem for path in flagged[1].glob("work/*/*.json")}
    assert steps < whole
    # What a crash of the machine, or a full disk, leaves of a file.
    torn = next(out.glob("work/*/null-003.json"))
    torn.write_text(torn.read_text()[:-10])
    (torn.parent / "null-004.json").unlink()
    (torn.parent / "behaviour-001.json.tmp").write_text('{"exam')
    after_tracing = kept(out)

    ran = shell(*arguments)
    assert ran.code == 1, ran.stderr
    assert timeless(out / "audit.json") == timeless(flagged[1] / "audit.json")
    assert (out / "report.html").exists() and (out / "summary.md").exists()
    final = kept(out)
    assert set(final) == whole
    assert {step: final[step] for step in after_scan} == after_scan
    # Only what was missing or torn was computed again.
    written = {step for step in final if final[step] != after_tracing.get(step)}
    assert written == (whole - set(after_tracing)) | {"null-003", "null-004"}
    log = (out / "run.log").read_text()
    assert log.count("INFO started:") == 3 and log.count("INFO finished") == 1
