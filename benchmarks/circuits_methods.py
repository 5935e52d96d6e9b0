"""Methods of attribution on a real model: how near each comes to exchanging nodes, and how faithful its edges are.

    python benchmarks/circuits_methods.py MODEL --work DIR [--pairs 8] [--held-out 8] [--record]

The behaviour is indirect-object identification. Reference: every source (embedding, heads, MLPs) exchanged in a forward
of its own, and a random sample of heads' queries and keys. Each step of the work is kept in DIR and not done again.
``--record`` appends the tables to ``RESULTS.md``.
"""

import argparse
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import numpy as np
import torch
from ioi import pairs as ioi_pairs
from machine import machine
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from heredity.circuits.atp import attribute_nodes
from heredity.circuits.edges import EdgeScores, attribute_edges
from heredity.circuits.faithfulness import faithfulness_curve
from heredity.circuits.layout import layout_of
from heredity.circuits.node_patching import patch_nodes
from heredity.circuits.pairs import Metric, Pairs
from heredity.circuits.relp import attribute_edges_by_relevance
from heredity.interp.load import load
from heredity.interp.model import Edit, Model

SIDES = 96
"""Queries and keys exchanged."""
EDGES: dict[str, Callable[[Model, Pairs, Metric], EdgeScores]] = {
    "EAP": lambda *a: attribute_edges(*a, method="eap"),
    "clean-corrupted": lambda *a: attribute_edges(*a, method="clean-corrupted"),
    "EAP-IG, 5 steps": lambda *a: attribute_edges(*a, steps=5),
    "EAP-IG, 10 steps": lambda *a: attribute_edges(*a, steps=10),
    "EAP-IG, 20 steps": lambda *a: attribute_edges(*a, steps=20),
    "RelP": lambda *a: attribute_edges_by_relevance(*a),
    "RelP, attention held": lambda *a: attribute_edges_by_relevance(*a, hold_attention=True),
}


class Work:
    """Arrays by name, in files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, make: Callable[[], dict[str, np.ndarray | float]]) -> dict[str, np.ndarray]:
        path = self.directory / f"{name.replace(' ', '-').replace(',', '')}.npz"
        if not path.exists():
            started = time.process_time()
            found = make()
            np.savez(path.with_suffix(".tmp.npz"), seconds=time.process_time() - started, **found)  # type: ignore
            path.with_suffix(".tmp.npz").replace(path)
            print(f"{name}: {time.process_time() - started:.0f} s of CPU", flush=True)
        return dict(np.load(path))


def sample_of_sides(model: Model) -> list[tuple[str, int]]:
    layers, shape = range(model.shape.n_layers), model.shape
    every = [(f"attn_q@{i}", h) for i in layers for h in range(shape.n_heads)]
    every += [(f"attn_k@{i}", h) for i in layers for h in range(shape.n_kv_heads)]
    return [every[i] for i in np.random.default_rng(0).permutation(len(every))[:SIDES]]


@torch.inference_mode()
def patch_sides(model: Model, pairs: Pairs, metric: Metric, sides: list[tuple[str, int]]) -> Tensor:
    """m(x) − m(x with one head's query or key as on x′), mean over pairs, [sides]."""
    sites = sorted({site for site, _ in sides})
    other = model.capture(pairs.corrupt, sites)
    rows, n = torch.arange(len(pairs)), len(pairs)
    base = metric(model.logits(pairs.clean), rows)
    found = []
    size = max(1, 512 // pairs.clean.numel())
    for first in range(0, len(sides), size):
        some = sides[first : first + size]
        edits: dict[str, Edit] = {}
        for site in {site for site, _ in some}:

            def edit(value: Tensor, site: str = site, some: list[tuple[str, int]] = some) -> Tensor:
                value = value.clone()
                for i, (own, head) in enumerate(some):
                    if own == site:
                        value[i * n : (i + 1) * n, :, head] = other[site][:, :, head]
                return value

            edits[site] = edit
        values = metric(model.logits(pairs.clean.repeat(len(some), 1), edits=edits), rows.repeat(len(some)))
        found.append((base - values.unflatten(0, (len(some), n))).mean(1))
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--steps", nargs="*", help="names of the parts of the work to do; all without")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = Work(arguments.work)
    model = load(arguments.model)
    layout = layout_of(model)
    pairs, metric, _ = ioi_pairs(model.tokenizer, arguments.pairs, 0)
    fresh, fresh_metric, _ = ioi_pairs(model.tokenizer, arguments.held_out, 1)
    wanted = arguments.steps

    def part(name: str, make: Callable[[], dict]) -> dict[str, np.ndarray]:
        if wanted and not any(name.startswith(w) for w in wanted):
            return {}
        return work.get(name, make)

    def edges(name: str) -> dict:
        found = EDGES[name](model, pairs, metric)
        ends = {"clean": found.clean.numpy(), "corrupt": found.corrupt.numpy()}
        return {"scores": found.scores.numpy(), "completeness": found.completeness, **ends}

    def curve(name: str) -> dict:
        scores = torch.tensor(work.get(f"edges {name}", lambda: edges(name))["scores"])
        found = faithfulness_curve(model, layout, fresh, fresh_metric, scores)
        kept = [(p.share, p.faithfulness.estimate) for p in found.points]
        return {"points": np.array(kept), "cmd": found.area}

    def atp(**how: bool) -> dict:
        found = attribute_nodes(model, pairs, metric, **how)
        return {"scores": found.scores.numpy(), "magnitudes": found.magnitudes.numpy()}

    sides = sample_of_sides(model)
    found = {f"edges {name}": part(f"edges {name}", lambda name=name: edges(name)) for name in EDGES}
    found["AtP"] = part("AtP", lambda: atp(fix_attention=False, drop=False))
    found["AtP*"] = part("AtP-star", atp)
    found["exact"] = part("exact nodes", lambda: {"effects": patch_nodes(model, layout, pairs, metric).numpy()})
    found["sides"] = part("exact sides", lambda: {"effects": patch_sides(model, pairs, metric, sides).numpy()})
    for name in EDGES:
        found[f"curve {name}"] = part(f"curve {name}", lambda name=name: curve(name))
    if all(found.values()):
        nodes = (*layout.sources, *(name for name in layout.destinations if name.startswith("attn_")))
        table = "\n".join(report(arguments, found, layout.sources, [nodes.index(f"{a}.{b}") for a, b in sides])) + "\n"
        print(table)
        if arguments.record:
            with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as file:
                file.write(table)


def report(
    arguments: argparse.Namespace, found: dict[str, dict[str, np.ndarray]], sources: tuple[str, ...], sides: list[int]
) -> list[str]:
    exact = found["exact"]["effects"].mean(1)
    heads = np.array([name.startswith("attn_head") for name in sources])
    mlps = np.array([name.startswith("mlp") for name in sources])
    ends = found["edges EAP"]
    lines = [
        f"\n## Methods of attribution, SmolLM2-135M-Instruct, indirect objects, {arguments.pairs} pairs",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()}, one thread, torch {version('torch')}, "
        f"transformers {version('transformers')}, transformer-lens {version('transformer-lens')}; "
        f"`benchmarks/circuits_methods.py`. Logit difference {ends['clean'].mean():.2f} clean, "
        f"{ends['corrupt'].mean():.2f} counterfactual. Correlations with exchanging each of {len(exact)} sources "
        f"({found['exact']['seconds']:.0f} s of CPU); an edge method's node is the sum of its edges. CMD on "
        f"{arguments.held_out} other pairs, lower is better. Residual: of completeness at the input.",
        "",
        "| method | Pearson | heads | MLPs | Spearman | residual | CMD | f at 1 % | f at 5 % | s of CPU |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in EDGES:
        scores, curve = found[f"edges {name}"], found[f"curve {name}"]
        lines.append(_row(name, scores["scores"].sum(1), exact, heads, mlps) + _edges(scores, curve))
    star = found["AtP*"]
    n = len(sources)
    lines.append(
        _row("AtP", found["AtP"]["scores"][:n], exact, heads, mlps)
        + f" – | – | – | – | {found['AtP']['seconds']:.0f} |"
    )
    lines.append(
        _row("AtP* magnitudes, with sizes of effects", star["magnitudes"][:n], np.abs(exact), heads, mlps)
        + f" – | – | – | – | {star['seconds']:.0f} |"
    )
    reference = found["sides"]["effects"]
    lines += [
        "",
        f"{len(sides)} random queries and keys, exchanged in {found['sides']['seconds']:.0f} s of CPU:",
        "",
        "| method | Pearson | Spearman |",
        "|---|---:|---:|",
    ]
    for name, values in (("AtP", found["AtP"]["scores"]), ("AtP*", star["scores"])):
        r, rho = pearsonr(values[sides], reference)[0], spearmanr(values[sides], reference)[0]
        lines.append(f"| {name} | {r:.3f} | {rho:.3f} |")
    r, rho = (f(star["magnitudes"][sides], np.abs(reference))[0] for f in (pearsonr, spearmanr))
    return [*lines, f"| AtP* magnitudes, with sizes of effects | {r:.3f} | {rho:.3f} |"]


def _row(name: str, values: np.ndarray, exact: np.ndarray, heads: np.ndarray, mlps: np.ndarray) -> str:
    parts = [pearsonr(values[which], exact[which])[0] for which in (slice(None), heads, mlps)]
    cells = " | ".join(f"{x:.3f}" for x in (*parts, spearmanr(values, exact)[0]))
    return f"| {name} | {cells} |"


def _edges(scores: dict[str, np.ndarray], curve: dict[str, np.ndarray]) -> str:
    kept = {
        round(share, 3): f
        for share, f in zip((0.001, 0.002, 0.005, 0.01, 0.02, 0.05), curve["points"][:6, 1], strict=True)
    }
    return (
        f" {float(scores['completeness']):.1%} | {float(curve['cmd']):.3f} | {kept[0.01]:.2f} | {kept[0.05]:.2f} | "
        f"{float(scores['seconds']):.0f} |"
    )


if __name__ == "__main__":
    main()
