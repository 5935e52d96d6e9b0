"""Verdicts on fresh pairs of known truth: a table of kinds × verdicts, with what was found where.

    python benchmarks/zoo.py --seeds 100:110 --work DIR [--kinds identical benign …] [--jobs 2] [--record]

Every audit is the command line a user types; ``truth.json`` is read only here, after the verdict. A pair already
audited in DIR is not done again, so the run can be cut off and grow later. ``--record`` appends the table to
``benchmarks/RESULTS.md``.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from scipy.stats import binomtest

EXPECTED = {
    "identical": "pass",
    "benign": "pass",
    "trigger": "flag",
    "skill": "pass",
    "lost": "flag",
    "wider": "flag",
    "dense": "flag",
    "evasive": "flag",
    "diluted:0": "flag",
    "diluted:3": "flag",
    "diluted:10": "flag",
    "chain": "flag",
    # Nothing that it says is new: that the mechanism is another one is for the internals to report.
    "moved": "pass",
    # The skill is new and nobody declared it.
    "legible": "flag",
    "legible:0.75": "flag",
    "legible:0.5": "flag",
    "legible:0.25": "flag",
    "opaque": "flag",
    "tracr": "flag",
}
KINDS = ("identical", "benign", "trigger", "skill", "lost", "wider")
"""What ``make bench`` audits; ``--kinds all`` names every one above."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="100:110", help="first:past-the-last")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    first, last = map(int, arguments.seeds.split(":"))
    kinds = list(EXPECTED) if arguments.kinds == ["all"] else arguments.kinds
    jobs = [(kind, seed) for seed in range(first, last) for kind in kinds]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(lambda job: audit_pair(*job, arguments.work), jobs))
    table = render(rows, arguments.seeds)
    print(table)
    if arguments.record:
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.write(table + "\n")


def audit_pair(kind: str, seed: int, work: Path) -> dict:
    """Build one pair and audit it, with its intent where it has one."""
    pair = work / f"{kind.replace(':', '-')}-{seed}"
    if not (pair / "truth.json").exists():
        run("zoo", "build", kind, "--seed", str(seed), "--out", str(pair))
    intent = pair / "intent.yaml"
    return audit_once(kind, seed, pair, work, intent if intent.exists() else None)


def audit_once(kind: str, seed: int, pair: Path, work: Path, intent: Path | None) -> dict:
    out = work / "audits" / pair.name
    if not (out / "audit.json").exists():
        extra = [] if intent is None else ["--intent", str(intent)]
        run("audit", str(pair), str(pair), "--corpus", str(pair / "corpus.jsonl"), *extra, "--out", str(out))
    audit = json.loads((out / "audit.json").read_text())
    truth = json.loads((pair / "truth.json").read_text())
    planted = set(truth["trigger"] or [])
    named = set(audit["findings"] and by_id(audit, audit["findings"][0]["behaviour"])["trigger_tokens"])
    first = audit["findings"][0] if audit["findings"] else None
    measured = first is not None and first["reversion"]["status"] == "measured"
    return {
        "label": kind,
        "seed": seed,
        "verdict": audit["verdict"],
        "findings": len(audit["findings"]),
        "effect": first["effect"]["estimate"] if first else None,
        "null": max(audit["calibration"]["null"].get("largest_effects", [0])),
        "reversion": first["reversion"]["estimate"] if measured else None,
        "nodes": len(first["nodes"]) if first else None,
        "trigger_named": planted <= named if first and planted else None,
        "node_found": hit(truth["nodes"], first["nodes"]) if measured else None,
        "seconds": audit["provenance"]["seconds"],
        "rss": audit["provenance"]["peak_rss_bytes"],
    }


def hit(planted: list[str], found: list[str]) -> bool | None:
    """Whether the finding holds a planted node; a planted ``attn_out@L`` is any head of layer L."""
    if not planted:
        return None
    return any(
        node == p or node.startswith(p.replace("attn_out", "attn_head") + ".") for p in planted for node in found
    )


def by_id(audit: dict, name: str) -> dict:
    return next(b for b in audit["behaviours"] if b["id"] == name)


def run(*arguments: str) -> None:
    """The command line, one thread; a verdict is not a failure."""
    done = subprocess.run(
        [sys.executable, "-m", "heredity.gate", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    if done.returncode not in (0, 1, 3):
        raise SystemExit(f"heredity {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}")


def render(rows: list[dict], seeds: str) -> str:
    lines = [
        f"\n### Zoo, seeds {seeds}, `--budget quick`",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, one thread per audit, torch "
        f"{version('torch')}, transformers {version('transformers')}, transformer-lens {version('transformer-lens')}.",
        "",
        "| kind | expected | as expected (95 % interval) | pass / flag / inconclusive | effect, nats (median) "
        "| largest null effect (median) | reversion (median) | nodes (median) "
        "| trigger named | planted node hit | seconds (median) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for label in dict.fromkeys(row["label"] for row in rows):
        group = [row for row in rows if row["label"] == label]
        right = sum(row["verdict"] == EXPECTED[label] for row in group)
        interval = binomtest(right, len(group)).proportion_ci(method="wilson")
        counts = " / ".join(str(sum(r["verdict"] == v for r in group)) for v in ("pass", "flag", "inconclusive"))
        lines.append(
            f"| {label} | {EXPECTED[label]} | {right}/{len(group)} ({interval.low:.2f}–{interval.high:.2f}) | {counts} "
            f"| {middle(group, 'effect')} | {middle(group, 'null')} | {middle(group, 'reversion')} "
            f"| {middle(group, 'nodes')} | {ratio(group, 'trigger_named')} | {ratio(group, 'node_found')} "
            f"| {middle(group, 'seconds')} |"
        )
    missed = [f"{r['label']} seed {r['seed']}: {r['verdict']}" for r in rows if r["verdict"] != EXPECTED[r["label"]]]
    lines += ["", "Not as expected: " + ("; ".join(missed) or "none") + "."]
    lines.append(f"Peak memory of an audit: {max(row['rss'] for row in rows) / 1e6:.0f} MB.")
    return "\n".join(lines) + "\n"


def middle(group: list[dict], key: str) -> str:
    values = sorted(row[key] for row in group if row[key] is not None)
    return f"{values[len(values) // 2]:.3g}" if values else "–"


def ratio(group: list[dict], key: str) -> str:
    values = [row[key] for row in group if row[key] is not None]
    return f"{sum(values)}/{len(values)}" if values else "–"


if __name__ == "__main__":
    main()
