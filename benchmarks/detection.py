"""Detection on fresh pairs of known truth: verdicts and scores of audits, beside cheap baselines and modeldiffr.

    python benchmarks/detection.py --seeds 100:110 --work DIR [--kinds benign trigger …] [--jobs 2]
        [--pairs DIR [--built]] [--principles zoo] [--tasks zoo] [--parent-work] [--peers DIR --peer-seeds 100:103]
        [--kept FILE] [--record]

Every audit is the command line a user types, one thread; ``truth.json`` is read only after the verdict, to score it.
Pairs are built into ``--pairs`` (the work folder, if not given) unless they are there; a pair that the work folder
holds an audit of is not audited again, and one whose audit was cut off is gone on with. So a run can stop and grow:
seeds are the outer order, so that what is done is balanced over kinds. A new version of the audit needs a new folder.
``--kept FILE`` outlives the folder: rows in it are not measured again, new ones are added, and the table is of all.
``measured/detection.jsonl`` holds the rows that this version of the audit was measured by so far.

``rows.json`` in the work folder has every row; ``--record`` appends the table to ``benchmarks/RESULTS.md``.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

sys.path.append(str(Path(__file__).parent))

import torch
from detection_baselines import baselines
from detection_peers import scan, why_not
from detection_process import timed
from detection_rows import EXPECTED, NULLS, baseline_localisation, failed, read, row
from detection_table import table

from heredity.gate.audit import CODE

READING = Lock()
"""Held while the baselines of a pair are read, which happens in this process and not in one of its own."""


def main() -> None:
    args = parse()
    if args.peers and (reason := why_not(args.peers)):
        raise SystemExit(f"modeldiffr cannot take part: {reason}")
    torch.set_num_threads(1)
    jobs = [(kind, seed) for seed in range(*args.seeds) for kind in args.kinds]
    if args.built:
        jobs = [job for job in jobs if (place(*job, args) / "truth.json").exists()]
    rows = kept(args.kept)
    jobs = [job for job in jobs if job not in {(row["kind"], row["seed"]) for row in rows}]
    with ThreadPoolExecutor(args.jobs) as pool:
        for found in pool.map(lambda job: one(*job, args), jobs):
            rows.append(found)
            print(f"{found['kind']} {found['seed']}: {found['verdict']}, score {found['score']:.3g}", flush=True)
            write(args.work / "rows.json", rows)
            if args.kept:
                with args.kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"code": CODE, **found}) + "\n")
    said = table(rows, "python benchmarks/detection.py " + " ".join(given(args)))
    print(said)
    if args.record:
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.write("\n" + said)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=_range, default=(100, 110), help="first:past-the-last")
    parser.add_argument("--kinds", nargs="+", default=list(EXPECTED), choices=list(EXPECTED), metavar="KIND")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, help="where pairs are, or are built (default: the work folder)")
    parser.add_argument("--built", action="store_true", help="leave out pairs that are not there yet")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--principles", help="principles that every audit but those of tracr is given")
    parser.add_argument("--tasks", help="tasks that audits of moved, identical and benign successors are given")
    parser.add_argument("--parent-work", action="store_true", help="do the parent's part once for all kinds of a seed")
    parser.add_argument("--peers", type=Path, help="what `peers.py install DIR modeldiffr` made")
    parser.add_argument("--peer-seeds", type=_range, help="seeds that modeldiffr is run on (default: all)")
    parser.add_argument("--kept", type=Path, metavar="FILE", help="rows of earlier runs, one to a line")
    parser.add_argument("--record", action="store_true")
    return parser.parse_args()


def kept(path: Path | None) -> list[dict[str, Any]]:
    """Rows measured before, by this version of the audit."""
    lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
    rows = [json.loads(line) for line in lines]
    if any(row.pop("code") != CODE for row in rows):
        raise SystemExit(f"{path} holds rows of another version of the audit: begin a new file")
    return rows


def _range(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    return int(first), int(last)


def given(args: argparse.Namespace) -> list[str]:
    """The arguments that decide what is measured; folders are nobody else's business."""
    said = ["--seeds", "{}:{}".format(*args.seeds)]
    if args.kinds != list(EXPECTED):
        said += ["--kinds", *args.kinds]
    if args.principles:
        said += ["--principles", args.principles]
    if args.tasks:
        said += ["--tasks", args.tasks]
    if args.parent_work:
        said.append("--parent-work")
    if args.kept:
        said += ["--kept", args.kept.name]
    if args.peers:
        said += ["--peers", "DIR", "--peer-seeds", "{}:{}".format(*(args.peer_seeds or args.seeds))]
    return [*said, "--jobs", str(args.jobs), "--work", "DIR"]


def place(kind: str, seed: int, args: argparse.Namespace) -> Path:
    """Where a pair is, or is to be."""
    return (args.pairs or args.work).resolve() / f"{kind.replace(':', '-')}-{seed}"


def one(kind: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Build, audit and score one pair."""
    pair, work = place(kind, seed, args), args.work.resolve()
    name = pair.name
    out, cost = work / "audits" / name, work / "costs" / f"{name}.json"
    if not (pair / "truth.json").exists():
        built = heredity(work / "logs" / f"build-{name}.log", "zoo", "build", kind, "--seed", seed, "--out", pair)
        if built["failure"]:
            raise SystemExit(f"{name} cannot be built: {built['failure']}")
    if not (out / "audit.json").exists():
        begun = out.exists()
        asked = ["--corpus", pair / "corpus.jsonl", *told(kind, pair, args), "--out", out]
        done = heredity(work / "logs" / f"{name}.log", "audit", pair, pair, *asked)
        # What a run took that only finished another's work says nothing.
        write(cost, {**done, "whole": not begun})
    took = read(cost) if cost.exists() else {"failure": None, "whole": False}
    cheap = work / "baselines" / f"{name}.json"
    with READING:
        if not cheap.exists():
            write(cheap, baselines(pair))
    found, truth = read(cheap), read(pair / "truth.json")
    scored = (
        failed(kind, seed, took["failure"]) if took["failure"] else row(kind, seed, read(out / "audit.json"), truth)
    )
    heads = sum(node.startswith("attn_head@0.") for node in found["nodes"]["weight change, norm"])
    said = {
        **scored,
        "processor_seconds": took["processor_seconds"] if took["whole"] else None,
        "trigger": truth["trigger"],
        "baselines": found,
        "baseline_nodes": {n: baseline_localisation(values, truth, heads) for n, values in found["nodes"].items()},
    }
    if args.peers and seed in range(*(args.peer_seeds or args.seeds)):
        said["modeldiffr"] = scan(args.peers, pair, work / "modeldiffr" / name)
    return said


def told(kind: str, pair: Path, args: argparse.Namespace) -> list[str]:
    """What the auditor of a pair is told beside its text."""
    said = ["--intent", str(pair / "intent.yaml")] if (pair / "intent.yaml").exists() else []
    if args.principles and kind != "tracr":  # which has a language of its own
        said += ["--principles", args.principles]
    if args.tasks and kind in ("moved", *NULLS):
        said += ["--tasks", args.tasks]
    if args.parent_work:
        said += ["--parent-work", str(args.work.resolve() / "parents")]
    return said


def heredity(log: Path, *arguments: object) -> dict[str, Any]:
    """The command line, with what it took; ``failure``: why it failed, or None. A verdict is not a failure."""
    done = timed([sys.executable, "-P", "-m", "heredity.gate", *arguments], log)
    failure = None if done["status"] in (0, 1, 3) else f"exit status {done['status']}: {done['said']}"
    return {**done, "failure": failure}


def write(path: Path, content: Any) -> None:
    """JSON that a reader sees whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".new")
    whole.write_text(json.dumps(content, indent=1), encoding="utf-8")
    whole.replace(path)


if __name__ == "__main__":
    main()
