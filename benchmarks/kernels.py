"""Milliseconds and memory of every op on sparse features: ours beside plain torch, the bare product and other packages.

    python benchmarks/peers.py install DIR
    python benchmarks/kernels.py --peers DIR [--tokens 1024 --latents 24576 …] [--record]

Each contestant is a process of its own in an environment of its own, and all read the same arrays from one file. What
it computes is compared with float64 before it is timed; one that is off is listed as wrong and not timed. Then they
take turns, in an order that rotates from round to round, so that a busy moment of the machine falls on all of them; a
ratio is the median over rounds of the ratio within a round. Memory is what the first run takes on top of inputs and
weights. ``--crossover`` measures instead from which share of active latents on a dense decode is the faster one.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, fields
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent / "contestants"))

import torch
from peers import PEERS, missing, python
from safetensors.torch import load_file, save_file
from task import FEW, Inputs
from workload import TOLERANCE, Shape, Truth, complaint, draw, facts

HERE = Path(__file__).resolve().parent
BARE = "bare matrix product"
OPS = {
    "encode_topk": "Encode, TopK",
    "encode_jumprelu": "Encode, JumpReLU",
    "decode": "Decode",
    "train": "Training step: encode with TopK, decode, squared error, all gradients; no optimiser",
    "train_few": f"The same for {FEW} tokens on which fewer than k latents are above zero (checked, not timed)",
    "attribute": "Attribution: gradients times decoder rows of active latents",
    "statistics": "Statistics of latents",
}
UNTIMED = ("train_few",)


@dataclass
class Row:
    """One line of the table."""

    label: str
    contestant: "Contestant"
    variant: str = ""
    why_not: str | None = None
    gives: str = ""
    error: float = 0.0
    peak: float = float("nan")
    seconds: list[float] = field(default_factory=list)


class Contestant:
    """A process that runs what it is told, see ``contestants/worker.py``."""

    def __init__(self, label: str, file: str, interpreter: str, why_not: str | None) -> None:
        self.label, self.file, self.interpreter, self.why_not = label, file, interpreter, why_not
        self.process: subprocess.Popen[str] | None = None

    def start(self, folder: Path, args: argparse.Namespace) -> None:
        """Start the process, again if it has ended."""
        if self.process is not None and self.process.poll() is None:
            return
        self.result = folder / f"{self.file}.safetensors"
        worker = HERE / "contestants" / "worker.py"
        command = [self.interpreter, "-P", worker, self.file, folder / "inputs.safetensors", self.result]
        command += ["--k", args.k, "--threads", args.threads]
        # In the temporary folder, away from those called `kernels` and `circuits` of this checkout.
        self.process = subprocess.Popen(
            [*map(str, command)],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if args.verbose else subprocess.DEVNULL,
            text=True,
        )
        self._answer()

    def ask(self, **what: Any) -> dict[str, Any]:
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"error": f"its process ended with {self.process.wait()}"}
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"its process ended with {self.process.wait()}"}

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait()


def main() -> int:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.crossover:
        print(crossover(args))
        return 0
    shape = Shape(**{each.name: getattr(args, each.name) for each in fields(Shape)})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        arrays = draw(shape, args.seed)
        save_file(arrays, folder / "inputs.safetensors")
        truth, among = Truth(Inputs(arrays, args.k)), contestants(args)
        lines = [head(args, shape, facts(arrays))]
        print(lines[0], flush=True)
        wrong = 0
        for op in args.ops:
            rows = measure(op, truth, among, folder, args)
            lines.append(table(op, rows))
            print(lines[-1], flush=True)
            wrong += sum(row.contestant.file == "ours" and row.why_not is not None for row in rows)
        for contestant in among:
            contestant.end()
    text = "\n".join(lines)
    if args.record:
        with (HERE / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.write("\n" + text)
    return 1 if wrong else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for each in fields(Shape):
        parser.add_argument(f"--{each.name}", type=int, default=each.default)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help=", ".join(OPS))
    parser.add_argument("--peers", type=lambda path: Path(path).resolve(), help="folder that peers.py installed into")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="append the tables to RESULTS.md")
    parser.add_argument("--crossover", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="show what contestants write to standard error")
    return parser.parse_args()


# --- measuring ---


def contestants(args: argparse.Namespace) -> list[Contestant]:
    found = [Contestant("ours", "ours", sys.executable, None), Contestant("plain torch", "plain", sys.executable, None)]
    for name, peer in PEERS.items():
        reason = missing(args.peers, name)
        interpreter = "" if reason else str(python(args.peers, name))
        found.append(Contestant(peer.label, f"with_{name}", interpreter, reason))
    return found


def measure(op: str, truth: Truth, among: list[Contestant], folder: Path, args: argparse.Namespace) -> list[Row]:
    rows = [row for contestant in among for row in entered(op, contestant)]
    for row in rows:
        if row.why_not is None:
            row.contestant.start(folder, args)
            prepare(row, op, truth)
    running = [row for row in rows if row.why_not is None and op not in UNTIMED]
    for i in range(args.rounds if running else 0):
        first = i % len(running)
        for row in running[first:] + running[:first]:
            said = row.contestant.ask(run=[op, row.variant])
            row.seconds.append(said.get("seconds", float("nan")))
    for contestant in {row.contestant for row in rows if row.contestant.process is not None}:
        contestant.ask(drop=1)
    return rows


def entered(op: str, contestant: Contestant) -> list[Row]:
    """A row for every variant, or one with the reason why there is none."""
    module = importlib.import_module(contestant.file)
    variants = module.TASKS.get(op, {})
    reason = contestant.why_not or (None if variants else f"no such op: {module.LACKS[op]}")
    if reason:
        return [Row(contestant.label, contestant, why_not=reason)]
    label = contestant.label
    return [Row(v if v == BARE else ", ".join(filter(None, (label, v))), contestant, v) for v in variants]


def prepare(row: Row, op: str, truth: Truth) -> None:
    """Let the contestant run, and look at what it computed and how much memory that took."""
    row.contestant.result.unlink(missing_ok=True)
    said = row.contestant.ask(prepare=[op, row.variant])
    if "error" in said:
        row.why_not = f"failed: {said['error']}"
        return
    row.gives, row.peak = said["gives"], said["peak"]
    row.error, fault = complaint(load_file(row.contestant.result), truth.of(op))
    if fault:
        row.why_not = f"**wrong**: {fault}"


# --- tables ---


def head(args: argparse.Namespace, shape: Shape, drawn: str) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("heredity", "torch"))
    options = ["DIR" if before == "--peers" else each for before, each in pairwise(sys.argv)]
    command = " ".join(["benchmarks/kernels.py", *options])
    return (
        f"## Kernels, {date.today().isoformat()}\n\n{shape}; float32, seed {args.seed}: {drawn}. {args.rounds} rounds. "
        f"{processor()}, {args.threads} threads, load {os.getloadavg()[0]:.1f} at the start. "
        f"Python {platform.python_version()}, {versions}. `{command}`.\n\nEvery result was compared with float64 "
        f"first; ‖error‖ is relative, at most {TOLERANCE:.0e}, and active latents are the same ones.\n"
    )


def table(op: str, rows: list[Row]) -> str:
    out = [f"### {OPS[op]}", ""]
    if op in UNTIMED:
        out += ["| contestant | verdict | ‖error‖ |", "|---|---|---:|"]
        out += [
            f"| {row.label} | {row.why_not or 'right'} | {'' if row.why_not else f'{row.error:.0e}'} |" for row in rows
        ]
        return "\n".join(out) + "\n"
    base = next((row for row in rows if row.label == BARE), None) or next(r for r in rows if r.label == "plain torch")
    out += [
        f"| contestant | gives | ms (median) | quartiles | time ÷ {base.label} | peak MB | ‖error‖ |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row.why_not:
            out.append(f"| {row.label} | {row.why_not} | | | | | |")
            continue
        low, middle, high = (1e3 * t for t in quartiles(row.seconds))
        ratio = statistics.median(a / b for a, b in zip(row.seconds, base.seconds, strict=True))
        error = "–" if row.label == BARE else f"{row.error:.0e}"
        out.append(
            f"| {row.label} | {row.gives} | {middle:.3g} | {low:.3g}–{high:.3g} | {ratio:.2f} "
            f"| {row.peak / 1e6:.0f} | {error} |"
        )
    return "\n".join(out) + "\n"


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# --- the share of active latents from which a dense decode is faster ---


def crossover(args: argparse.Namespace) -> str:
    from heredity.kernels import FeatureCSR
    from heredity.kernels.ops.decode import cpu, reference

    draws = torch.Generator().manual_seed(args.seed)
    decoder = torch.randn(args.latents, args.width, generator=draws)
    cpu.DENSE_FROM = cpu.DENSE_FROM_CACHED = 1.0
    size = f"{args.latents} latents, d {args.width} ({decoder.nbytes / 1e6:.0f} MB)"
    out = [f"| active share of {size} | sparse ms | dense ms |", "|---:|---:|---:|"]
    for share in (0.01, 0.03, 0.06, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3):
        acts = torch.rand(args.tokens, args.latents, generator=draws)
        features = FeatureCSR.from_dense(acts * (acts < share))
        times: dict[Any, list[float]] = {cpu: [], reference: []}
        for _ in range(args.rounds):
            for module, seconds in times.items():
                begun = time.perf_counter()
                module.decode(features, [decoder], [None], None)
                seconds.append(time.perf_counter() - begun)
        sparse, dense = (1e3 * statistics.median(seconds) for seconds in times.values())
        out.append(f"| {share:.1%} | {sparse:.3g} | {dense:.3g} |")
    return "\n".join(out)


if __name__ == "__main__":
    sys.exit(main())
