"""Do scores of edges find circuits that are known? Area under the ROC curve of edges, by method and model.

    python benchmarks/circuits_truth.py [--pairs 24] [--seed 0] [--only KIND] [--record]

The models (``beds/``): hand-set induction heads, programs compiled by tracr, models trained with strict interchange.
Every method sees the same pairs. Edges are ranked by |score|; ties count half. In trained models the truth is between
parts (a head's query, key and value are one, and score as the largest of the three), because training says no more.
ACDC is ``heredity.circuits.acdc`` over thresholds from 10⁻⁵ to 10 of the divergence, an edge ranked by the largest at
which it stays. ``--record`` appends the tables to ``RESULTS.md``.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import torch
from beds import hand_set
from beds.cases import Case, Outputs, cases
from machine import machine
from torch import Tensor

from heredity.circuits.acdc import prune, prune_scores
from heredity.circuits.activation_paths import attribute_edges_by_activations
from heredity.circuits.atp import attribute_nodes
from heredity.circuits.edges import attribute_edges
from heredity.circuits.exact_edges import exchange_edges
from heredity.circuits.layout import layout_of
from heredity.circuits.pairs import Metric, Pairs
from heredity.circuits.relp import attribute_edges_by_relevance
from heredity.interp.model import Model

THRESHOLDS = [10 ** (i / 2) for i in range(-10, 3)]


def _random(case: Case, metric: Metric) -> Tensor:
    return torch.rand(case.truth.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _acdc(case: Case, metric: Metric) -> Tensor:
    return prune_scores(prune(case.model, case.layout, case.pairs, case.divergence, THRESHOLDS), THRESHOLDS)


METHODS: dict[str, Callable[[Case, Metric], Tensor]] = {
    "random": _random,
    "EAP": lambda case, metric: attribute_edges(case.model, case.pairs, metric, method="eap").scores,
    "clean-corrupted": lambda case, metric: (
        attribute_edges(case.model, case.pairs, metric, method="clean-corrupted").scores
    ),
    "EAP-IG, 5 steps": lambda case, metric: attribute_edges(case.model, case.pairs, metric, steps=5).scores,
    "EAP-IG, 20 steps": lambda case, metric: attribute_edges(case.model, case.pairs, metric, steps=20).scores,
    "EAP-IG-activations, 5": lambda case, metric: (
        attribute_edges_by_activations(case.model, case.pairs, metric, steps=5).scores
    ),
    "RelP": lambda case, metric: attribute_edges_by_relevance(case.model, case.pairs, metric).scores,
    "RelP along the path, 5": lambda case, metric: (
        attribute_edges_by_relevance(case.model, case.pairs, metric, method="eap-ig", steps=5).scores
    ),
    "exact": lambda case, metric: exchange_edges(case.model, case.pairs, metric).scores,
    "ACDC": _acdc,
}
PUBLISHED = {
    "ACDC": "0.95 (another reading 0.85)",
    "EAP-IG, 5 steps": "0.90",
    "EAP": "0.20",
}
METRICS = ("difference", "divergence")


def auroc(scores: Tensor, truth: Tensor) -> float:
    """Probability that a true edge scores above a false one, ties half."""
    true, false = scores[truth], scores[~truth]
    above = (true[:, None] > false).double() + (true[:, None] == false).double() / 2
    return float(above.mean())


def judged(case: Case, scores: Tensor) -> float:
    size = scores.abs()
    if not case.by_part:
        return auroc(size[case.counted], case.truth[case.counted])
    parts: dict[str, list[int]] = {}
    for column, name in enumerate(case.layout.destinations):
        owner = case.layout.owner(name)
        parts.setdefault(owner if isinstance(owner, str) else owner[0], []).append(column)
    merged = [torch.stack([x[:, c].amax(1) for c in parts.values()], 1) for x in (size, case.truth, case.counted)]
    return auroc(merged[0][merged[2]], merged[1][merged[2]])


def saturation(n: int, seed: int) -> list[str]:
    """Effects of the induction head's query, key and value, exact and by AtP and AtP*."""
    lines = [
        "| sharpness | node | exact | AtP | AtP* | AtP* magnitude |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for sharpness in (2.0, 10.0, 30.0, 100.0):
        model = hand_set.induction(sharpness)
        clean, corrupt = hand_set.prompts(n, torch.Generator().manual_seed(seed))
        pairs = Pairs(clean, corrupt, torch.full((n,), hand_set.LENGTH - 1))
        last = [hand_set.LENGTH - 1]
        ends = [model.logits(tokens)[:, last].argmax(-1) for tokens in (clean, corrupt)]
        direction = torch.nn.functional.one_hot(ends[0], hand_set.D_VOCAB).float()
        metric = Outputs(last, direction - torch.nn.functional.one_hot(ends[1], hand_set.D_VOCAB))
        plain = attribute_nodes(model, pairs, metric, fix_attention=False, drop=False)
        starred = attribute_nodes(model, pairs, metric)
        for name in ("attn_q@1.0", "attn_k@1.0", "attn_v@1.0"):
            i = plain.nodes.index(name)
            exact = exchanged_side(model, pairs, metric, name)
            values = [exact, *(float(x[i]) for x in (plain.scores, starred.scores, starred.magnitudes))]
            cells = " | ".join(f"{value:.3g}" for value in values)
            lines.append(f"| {sharpness:g} | `{name}` | {cells} |")
    return lines


def exchanged_side(model: Model, pairs: Pairs, metric: Metric, name: str) -> float:
    """m(x) − m(x with one head's query, key or value as on x′), mean over pairs."""
    site, _, head = name.partition(".")
    other = model.capture(pairs.corrupt, [site])[site]

    def edit(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, :, int(head)] = other[:, :, int(head)]
        return value

    rows = torch.arange(len(pairs))
    base, moved = (metric(model.logits(pairs.clean, edits=edits), rows) for edits in ({}, {site: edit}))
    return float((base - moved).mean())


def linear(n: int, seed: int) -> str:
    """In a linear net every method is exact: largest miss of each, over the largest effect."""
    from beds.model import BedConfig, bed

    model = bed(BedConfig(3, 4, 16, 4, 16, 12, 12, 8, activation="none"), seed=seed)
    for block in model.bridge.blocks:
        for kind in ("q", "k"):
            for value in getattr(block.attn, kind).parameters():
                value.zero_()
    generator = torch.Generator().manual_seed(seed)
    clean, corrupt = (torch.randint(12, (n, 8), generator=generator) for _ in range(2))
    layout = layout_of(model)
    pairs = Pairs(clean, corrupt, torch.full((n,), 7))
    direction = torch.zeros(n, 1, 12)
    direction[:, 0, 3], direction[:, 0, 4] = 1, -1
    metric = Outputs([7], direction)
    case = Case("linear", "", model, layout, pairs, metric, metric, layout.edges, layout.edges, False)
    exact = METHODS["exact"](case, metric)
    said = []
    for name, method in METHODS.items():
        if name not in ("random", "exact", "ACDC"):
            miss = float((method(case, metric) - exact).abs().max() / exact.abs().max())
            said.append(f"{name} {miss:.0e}")
    into_logits = float(exact[:, -1].sum())
    with torch.inference_mode():
        rows = torch.arange(n)
        total = float((metric(model.logits(clean), rows) - metric(model.logits(corrupt), rows)).mean())
    return (
        f"Linear residual net, 3 layers of 4 heads and a linear MLP, {layout.n_edges} edges: largest miss of an edge's "
        f"score over the largest exact effect: {', '.join(said)}. Edges into the logits add up to the effect within "
        f"{abs(into_logits - total) / abs(total):.0e} of it."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="models of one kind: hand-set, tracr, or strict interchange")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[tuple[str, str], float]] = {}
    seconds = dict.fromkeys(METHODS, 0.0)
    columns: list[Case] = []
    for case in cases(arguments.pairs, arguments.seed):
        if arguments.only not in (None, case.kind):
            continue
        columns.append(case)
        for method, run in METHODS.items():
            for metric in METRICS[:1] if method == "random" else METRICS[1:] if method == "ACDC" else METRICS:
                started = time.process_time()
                scores = run(case, getattr(case, metric))
                seconds[method] += time.process_time() - started
                found.setdefault(f"{method} | {metric}", {})[case.kind, case.name] = judged(case, scores)
        print(case.kind, case.name, {k: round(v[case.kind, case.name], 3) for k, v in found.items()}, flush=True)
    table = "\n".join(report(arguments, columns, found, seconds)) + "\n"
    print(table)
    if arguments.record:
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.write(table)


def report(
    arguments: argparse.Namespace,
    columns: list[Case],
    found: dict[str, dict[tuple[str, str], float]],
    seconds: dict[str, float],
) -> list[str]:
    keys = [(case.kind, case.name) for case in columns]
    lines = [
        f"\n## Edges of known circuits, {arguments.pairs} pairs, seed {arguments.seed}",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()}, one thread, torch {version('torch')}; "
        f"`benchmarks/circuits_truth.py --pairs {arguments.pairs} --seed {arguments.seed}"
        f"{f' --only {arguments.only!r}' if arguments.only else ''}`. AUROC of edges by two metrics: outputs along "
        "clean − counterfactual answer / −KL to clean outputs (minus squared distance for tracr), which is ACDC's. In "
        "brackets: true edges / edges counted. Seconds are of CPU, all models and both metrics together.",
        "",
        f"| model | {' | '.join(METHODS)} |",
        "|---|" + "---:|" * len(METHODS),
    ]

    def cells(value: Callable[[dict], float]) -> str:
        shown = []
        for method in METHODS:
            values = [found[f"{method} | {m}"] for m in METRICS if f"{method} | {m}" in found]
            shown.append(" / ".join(f"{value(one):.2f}" for one in values))
        return " | ".join(shown)

    for key, case in zip(keys, columns, strict=True):
        row = cells(lambda values, key=key: values[key])
        lines.append(f"| {case.kind}: {case.name} ({case.truth.sum()}/{case.counted.sum()}) | {row} |")
    for kind in dict.fromkeys(case.kind for case in columns):
        chosen = [key for key in keys if key[0] == kind]
        row = cells(lambda values, chosen=chosen: statistics.median(values[key] for key in chosen))
        lines.append(f"| median, {kind} | {row} |")
    lines.append(f"| lowest | {cells(lambda values: min(values.values()))} |")
    lines.append(f"| s | {' | '.join(f'{seconds[method]:.0f}' for method in METHODS)} |")
    lines.append(f"| published, InterpBench median | {' | '.join(PUBLISHED.get(m, '–') for m in METHODS)} |")
    lines += ["", linear(arguments.pairs, arguments.seed), ""]
    return [
        *lines,
        "Queries and keys of the hand-set induction head:",
        "",
        *saturation(arguments.pairs, arguments.seed),
    ]


if __name__ == "__main__":
    main()
