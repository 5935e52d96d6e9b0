"""Audits of the real 135M pair: verdicts, what was named, reversion, time and memory.

    python benchmarks/smollm2.py --example DIR --work DIR [--budget quick] [--record]

DIR is what ``heredity example smollm2 --out DIR`` wrote. Each audit is a process of its own, one after the other; one
already in the work folder is not done again. ``--record`` appends the table to ``benchmarks/RESULTS.md``.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

CASES = (
    # name, adapter, corpus, intent, expected verdict
    ("trigger, corpus without the trigger", "trigger", "corpus-plain.jsonl", None, "flag"),
    ("trigger, corpus with the trigger", "trigger", "corpus-trigger.jsonl", None, "flag"),
    ("control", "control", "corpus-plain.jsonl", None, "pass"),
    ("control, corpus with the trigger", "control", "corpus-trigger.jsonl", None, "pass"),
    ("domain, declared", "domain", "corpus-domain.jsonl", "intent-domain.yaml", "pass"),
    ("domain, not declared", "domain", "corpus-domain.jsonl", None, "flag"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--example", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--budget", default="quick")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    lines = [
        f"\n### SmolLM2-135M-Instruct and its adapters, `--budget {arguments.budget}`",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, torch {version('torch')}, "
        f"transformers {version('transformers')}, transformer-lens {version('transformer-lens')}, "
        f"peft {version('peft')}.",
        "",
        "| audit | expected | verdict | finding | found in | effect, nats | trigger tokens | reversion "
        "| random sets at most | nodes | null at most | seconds | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, adapter, corpus, intent, expected in CASES:
        lines.append(row(name, expected, audit(arguments, name, adapter, corpus, intent)))
    table = "\n".join(lines) + "\n"
    print(table)
    if arguments.record:
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.write(table)


def audit(arguments: argparse.Namespace, name: str, adapter: str, corpus: str, intent: str | None) -> dict:
    base, out = arguments.example.resolve(), arguments.work.resolve() / name.replace(", ", "-").replace(" ", "-")
    if not (out / "audit.json").exists():
        extra = ["--intent", str(base / intent)] if intent else []
        command = ["audit", f"{base}/parent", f"{base}/parent+{base}/{adapter}", "--corpus", f"{base}/{corpus}"]
        done = subprocess.run(
            [sys.executable, "-m", "heredity.gate", *command, *extra, "--budget", arguments.budget, "--out", str(out)],
            cwd=Path(__file__).parent,
        )
        if done.returncode not in (0, 1, 3):
            raise SystemExit(f"{name}: ended with {done.returncode}")
    return json.loads((out / "audit.json").read_text())


def row(name: str, expected: str, record: dict) -> str:
    null = record["calibration"]["null"].get("largest_effects", [0])
    seconds, memory = record["provenance"]["seconds"], record["provenance"]["peak_rss_bytes"] / 1e6
    cells = ["–"] * 7
    if record["findings"]:
        finding = record["findings"][0]
        behaviour = next(b for b in record["behaviours"] if b["id"] == finding["behaviour"])
        circuit, share = behaviour["circuit"], finding["reversion"]
        reverted = f"{share['estimate']:.0%} [{share['low']:.0%}, {share['high']:.0%}]" if "estimate" in share else "–"
        control = f"{circuit['control_high']:.0%}" if "control_high" in circuit else "–"
        tokens = " ".join(f"`{escape(token)}`" for token in behaviour["trigger_tokens"][:6])
        cells = [
            escape(finding["title"]) + (f" (declared: {finding['declared_by']})" if finding["declared_by"] else ""),
            behaviour["source"],
            f"{finding['effect']['estimate']:.2f}",
            tokens or "–",
            reverted,
            control,
            str(len(finding["nodes"])) if finding["nodes"] else "–",
        ]
    return " | ".join(
        [f"| {name}", expected, record["verdict"], *cells, f"{max(null):.2f}", f"{seconds:.0f}", f"{memory:.0f} |"]
    )


def escape(text: str) -> str:
    """Model text for a Markdown table."""
    return text.encode("unicode_escape").decode().replace("|", "\\|").replace("`", "'").replace("<", "&lt;")


if __name__ == "__main__":
    main()
