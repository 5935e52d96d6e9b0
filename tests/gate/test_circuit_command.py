"""``heredity circuit`` as a user starts it: what it prints and writes, what it refuses, resuming, estimates."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from heredity.circuits.circuit_record import load_arrays, load_circuit

TASK = """
name: report
fillers:
  numbers: [one, two, three, four, five, six, seven, eight, nine]
  owners: [moss, reed, wade, lane, park, frost, hart]
  places: [cove, mill, dock, farm, gate, tower, lodge]
slots: {N: numbers, M: numbers, O: owners, P: places}
single: [numbers, owners, places]
templates:
  - clean: "log : owner {O} ; place {P} ; value {N} ; report"
    counterfactual: "log : owner {O} ; place {P} ; value {M} ; report"
    right: " {N}"
    wrong: " {M}"
"""


@pytest.fixture(scope="module")
def arguments(shell: Any, pair: Path) -> list[str]:
    (shell.cwd / "report.yaml").write_text(TASK)
    return ["circuit", f"{pair}/parent", "--task", "report.yaml", "--pairs", "24"]


@pytest.fixture(scope="module")
def written(shell: Any, arguments: list[str]) -> tuple[Any, Path]:
    ran = shell(*arguments, "--out", "new/circuit.json")
    return ran, shell.cwd / "new" / "circuit.json"


def timeless(path: Path) -> dict[str, Any]:
    return {name: value for name, value in json.loads(path.read_text()).items() if name != "seconds"}


def test_it_prints_the_evidence_and_writes_two_files(written: tuple[Any, Path]) -> None:
    ran, path = written
    assert (ran.code, ran.stderr) == (0, ""), ran.stderr
    record = load_circuit(path)
    load_arrays(path, record)
    assert sorted(p.name for p in path.parent.iterdir()) == ["circuit.json", "circuit.safetensors"]
    assert f"{record.size} of {record.layout.n_edges} edges" in ran.stdout
    assert "CMD" in ran.stdout and "Jaccard" in ran.stdout and "of the effect (95 % confidence)" in ran.stdout
    assert ran.stdout.endswith("Circuit: new/circuit.json\n")
    assert record.model.spec.endswith("/parent") and record.task.discovery_pairs == 12


def test_json_is_the_file(shell: Any, arguments: list[str], written: tuple[Any, Path]) -> None:
    ran = shell(*arguments, "--out", "as.json", "--json")
    assert ran.code == 0 and ran.stdout == (shell.cwd / "as.json").read_text()
    assert timeless(shell.cwd / "as.json") == timeless(written[1])


def test_killed_twice_it_ends_the_same(shell: Any, arguments: list[str], written: tuple[Any, Path]) -> None:
    work = shell.cwd / "killed.json.work"
    for appears in ("attribution.safetensors", "missed.json"):
        process, _ = shell.start(*arguments, "--out", "killed.json")
        end = time.monotonic() + 300
        while not list(work.glob(f"work/*/{appears}")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert process.returncode == -9 and not (shell.cwd / "killed.json").exists()
    torn = next(work.glob("work/*/screen.json"))
    torn.write_text(torn.read_text()[:-5])
    arrays = next(work.glob("work/*/attribution.safetensors"))
    kept = arrays.stat().st_mtime_ns
    assert kept < torn.stat().st_mtime_ns
    ran = shell(*arguments, "--out", "killed.json")
    assert ran.code == 0, ran.stderr
    assert timeless(shell.cwd / "killed.json") == timeless(written[1])
    assert (shell.cwd / "killed.safetensors").read_bytes() == written[1].with_suffix(".safetensors").read_bytes()
    assert not work.exists()


def test_an_estimate_reads_no_weights(shell: Any, arguments: list[str], written: tuple[Any, Path]) -> None:
    ran = shell(*arguments, "--estimate")
    assert ran.code == 0 and "minutes" in ran.stdout and "GB of memory" in ran.stdout
    said = json.loads(shell(*arguments, "--estimate", "--json").stdout)
    record = load_circuit(written[1])
    layout = record.layout
    assert (said["sources"], said["destinations"], said["edges"]) == (
        len(layout.sources), len(layout.destinations), layout.n_edges,
    )  # fmt: skip
    assert said["parameters"] == record.model.n_params and said["pairs"] == 24
    assert said["tokens"] == len(record.tokens) and 0 < said["tokens_run"] < said["tokens"]
    assert said["seconds"] > 0 and said["peak_bytes"] > 4 * said["parameters"]


REFUSED = {
    "no place to write": ((), "no file to write"),
    "not a .json": (("--out", "circuit.txt"), "ends in '.txt'"),
    "a directory": (("--out", "folder.json"), "is a directory"),
    "no such task": (("--out", "a.json", "--task", "ioii"), "neither a shipped task nor"),
    "a task of other words": (("--out", "a.json", "--task", "ioi"), "no single token for this tokenizer"),
    "a task it does not do": (("--out", "a.json", "--task", "wrong.yaml"), "prefers the right answer on 0%"),
    "no estimate for the hub": (("--estimate", "HUB"), "an estimate needs config.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_in_one_line(case: str, shell: Any, arguments: list[str]) -> None:
    options, said = REFUSED[case]
    (shell.cwd / "folder.json").mkdir(exist_ok=True)
    swapped = TASK.replace('right: " {N}"', 'right: " {X}"').replace('wrong: " {M}"', 'wrong: " {N}"')
    (shell.cwd / "wrong.yaml").write_text(swapped.replace("{X}", "{M}"))
    given = [arguments[0], "somebody/model" if "HUB" in options else arguments[1], *arguments[2:]]
    ran = shell(*given, *(option for option in options if option != "HUB"))
    assert ran.code == 2, ran.stderr
    assert said in ran.stderr and ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1
    assert ran.stdout == "" and not (shell.cwd / "a.json").exists()
