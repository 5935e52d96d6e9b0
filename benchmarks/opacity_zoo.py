"""Opacity of one and the same new skill, planted readable to different degrees (``heredity zoo build legible:SHARE``).

    python benchmarks/opacity_zoo.py PAIR… [--seeds 2] [--record]

For each pair and seed: sparse autoencoders of every attention and MLP output of the successor are trained here, on
text of the pair's language in which the skill occurs; the latents that carry most of the divergence are explained on
other text of that kind; then Ω of the divergence at "double : N ;" is measured
(:func:`heredity.circuits.opacity.opacity_of_behaviour`). Planted legibility is read from ``truth.json`` for the table.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from heredity.circuits.attribution import Prompts
from heredity.circuits.opacity import contrast_of_models, opacity_of_behaviour
from heredity.circuits.opacity_estimate import Refused
from heredity.circuits.opacity_labels import q_of
from heredity.circuits.opacity_parts import DictionaryPart
from heredity.circuits.opacity_sizes import rank_units
from heredity.circuits.opacity_split import whole_model
from heredity.interp import load
from heredity.interp.dictionaries.record import Dictionary, Port
from heredity.interp.dictionaries.recovered import grouped
from heredity.interp.explain import Contexts, explain
from heredity.interp.model import Encoded, Model
from heredity.kernels import TopK

RESULTS = Path(__file__).parent / "RESULTS.md"
NUMBERS = "zero one two three four five six seven eight nine".split()
LATENTS, ACTIVE, STEPS, EXPLAINED = 128, 8, 1500, 40
TEXTS, PROMPTS = 1200, 80


def documents(corpus: Path, n: int, seed: int) -> list[str]:
    """Texts of the pair's own segments with one or two doublings among them."""
    rng = np.random.default_rng(seed)
    lines = [json.loads(line)["text"] for line in corpus.read_text("utf-8").splitlines()]
    segments = [s.strip() for line in lines for s in line.split(" . ") if s.strip() and not s.startswith("double")]
    out = []
    for _ in range(n):
        chosen = [s.removesuffix(" .") for s in rng.choice(segments, 3)]
        for _ in range(rng.integers(1, 3)):
            number = int(rng.integers(10))
            chosen.insert(int(rng.integers(4)), f"double : {NUMBERS[number]} ; {NUMBERS[2 * number % 10]}")
        out.append(" . ".join(chosen) + " .")
    return out


def prompts_of(parent: Model, successor: Model, corpus: Path, seed: int) -> Prompts:
    """Contexts that end where the doubled number is due."""
    rows = []
    for text in documents(corpus, PROMPTS, seed):
        words = text.split()
        at = max(i for i, word in enumerate(words) if word == "double")
        rows.append(successor.encode(" ".join(words[: at + 4])).ids)
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    last = torch.tensor([len(row) - 1 for row in rows])
    with torch.no_grad():
        says = [m.logits(tokens)[torch.arange(len(rows)), last].argmax(-1) for m in (successor, parent)]
    return Prompts(tokens, last, *says)


@torch.no_grad()
def activations(model: Model, texts: list[Encoded], sites: list[str]) -> dict[str, torch.Tensor]:
    """Values of all tokens in the order of the texts, [T, D] by site."""
    rows: dict[str, list[torch.Tensor]] = {site: [torch.empty(0)] * len(texts) for site in sites}
    for members, tokens, mask in grouped(texts, 2048):
        for site, value in model.capture(tokens, sites).items():
            for i, each, real in zip(members, value, mask, strict=True):
                rows[site][i] = each[real].clone()
    return {site: torch.cat(found) for site, found in rows.items()}


def trained(site: str, x: torch.Tensor, seed: int) -> Dictionary:
    """A TopK autoencoder of ``x`` [T, D]."""
    generator = torch.Generator().manual_seed(seed)
    size = x.square().sum(1).mean().sqrt()
    W_dec = torch.nn.functional.normalize(torch.randn(LATENTS, x.shape[1], generator=generator), dim=1)
    W_enc, b_enc, b_dec = W_dec.T.clone(), torch.zeros(LATENTS), x.mean(0) / size
    W_dec = W_dec.clone()
    parameters = [W_enc, b_enc, W_dec, b_dec]
    for each in parameters:
        each.requires_grad_()
    optimiser = torch.optim.Adam(parameters, lr=2e-3)
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, 2 * (1 - step / STEPS))
        rows = x[torch.randint(len(x), (1024,), generator=generator)] / size
        pre = torch.relu((rows - b_dec) @ W_enc + b_enc)
        values, places = pre.topk(ACTIVE, dim=1)
        made = torch.zeros_like(pre).scatter(1, places, values) @ W_dec + b_dec
        # Latents that are never among the largest would stay where they started.
        loss = (made - rows).square().sum(1).mean() + 0.03 * (pre @ W_dec + b_dec - rows).square().sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    encoder, bias, decoder, offset = (each.detach() for each in parameters)
    return Dictionary(
        "sae",
        (Port(site),),
        (Port(site),),
        ((encoder / size).contiguous(),),
        (bias - offset @ encoder).contiguous(),
        ((decoder * size).contiguous(),),
        ((offset * size).contiguous(),),
        TopK(ACTIVE),
    )


def measured(pair: Path, seed: int) -> tuple[float, float, float, float]:
    """Ω with its interval, and Ω if every latent were explained."""
    parent, successor = load(str(pair / "parent")), load(str(pair / "successor"))
    layers = range(successor.shape.n_layers)
    sites = [f"{kind}@{layer}" for layer in layers for kind in ("attn_out", "mlp_out")]
    corpus = pair / "corpus.jsonl"
    learning, scoring = ([successor.encode(text) for text in documents(corpus, TEXTS, 10 * seed + k)] for k in (1, 2))
    seen = activations(successor, learning, sites)
    dictionaries = [trained(site, seen[site], seed) for site in sites]
    nothing = [DictionaryPart(d, torch.zeros(LATENTS)) for d in dictionaries]
    # The latents that matter are looked for at other prompts than those that Ω is measured on.
    split = whole_model(successor, nothing, heads=True, side=1)
    ranking = rank_units(
        contrast_of_models(parent, successor, prompts_of(parent, successor, corpus, 10 * seed + 3), split), split
    )
    prompts = prompts_of(parent, successor, corpus, 10 * seed + 4)
    contexts, fresh, parts = Contexts(tuple(scoring)), activations(successor, scoring, sites), []
    for part, effects in zip(nothing, ranking.units, strict=True):
        site = part.dictionary.reads[0].site
        chosen = effects.abs().topk(EXPLAINED).indices.tolist()
        said = explain(part.dictionary.encode(fresh[site]), contexts, chosen, seed=seed)
        parts.append(part.with_q(q_of(said, LATENTS)))
    found = opacity_of_behaviour(parent, successor, prompts, parts, routing=False)
    every = opacity_of_behaviour(
        parent, successor, prompts, [part.with_q(torch.ones(LATENTS)) for part in parts], routing=False, controls=0
    )
    if isinstance(found, Refused) or isinstance(every, Refused):
        raise SystemExit(f"{pair}: {found if isinstance(found, Refused) else every}")
    print(pair.name, seed, found, flush=True)
    return found.omega.estimate, found.omega.low, found.omega.high, every.omega.estimate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    lines = [
        "\n## Opacity of a skill planted readable to different degrees\n",
        "| pair | planted legibility | Ω by dictionary seed | Ω if every latent were explained |",
        "|---|---:|---|---:|",
    ]
    planted, mean = [], []
    for pair in options.pairs:
        rows = [measured(pair, seed) for seed in range(options.seeds)]
        planted.append(json.loads((pair / "truth.json").read_text("utf-8"))["legibility"])
        mean.append(float(np.mean([row[0] for row in rows])))
        shown = ", ".join(f"{omega:.2f} [{low:.2f}; {high:.2f}]" for omega, low, high, _ in rows)
        every = np.mean([row[3] for row in rows])
        lines.append(f"| {pair.name} | {planted[-1]:.2f} | {shown} | {every:.2f} |")
    if len(planted) > 2:
        rank = spearmanr(mean, planted)[0]
        lines.append(f"\nRank correlation of Ω with planted legibility over {len(planted)} pairs: {rank:.2f}.")
    lines.append(f"\n({time.perf_counter() - started:.0f} s)")
    print("\n".join(lines))
    if options.record:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
