"""Speed and memory of edge attribution beside two other implementations, on the same weights and prompts.

    python benchmarks/circuits.py MODEL --work DIR [--eap-ig CHECKOUT --eap-ig-python PATH] [--pairs 16] [--record]

* EAP-IG at equal numbers of gradients, against the code of github.com/hannamw/EAP-IG run on the CPU
  (``contestants/circuits_eap_ig.py``; PATH is an interpreter with transformer-lens 2, e.g. `pip install
  torch==2.13.0 transformer-lens==2.15.4 'transformers<4.52' 'datasets<4'`).
* One gradient, against ``attribution_patch`` of TransformerLens: all edges (which it refuses where heads share keys, so
  on a copy of the model with keys and values repeated per head) and all nodes.

Every contestant is a process of its own with one thread, and they take turns. Scores must agree first. Memory is the
peak on top of the loaded model. ``--record`` appends the table to ``RESULTS.md``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import numpy as np
from ioi import pairs as ioi_pairs
from machine import machine

HERE = Path(__file__).parent
TOLERANCE = 1e-3
"""Largest accepted difference of two scores, over the largest score."""


@dataclass
class Contestant:
    """A worker, its answers by task."""

    name: str
    process: subprocess.Popen
    result: Path
    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def start(cls, name: str, python: str, file: str, model: Path, data: Path, *options: str) -> "Contestant":
        result = data.parent / f"{name.replace(' ', '-')}.npz"
        worker = [python, "-P", str(HERE / "contestants" / "circuits_worker.py")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*worker, file, str(model), str(data), str(result), *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        found = cls(name, process, result)
        found.answer()
        return found

    def answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self.process.wait()}")
        return json.loads(line)

    def scores(self, task: str) -> dict[str, np.ndarray]:
        self._ask("!" + task)
        return dict(np.load(self.result))

    def run(self, task: str) -> None:
        said = self._ask(task)
        for kept, key in ((self.seconds, "seconds"), (self.cpu, "cpu"), (self.memory, "bytes")):
            kept.setdefault(task, []).append(said[key])

    def _ask(self, what: str) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.answer()


def ungrouped(model: Path, out: Path) -> Path:
    """A copy of a Llama directory whose heads each have a key and a value of their own, the shared ones repeated."""
    from safetensors.torch import load_file, save_file

    if (out / "model.safetensors").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    said = json.loads((model / "config.json").read_text())
    heads, groups, d_head = said["num_attention_heads"], said["num_key_value_heads"], said["head_dim"]
    weights = load_file(model / "model.safetensors")
    for name in weights:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            repeated = weights[name].unflatten(0, (groups, d_head)).repeat_interleave(heads // groups, 0)
            weights[name] = repeated.flatten(0, 1).contiguous()
    (out / "config.json").write_text(json.dumps({**said, "num_key_value_heads": heads}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((model / name).read_bytes())
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


def write_pairs(model: Path, path: Path, n: int, few: int, steps: int) -> None:
    """Pairs of one length, so that none needs padding."""
    from transformers import AutoTokenizer

    drawn, metric, _ = ioi_pairs(AutoTokenizer.from_pretrained(model), 4 * n, 0)
    chosen = (drawn.last == drawn.last[0]).nonzero().flatten()[:n]
    some = drawn.of(chosen)
    said = {
        "clean": some.clean.tolist(),
        "corrupt": some.corrupt.tolist(),
        "last": some.last.tolist(),
        "right": [metric.right[i][0] for i in chosen.tolist()],
        "wrong": [metric.wrong[i][0] for i in chosen.tolist()],
        "steps": steps,
        "few": few,
    }
    path.write_text(json.dumps(said))


def agree(ours: np.ndarray, theirs: np.ndarray, what: str) -> float:
    miss = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not miss <= TOLERANCE:
        raise SystemExit(f"{what}: scores differ by {miss:.2g} of the largest")
    return miss


def against_reference(ours: Contestant, theirs: Contestant, heads: int, groups: int, layers: int) -> float:
    """Compare at the same points; their keys and values by head are summed over those that are one."""
    found, reference = ours.scores("gate")["scores"], theirs.scores("integrated")["scores"]
    columns = []
    for layer in range(layers):
        first = layer * (3 * heads + 1)
        q, k, v = (reference[:, first + i * heads : first + (i + 1) * heads] for i in range(3))
        shared = [side.reshape(len(side), groups, heads // groups).sum(-1) for side in (k, v)]
        columns += [q, *shared, reference[:, first + 3 * heads, None]]
    columns.append(reference[:, -1:])
    # Theirs is the gradient of −m times x′ − x: the same sign.
    return agree(found, np.concatenate(columns, 1), "EAP-IG")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--eap-ig", type=Path, help="left out without")
    parser.add_argument("--eap-ig-python", default=sys.executable)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--few", type=int, default=2, help="pairs for TransformerLens's edges")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="pairs in a batch of the reference")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    data, model = arguments.work / "pairs.json", arguments.model.resolve()
    write_pairs(model, data, arguments.pairs, arguments.few, arguments.steps)
    said = json.loads((model / "config.json").read_text())
    lines = heading(arguments, len(json.loads(data.read_text())["clean"][0]))

    ours = Contestant.start("ours", sys.executable, "circuits_ours", model, data)
    if arguments.eap_ig is not None:
        options = str(arguments.eap_ig.resolve()), str(arguments.batch)
        theirs = Contestant.start("EAP-IG", arguments.eap_ig_python, "circuits_eap_ig", model, data, *options)
        heads, groups, layers = (
            said[f"num_{what}"] for what in ("attention_heads", "key_value_heads", "hidden_layers")
        )
        miss = against_reference(ours, theirs, heads, groups, layers)
        lines += duel(f"EAP-IG, {arguments.steps} gradients", ours, theirs, "integrated", arguments.rounds, miss)
        theirs.process.terminate()

    lens = Contestant.start("TransformerLens", sys.executable, "circuits_transformer_lens", model, data)
    miss = agree(-ours.scores("nodes")["scores"], lens.scores("nodes")["scores"], "nodes")
    lines += duel("nodes, 1 gradient", ours, lens, "nodes", arguments.rounds, miss)
    ours.process.terminate()
    lens.process.terminate()

    copy = ungrouped(model, arguments.work / "ungrouped")
    ours = Contestant.start("ours", sys.executable, "circuits_ours", copy, data)
    lens = Contestant.start("TransformerLens", sys.executable, "circuits_transformer_lens", copy, data)
    a, b = ours.scores("edges"), lens.scores("edges")
    order = [list(b["destinations"]).index(name) for name in a["destinations"]]
    miss = agree(-a["scores"], b["scores"][:, order], "edges")
    lines += duel(f"edges, 1 gradient, {arguments.few} pairs", ours, lens, "edges", arguments.rounds, miss)
    ours.process.terminate()
    lens.process.terminate()
    table = "\n".join(lines) + "\n"
    print(table)
    if arguments.record:
        with (HERE / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.write(table)


def heading(arguments: argparse.Namespace, length: int) -> list[str]:
    return [
        f"\n## Edge attribution beside others, {arguments.model.resolve().parent.name}/{arguments.model.name}",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()}, one thread each, torch "
        f"{version('torch')}, transformer-lens {version('transformer-lens')}; {arguments.pairs} pairs of {length} "
        f"tokens, indirect objects; `benchmarks/circuits.py`, {arguments.rounds} rounds in turn; medians. Memory is "
        "the peak on top of the loaded model. Miss: largest difference of scores over the largest, at the same points.",
        "",
        "| task | contestant | s of CPU | s | peak MB | times as fast | memory | miss |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]


def duel(what: str, ours: Contestant, theirs: Contestant, task: str, rounds: int, miss: float) -> list[str]:
    for _ in range(rounds):
        for contestant in (ours, theirs):
            contestant.run(task)
    faster = statistics.median(b / a for a, b in zip(ours.cpu[task], theirs.cpu[task], strict=True))
    middle = [
        (statistics.median(c.cpu[task]), statistics.median(c.seconds[task]), max(c.memory[task]) / 1e6)
        for c in (ours, theirs)
    ]
    (a_cpu, a_wall, a_mb), (b_cpu, b_wall, b_mb) = middle
    found = [
        f"| {what} | ours | {a_cpu:.2f} | {a_wall:.2f} | {a_mb:.0f} | {faster:.1f} | {a_mb / b_mb:.2f} | {miss:.0e} |",
        f"| | {theirs.name} | {b_cpu:.2f} | {b_wall:.2f} | {b_mb:.0f} | 1 | 1 | |",
    ]
    print("\n".join(found), flush=True)
    return found


if __name__ == "__main__":
    main()
