"""modeldiffr 0.9.3 on the same pairs, by its own command line, in an environment of its own.

    python benchmarks/peers.py install DIR modeldiffr

``modeldiffr scan PARENT SUCCESSOR`` sweeps 299 probes of its own (English, odd characters, words of the vocabulary) and
searches for a trigger of four tokens by gradients. It takes no corpus; in the zoo's vocabulary of 118 words its English
probes are mostly unknown words, its other probes and its search use the vocabulary. It flags a pair where a probe
diverges by a robust z of 6 and 0.05 nats, or the search finds four times a random trigger's divergence. Both are its
scores here: ``sweep_score``, and the divergence that the search reached. ``modeldiffr features`` trains a crosscoder on
the pair's corpus and counts latents that only the successor has.
"""

import json
from pathlib import Path
from typing import Any

from detection_process import timed
from peers import missing, python

DICTIONARY = ("--dict-size", "512", "--k", "16", "--steps", "500", "--batch-size", "1024")
"""A dictionary eight times as wide as the zoo's streams; by default it has 4096 latents and takes 2000 steps."""


def scan(directory: Path, pair: Path, out: Path) -> dict[str, Any]:
    """Scores of a pair by ``scan`` and ``features``, or ``refused``: its last words. Done once."""
    kept = out / "modeldiffr.json"
    if not kept.exists():
        out.mkdir(parents=True, exist_ok=True)
        scanned = _run(directory, out / "scan", "scan", pair)
        found = _run(directory, out / "features", "features", pair, "--corpus", pair / "corpus.jsonl", *DICTIONARY)
        kept.write_text(json.dumps({"scan": scanned, "features": found}, indent=1))
    result = json.loads(kept.read_text())
    return {
        "scan": _scan_scores(result["scan"], out / "scan"),
        "features": _classes(result["features"], out / "features"),
    }


def _run(directory: Path, out: Path, command: str, pair: Path, *arguments: Path | str) -> dict[str, Any]:
    program = [python(directory, "modeldiffr").parent / "modeldiffr", command, pair / "parent", pair / "successor"]
    done = timed([*program, "--device", "cpu", *arguments, "--out", out], out.with_suffix(".log"))
    return {"refused": done["said"] if done["status"] else None, **done}


def _scan_scores(run: dict[str, Any], out: Path) -> dict[str, Any]:
    if run["refused"]:
        return run
    said = json.loads((out / "scan.json").read_text())
    search = said["search"]
    return {
        **run,
        "flagged": said["flagged"],
        "sweep": said["summary"]["sweep_score"],
        "search": search["kl"] if search else 0.0,
        "trigger": search["trigger"] if search else None,
    }


def _classes(run: dict[str, Any], out: Path) -> dict[str, Any]:
    return run if run["refused"] else {**run, **json.loads((out / "features.json").read_text())["classes"]}


def why_not(directory: Path | None) -> str | None:
    """Why modeldiffr cannot take part, or None."""
    return missing(directory, "modeldiffr")
