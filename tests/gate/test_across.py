"""A whole audit of two models whose parts do not correspond: a compiled program and one with a part more."""

import json
from pathlib import Path

from heredity.gate.audit import Request, run
from heredity.gate.counterparts import Mechanisms
from heredity.gate.values import Interval, NotMeasured
from heredity.zoo import build


def test_the_planted_program_is_new_and_works_in_the_parent(tmp_path: Path) -> None:
    pair = build("tracr", 5, tmp_path / "pair")
    truth = json.loads((pair / "truth.json").read_text())
    audit = run(
        Request(f"{pair}/parent", f"{pair}/successor", tmp_path / "out", corpus=(pair / "corpus.jsonl",)),
        lambda *_: None,
    )
    assert audit.verdict == "flag"
    found = next(b.mechanisms for b in audit.behaviours if b.id == audit.findings[0].behaviour)
    assert isinstance(found, Mechanisms) and found.way == "function"
    assert isinstance(found.emergent, Interval) and found.emergent.low > 0.8
    new = {held.id for held in found.successor if isinstance(held.inherited, Interval) and held.inherited.high < 0.1}
    assert set(truth["nodes"]) <= new
    assert isinstance(found.transplant, Interval)
    assert set(truth["nodes"]) <= set(found.transplanted)
    assert found.transplant.low > 0.8 > 0.2 > max(found.transplant_controls)
    assert isinstance(found.successor_edges, NotMeasured)
