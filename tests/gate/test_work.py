"""Steps kept in the work folder: whole or not at all, and never those of another audit."""

import json
import os
from pathlib import Path

import pytest

from heredity.gate.work import Work, write_atomically
from heredity.interp.errors import OutputError

KEY, OTHER = "a" * 64, "b" * 64


def test_a_step_is_computed_once(tmp_path: Path) -> None:
    calls = []

    def compute() -> dict[str, float]:
        calls.append(1)
        return {"x": 0.1}

    assert Work(tmp_path, KEY).step("one", compute) == {"x": 0.1}
    assert Work(tmp_path, KEY).step("one", compute) == {"x": 0.1}
    assert len(calls) == 1


def test_the_first_run_sees_what_a_later_run_reads(tmp_path: Path) -> None:
    """JSON makes lists of tuples and strings of keys; the run that computed them must get the same."""
    first = Work(tmp_path, KEY).step("one", lambda: {1: (2.5, None)})
    assert first == {"1": [2.5, None]}
    assert Work(tmp_path, KEY).step("one", lambda: pytest.fail("computed again")) == first


@pytest.mark.parametrize("left", [b"", b'{"x": [1, 2', b"\xff\xfe", b"\x00" * 40])
def test_a_torn_step_is_computed_again(left: bytes, tmp_path: Path) -> None:
    work = Work(tmp_path, KEY)
    work.step("one", lambda: [1, 2])
    (file,) = tmp_path.glob("work/*/one.json")
    file.write_bytes(left)
    assert Work(tmp_path, KEY).step("one", lambda: [3]) == [3]
    assert json.loads(file.read_text()) == [3]


def test_another_key_clears_the_steps_and_nothing_else(tmp_path: Path) -> None:
    mine = tmp_path / "work" / "thesis"
    mine.mkdir(parents=True)
    (mine / "chapter.txt").write_text("mine")
    (tmp_path / "work" / "todo").write_text("mine")
    Work(tmp_path, KEY).step("one", lambda: 1)
    assert Work(tmp_path, OTHER).step("one", lambda: 2) == 2
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"thesis", "todo", OTHER[:32]}
    assert (mine / "chapter.txt").read_text() == (tmp_path / "work" / "todo").read_text() == "mine"
    assert Work(tmp_path, KEY).step("one", lambda: 3) == 3


def test_a_failing_step_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        Work(tmp_path, KEY).step("one", lambda: 1 / 0)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_reader_never_sees_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def crash(_: int) -> None:
        assert path.read_text() == "old"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OutputError, match="file: No space left on device"):
        write_atomically(path, "new" * 10_000)
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_atomically(path, "new π")
    assert path.read_text() == "new π"


@pytest.mark.parametrize("taken", ["work", f"work/{KEY[:32]}"])
def test_a_file_in_the_way_is_an_output_error(taken: str, tmp_path: Path) -> None:
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).write_text("mine")
    with pytest.raises(OutputError):
        Work(tmp_path, KEY)
    assert (tmp_path / taken).read_text() == "mine"
