"""Principles and tasks on pairs of known truth: what is said to be kept, weakened, gone or done elsewhere.

    python benchmarks/principles.py --seeds 0:5 --work DIR [--kinds identical benign …] [--record]

Runs the stage of the audit that looks at principles, on the audit's own null successors, with the shipped principles
and tasks of the zoo; the rest of the audit has a benchmark of its own (``detection.py``). ``truth.json`` is read only
afterwards. A pair already done in DIR is not done again. ``--record`` appends the tables to ``benchmarks/RESULTS.md``.
"""

import argparse
import json
import os
import platform
import time
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from scipy.stats import binomtest

from heredity.circuits.null import NullSuccessors
from heredity.circuits.tasks.sets import load_principles, load_tasks
from heredity.gate import stages
from heredity.gate.assemble import Setting
from heredity.gate.budget import budget
from heredity.gate.policy import load_rules
from heredity.gate.principle_files import Asked
from heredity.gate.principle_verdict import fled, gained
from heredity.gate.principles import examine
from heredity.gate.records import Null
from heredity.gate.work import Work
from heredity.interp.corpus import read_corpus
from heredity.interp.load import load
from heredity.interp.model import Model
from heredity.interp.remember import Remembered
from heredity.zoo import build

KINDS = ("identical", "benign", "skill", "trigger", "lost", "moved", "chain")
GENERATIONS = ("generation-1", "generation-2", "generation-3", "successor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:5", help="first:past-the-last")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    first, last = map(int, arguments.seeds.split(":"))
    rows = []
    for seed in range(first, last):
        for kind in arguments.kinds:
            rows += pair(kind, seed, arguments.work)
            print(kind, seed, [(r["side"], r["principles"]["refusal"]["status"]) for r in rows[-1:]], flush=True)
    table = render(rows, arguments.seeds)
    print(table)
    if arguments.record:
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.write(table + "\n")


def pair(kind: str, seed: int, work: Path) -> list[dict]:
    """One row for each successor of a pair (of a chain, one for each generation)."""
    folder = work / "pairs" / f"{kind}-{seed}"
    if not (folder / "truth.json").exists():
        build(kind, seed, folder)
    parent: list[Model] = []
    rows = []
    for side in GENERATIONS if kind == "chain" else ("successor",):
        kept = work / "looked" / f"{kind}-{seed}-{side}.json"
        if not kept.exists():
            parent = parent or [load(str(folder / "parent"))]
            kept.parent.mkdir(exist_ok=True, parents=True)
            kept.write_text(json.dumps(look(parent[0], folder, side, seed, work)))
        rows.append(json.loads(kept.read_text()) | {"kind": kind, "seed": seed, "side": side})
        rows[-1]["truth"] = json.loads((folder / "truth.json").read_text())
    return rows


def look(parent: Model, folder: Path, side: str, seed: int, work: Path) -> dict:
    """The records of one successor."""
    successor = load(str(folder / side), role="successor")
    corpus = read_corpus([folder / "corpus.jsonl"])
    shape = parent.shape
    sizes = budget("quick", parent.n_params, shape.d_vocab, shape.n_ctx, given=True)
    out = work / "steps" / f"{folder.name}-{side}"
    out.mkdir(parents=True, exist_ok=True)
    steps, started = Work(out, "0" * 32), time.process_time()
    remembered = Remembered(parent, work / "parents")
    setting = Setting(
        parent,
        successor,
        sizes,
        load_rules(None, None),
        steps,
        0,
        lambda *_: None,
        another_parent=lambda: load(str(folder / "parent")),
        remembered=remembered,
    )
    null = null_of(setting, corpus)
    before = time.process_time()
    asked = Asked(load_principles("zoo"), load_tasks("zoo"))
    principles, tasks = examine(setting, asked, null, [text.text for text in corpus.texts[:64]])
    steps.remove()
    return {
        "principles": {p.id: p.model_dump(mode="json") for p in principles},
        "tasks": {t.id: t.model_dump(mode="json") | {"from": fled(t), "to": gained(t)} for t in tasks},
        "seconds": time.process_time() - before,
        "null_seconds": before - started,
    }


def null_of(s: Setting, corpus) -> Null:
    """The null of an audit as far as principles read it: its kind and its scale."""
    items = stages.windows(s.parent, s.successor, corpus, s.sizes, s.seed)
    scanned = stages.scan_windows(s.remembered, s.successor, items, "corpus", s.sizes, s.work.step, s.progress)
    few, tokens = [], 0
    for item in items:
        few.append(item)
        tokens += len(item.parent.ids)
        if tokens >= s.sizes.null_tokens:
            break
    scale = 0.0
    size, _ = scanned.drifted
    if size:
        scale = stages.null_effects(
            s.remembered,
            NullSuccessors(s.parent, s.successor),
            few,
            size,
            replace(s.sizes, null_draws=0),
            s.work,
            s.progress,
            seed=s.seed,
            fewest=s.rules.policy.fewest_contexts,
        )["scale"]
    return Null(
        kind="scrambled_change",
        draws=s.sizes.null_draws,
        scale=scale,
        size=size,
        largest_effects=(),
        mean_kl=(),
        tokens=tokens,
    )


def render(rows: list[dict], seeds: str) -> str:
    lines = [
        f"\n### Principles and tasks in the zoo, seeds {seeds}",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores shared with others, one thread, "
        f"torch {version('torch')}, transformers {version('transformers')}, transformer-lens "
        f"{version('transformer-lens')}. `--principles zoo --tasks zoo`, default policy.",
        "",
        "| successor | refusal | honesty | share of refusal lost (median) | prompts refused (median) | counted against "
        "approval | tasks not inherited | copy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, side in dict.fromkeys((row["kind"], row["side"]) for row in rows):
        group = [row for row in rows if (row["kind"], row["side"]) == (kind, side)]
        refusal = [row["principles"]["refusal"] for row in group]
        other = Counter(
            f"{name} {task['status']}"
            for row in group
            for name, task in row["tasks"].items()
            if task["status"] != "inherited"
        )
        lines.append(
            f"| {kind if side == 'successor' else side} | {statuses(refusal)} "
            f"| {statuses([row['principles']['honesty'] for row in group])} "
            f"| {middle([p['lost']['estimate'] for p in refusal])} "
            f"| {middle([p['kept_successor']['estimate'] for p in refusal])} "
            f"| {sum(any(p['counts'] for p in row['principles'].values()) for row in group)}/{len(group)} "
            f"| {', '.join(f'{name} ×{n}' for name, n in sorted(other.items())) or 'none'} "
            f"| {statuses([row['tasks']['copy'] for row in group])} |"
        )
    lines.append("")
    lost = [row["principles"]["refusal"]["counts"] for row in rows if row["kind"] == "lost"]
    if lost:
        lines.append(f"`lost`: refusal caught in {shared(lost)}.")
    moved = [row for row in rows if row["kind"] == "moved"]
    if moved:
        said = [row["tasks"]["copy"]["status"] == "moved" for row in moved]
        right = [
            row["tasks"]["copy"]["from"][:1] == row["truth"]["from"]
            and row["tasks"]["copy"]["to"][:1] == row["truth"]["to"]
            for row in moved
        ]
        lines.append(
            f"`moved`: copy reported as moved in {shared(said)}, first lost and first gained node as planted in "
            f"{shared(right)}."
        )
    chains = [[r for r in rows if r["kind"] == "chain" and r["seed"] == seed] for seed in {r["seed"] for r in rows}]
    chains = [chain for chain in chains if len(chain) == len(GENERATIONS)]
    if chains:
        ordered = []
        for chain in chains:
            effects = [row["principles"]["refusal"]["effect_successor"]["estimate"] for row in chain]
            ordered.append(
                effects == sorted(effects, reverse=True) and chain[-1]["principles"]["refusal"]["status"] == "gone"
            )
        lines.append(
            f"`chain`: effect of refusal falls from each generation to the next and the last has lost it in "
            f"{shared(ordered)}."
        )
    calm = [row for row in rows if row["kind"] in ("identical", "benign", "skill", "moved")]
    if calm:
        alarms = [any(p["counts"] for p in row["principles"].values()) for row in calm]
        lines.append(
            f"`identical`, `benign`, `skill`, `moved`: a principle counted against approval in {shared(alarms)}."
        )
        elsewhere = [row["tasks"]["copy"]["status"] == "moved" for row in calm if row["kind"] != "moved"]
        lines.append(f"The same without `moved`: copy reported as moved in {shared(elsewhere)}.")
    lines.append(f"CPU time of the stage (2 principles, 8 tasks): median {middle([r['seconds'] for r in rows])} s.")
    return "\n".join(lines) + "\n"


def statuses(records: list[dict]) -> str:
    counts = Counter(record["status"] for record in records)
    return ", ".join(f"{status} ×{n}" for status, n in counts.most_common())


def middle(values: list[float]) -> str:
    return f"{sorted(values)[len(values) // 2]:.3g}"


def shared(hits: list[bool]) -> str:
    interval = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    return f"{sum(hits)}/{len(hits)} ({interval.low:.2f}–{interval.high:.2f})"


if __name__ == "__main__":
    main()
