"""Attribution graphs of SmolLM2-135M: ours beside circuit-tracer's, and one of a prompt of 2,000 tokens.

    python benchmarks/peers.py install DIR circuit_tracer
    python benchmarks/attribution_graph.py --model MODEL --peers DIR [--rounds 3] [--case 0] [--long] [--record]

MODEL is SmolLM2-135M-Instruct as a directory (``heredity example smollm2``). Both sides read the same transcoders,
which are written here in circuit-tracer's format: random encoders and decoders in every layer, each latent's bias set
so that it is active on a given share of other text. Speed does not depend on what a latent means.

First the graphs must be equal: the same active latents, and every row's edges to 1e-4 of the row's norm. Then each side
runs in a process and an environment of its own, one thread, in turns; seconds are of the processor, so that other jobs
of the machine count little, with the clock's beside. Memory is what a fresh process takes at most in its first graph,
on top of model and transcoders. circuit-tracer runs with the better of two batch sizes.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

import torch
from peers import PEERS, missing, python
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
LATENTS = 2048
BATCHES = (32, 128)
TOLERANCE = 1e-4
SEED = 0


@dataclass(frozen=True)
class Case:
    """A prompt length, how many latents are active per token and layer on average, and how many become nodes."""

    name: str
    tokens: int
    active: float
    nodes: int


CASES = (
    Case("every latent a node", 12, 3, 1 << 30),
    Case("at most 500 nodes", 32, 4, 500),
)
LONG = Case("2,000 tokens", 2000, 16, 48)
LONG_BUDGET = 2 << 30


class Side:
    """A contestant in its own process."""

    def __init__(self, interpreter: str, file: str, model: Path, sets: dict[float, Path], result: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        command = [interpreter, "-P", str(HERE / "contestants" / "graphs.py"), file, str(model), str(result)]
        self.process = subprocess.Popen(
            [*command, *(f"{active}={path}" for active, path in sets.items())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.result = result
        self.about = self._answer()

    def run(self, case: Case, ids: list[int], **options: Any) -> dict[str, Any]:
        """Seconds and peak memory of one graph; the graph is in ``result`` if asked for."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"ids": ids, "active": case.active, "nodes": case.nodes, **options}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a contestant ended early; its messages are above")
        answer = json.loads(line)
        if "error" in answer:
            raise SystemExit(f"a contestant failed: {answer['error']}")
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", type=int, choices=range(len(CASES)), help="only one")
    parser.add_argument("--long", action="store_true", help="only the prompt of 2,000 tokens, ours alone")
    parser.add_argument("--record", action="store_true", help="append the table to RESULTS.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        lines = long(args.model, Path(scratch)) if args.long else compare(args, Path(scratch))
    options = f"--rounds {args.rounds}" if not args.long else "--long"
    command = f"python benchmarks/attribution_graph.py {options}" + (
        "" if args.case is None else f" --case {args.case}"
    )
    head = [
        f"## Attribution graphs, {date.today()}",
        "",
        f"`{command}` on {platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread; Python "
        f"{platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}; "
        f"SmolLM2-135M-Instruct, {LATENTS} latents per layer, seed {SEED}.",
        "",
    ]
    text = "\n".join([*head, *lines, ""])
    print(text)
    if args.record:
        with (HERE / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.write("\n" + text)


def compare(args: argparse.Namespace, scratch: Path) -> list[str]:
    """The table of both sides."""
    if reason := missing(args.peers, "circuit_tracer"):
        raise SystemExit(f"circuit-tracer cannot take part: {reason}")
    cases = CASES if args.case is None else [CASES[args.case]]
    texts = tokens(args.model, max(case.tokens for case in cases))
    sets = {case.active: write_set(args.model, case.active, scratch / f"set-{case.active}") for case in cases}
    sides = {
        "ours": (sys.executable, "graph_ours", scratch / "ours.safetensors"),
        "theirs": (str(python(args.peers, "circuit_tracer")), "graph_circuit_tracer", scratch / "theirs.safetensors"),
    }

    def start(name: str) -> Side:
        interpreter, file, result = sides[name]
        return Side(interpreter, file, args.model, sets, result)

    running = {name: start(name) for name in sides}
    about, rows = {name: side.about for name, side in running.items()}, []
    for case in cases:
        ids = texts[: case.tokens]
        batch = min(BATCHES, key=lambda size: running["theirs"].run(case, ids, batch=size)["cpu"])
        for side in running.values():
            side.run(case, ids, keep=True, batch=batch)
        worst, shared, latents = equal(load_file(sides["ours"][2]), load_file(sides["theirs"][2]))
        if worst > TOLERANCE:
            raise SystemExit(f"{case.name}: edges differ by {worst:.2g} of their row")
        print(f"{case.name}: edges equal to {worst:.1e}", file=sys.stderr, flush=True)
        times: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for i in range(args.rounds):
            for name in sorted(sides, reverse=bool(i % 2)):
                times[name].append(running[name].run(case, ids, batch=batch))
                print(f"{case.name}, {name}: {times[name][-1]}", file=sys.stderr, flush=True)
        peaks = {}
        for name in sides:
            fresh = start(name)
            peaks[name] = fresh.run(case, ids, batch=batch)["peak"]
            fresh.close()
        rows += [row(case, name, latents, shared, worst, times, peaks, batch) for name in sides]
    for side in running.values():
        side.close()
    return [
        f"circuit-tracer {PEERS['circuit_tracer'].version} with TransformerLens {about['theirs']['transformer_lens']}, "
        f"torch {about['theirs']['torch']}. Times are medians of {args.rounds} graphs, in turns, with quartiles.",
        "",
        "| case | side | latents | edges compared | largest gap | CPU seconds | by the clock | peak memory | batch |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
        *rows,
    ]


def row(
    case: Case,
    name: str,
    latents: tuple[int, int],
    shared: int,
    worst: float,
    times: dict[str, list[dict[str, float]]],
    peaks: dict[str, float],
    batch: int,
) -> str:
    """One line of the table."""
    own = [run["cpu"] for run in times[name]]
    clock = statistics.median(run["seconds"] for run in times[name])
    low, high = (statistics.quantiles(own, n=4)[i] for i in (0, 2)) if len(own) > 1 else (own[0], own[0])
    ratio, less = ("", "")
    if name == "ours":
        slower = statistics.median(run["cpu"] for run in times["theirs"])
        ratio = f" ({slower / statistics.median(own):.1f} × faster)"
        less = f" ({peaks['ours'] / peaks['theirs']:.2f} of theirs)"
    return (
        f"| {case.name}, {case.tokens} tokens | {'heredity' if name == 'ours' else 'circuit-tracer'} | "
        f"{latents[0]} of {latents[1]} | {shared:,} | {worst:.1e} | "
        f"{statistics.median(own):.2f} ({low:.2f}; {high:.2f}){ratio} | {clock:.2f} | "
        f"{peaks[name] / 2**20:.0f} MiB{less} | {'–' if name == 'ours' else batch} |"
    )


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, int, tuple[int, int]]:
    """Largest difference of a row's edges among nodes of both graphs, of the row's norm; how many edges were compared;
    how many latents are nodes in ours, and how many are active.

    Raises:
        SystemExit: the active latents, the targets or the sizes differ.
    """
    if not torch.equal(ours["active"], theirs["active"]):
        raise SystemExit("the active latents differ")
    if ours["logits"].tolist() != theirs["logits"].tolist():
        raise SystemExit("the targets differ")
    both = (ours["latents"][:, None] == theirs["latents"][None]).all(2).nonzero()
    parts = []
    for graph, at in ((ours, both[:, 0]), (theirs, both[:, 1])):
        n, total = len(graph["latents"]), graph["weights"].shape[1]
        rows = torch.cat([at, torch.arange(n, len(graph["weights"]))])
        parts.append(graph["weights"][rows][:, torch.cat([at, torch.arange(n, total)])].double())
    if parts[0].shape != parts[1].shape:
        raise SystemExit("the graphs have different errors, tokens or targets")
    gap = (parts[0] - parts[1]).norm(dim=1) / parts[1].norm(dim=1).clamp_min(1e-30)
    return float(gap.max()), parts[0].numel(), (len(ours["latents"]), len(ours["active"]))


def tokens(model: Path, n: int) -> list[int]:
    """A prompt of ``n`` tokens, its first one special (circuit-tracer puts one there otherwise)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text(n * 8))["input_ids"][: n - 1]
    return [tokenizer.bos_token_id, *ids]


def text(characters: int) -> str:
    """Ordinary English that Python carries."""
    from pydoc_data.topics import topics

    return " ".join(" ".join(topics[name].split()) for name in sorted(topics))[5000 : 5000 + characters]


@torch.no_grad()
def write_set(model: Path, active: float, directory: Path) -> Path:
    """Transcoders of every layer as circuit-tracer stores them, ``active`` latents per token on other text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory.mkdir()
    bare = AutoModelForCausalLM.from_pretrained(model)
    ids = AutoTokenizer.from_pretrained(model)(text(60_000)[-2500:], return_tensors="pt")["input_ids"]
    seen: dict[int, Tensor] = {}
    for i, layer in enumerate(bare.model.layers):
        layer.mlp.register_forward_hook(lambda module, inputs, out, i=i: seen.update({i: inputs[0][0]}))
    bare(ids)
    generator, width = torch.Generator().manual_seed(SEED), bare.config.hidden_size
    for i, x in seen.items():
        encoder = torch.randn(LATENTS, width, generator=generator)
        encoder /= encoder.norm(dim=1, keepdim=True)
        bias = -(x @ encoder.T).quantile(1 - active / LATENTS, dim=0)
        tensors = {
            "W_enc": encoder,
            "b_enc": bias,
            "W_dec": 0.3 * encoder.roll(1, 0).contiguous(),
            "b_dec": torch.zeros(width),
        }
        save_file(tensors, directory / f"layer_{i}.safetensors")
    config = (
        "model_kind: transcoder_set\nmodel_name: smollm2\nfeature_input_hook: mlp.hook_in\n"
        "feature_output_hook: mlp.hook_out\nactivation: relu\nscan: random\n"
    )
    (directory / "config.yaml").write_text(config)
    return directory


def long(model: Path, scratch: Path) -> list[str]:
    """The long prompt, ours alone."""
    path = write_set(model, LONG.active, scratch / "set")
    side = Side(sys.executable, "graph_ours", model, {LONG.active: path}, scratch / "ours.safetensors")
    found = side.run(LONG, tokens(model, LONG.tokens), budget=LONG_BUDGET, keep=True)
    side.close()
    graph = load_file(scratch / "ours.safetensors")
    return [
        f"A prompt of {LONG.tokens:,} tokens, budget {LONG_BUDGET >> 20:,} MiB: {len(graph['latents'])} latents of "
        f"{len(graph['active']):,} active are nodes, {found['cpu']:.0f} CPU seconds, "
        f"{found['anonymous'] / 2**20:.0f} MiB on top of model and transcoders (and {found['file'] / 2**20:.0f} MiB of "
        f"a temporary file's pages, which the system may take back); rows miss their sums by {found['residual']:.1e}.",
    ]


if __name__ == "__main__":
    main()
