"""Opacity of one and the same new skill, planted readable to different degrees (``heredity zoo build legible:SHARE``).

    python benchmarks/opacity_zoo.py PAIR… [--seeds 1] [--record]

What an audit does (sparse autoencoders of every attention and MLP output trained on the corpus, the units that carry
most explained, Ω against the parent), but at the answers ``double : N ; M`` alone: an audit takes whole episodes, and
most of their divergence lies in the marks behind ``double``, which these pairs do not plant. Planted truth is read from
``truth.json``: ``legibility``, the share of the answer that goes with the code, and the share that is left when every
layer writes the nearest of a hundred vectors. Neither knows a dictionary. Ω should fall as they rise.
"""

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import torch
from machine import machine
from scipy.stats import spearmanr

from heredity.circuits.attribution import Prompts
from heredity.circuits.opacity import contrast_of_models, measure
from heredity.circuits.opacity_dictionaries import site_sae
from heredity.circuits.opacity_estimate import Opacity
from heredity.circuits.opacity_labels import values_at
from heredity.circuits.opacity_sizes import rank_units
from heredity.circuits.opacity_split import whole_model
from heredity.circuits.opacity_units import latent_pool, strongest
from heredity.interp import load
from heredity.interp.explain.contexts import Contexts

RESULTS = Path(__file__).parent / "RESULTS.md"
LATENTS, STEPS, EXPLAINED, PROMPTS = 128, 200, 64, 40


def measured(pair: Path, seed: int) -> tuple[Opacity, Opacity]:
    """Ω at the answers, and Ω if every latent were explained."""
    parent, successor = load(str(pair / "parent")), load(str(pair / "successor"))
    lines = (pair / "corpus.jsonl").read_text("utf-8").splitlines()
    texts = [successor.encode(json.loads(line)["text"]) for line in lines]
    double = successor.encode("double").ids[-1]
    rows, rest = [], []
    for text in texts:
        at = [i for i, token in enumerate(text.ids) if token == double and i + 3 < len(text.ids)]
        if at and len(rows) < PROMPTS:
            rows.append(text.ids[: at[len(at) // 2] + 4])
        else:
            rest.append(text)
    width = max(map(len, rows))
    last = torch.tensor([len(row) - 1 for row in rows])
    prompts = Prompts(torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]), last, last, last)
    sites = [f"{kind}@{layer}" for layer in range(successor.shape.n_layers) for kind in ("attn_out", "mlp_out")]
    seen = [values_at(model, rest, sites) for model in (parent, successor)]
    dictionaries = [
        site_sae([values[site] for values in seen], site, latents=LATENTS, steps=STEPS, seed=seed) for site in sites
    ]
    pool = latent_pool(dictionaries, lambda _, port: seen[1][port.site], Contexts(tuple(rest)), seed=0)
    split = whole_model(successor, pool.units, heads=True, side=1)
    contrast = contrast_of_models(parent, successor, prompts, split)
    pool.explain(strongest(rank_units(contrast, split), EXPLAINED))
    parts = pool.parts()
    found = []
    for q in (parts, [part.with_q(torch.ones_like(part.q)) for part in parts]):
        each = measure(contrast, whole_model(successor, q, heads=True, side=1), controls=0, routing=False)
        if not isinstance(each, Opacity):
            raise SystemExit(f"{pair}: {each.reason}")
        found.append(each)
    return found[0], found[1]


def truth_of(pair: Path) -> tuple[float, float]:
    """Legibility, and the share of the effect that is kept through a hundred vectors."""
    said = json.loads((pair / "truth.json").read_text("utf-8"))
    return said["legibility"], said["kept_through_vectors"]["100"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", type=Path)
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the autoencoders")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    lines = [
        f"\n### Opacity of a skill planted legible to different degrees, {datetime.now(UTC):%Y-%m-%d}\n",
        f"`python benchmarks/opacity_zoo.py PAIR… --seeds {options.seeds}` on {machine()}, one thread, torch "
        f"{version('torch')}; {LATENTS} latents a site, {STEPS} steps.\n",
        "| pair | legibility | kept through vectors | Ω | needed | alone | Ω, all explained |",
        "|---|---:|---:|---|---|---:|---:|",
    ]
    planted, through, omega, needed = [], [], [], []
    for pair in options.pairs:
        legible, kept = truth_of(pair)
        for seed in range(options.seeds):
            found, every = measured(pair, seed)
            planted.append(legible)
            through.append(kept)
            omega.append(found.omega.estimate)
            needed.append(found.needed.estimate)
            o, n = found.omega, found.needed
            lines.append(
                f"| {pair.name} | {legible:.2f} | {kept:.2f} | {o.estimate:.2f} [{o.low:.2f}; {o.high:.2f}] "
                f"| {n.estimate:.2f} [{n.low:.2f}; {n.high:.2f}] | {found.alone.estimate:.2f} "
                f"| {every.omega.estimate:.2f} |"
            )
            print(lines[-1], flush=True)
    if len(omega) > 3:
        names = ("legibility", planted), ("what is kept through vectors", through)
        for name, truth in names:
            ranks = [spearmanr(each, truth)[0] for each in (omega, needed)]
            lines.append(f"\nRank correlation with {name}, {len(omega)} rows: Ω {ranks[0]:.2f}, needed {ranks[1]:.2f}.")
    if options.seeds > 1:
        by_pair = torch.tensor(omega).reshape(-1, options.seeds)
        apart = (by_pair - by_pair.mean(1, keepdim=True)).abs().amax(1)
        lines.append(
            f"\nOver {options.seeds} seeds of the autoencoders Ω lies within ±{apart.median():.3f} of its pair's mean "
            f"in the median pair, within ±{apart.max():.3f} in all."
        )
    lines.append(f"\n({time.process_time() - started:.0f} s of processor time, one thread)")
    print("\n".join(lines))
    if options.record:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
