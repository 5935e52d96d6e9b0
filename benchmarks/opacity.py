"""Opacity against planted truth.

    python benchmarks/opacity.py [--nets 60] [--learned 40] [--record]

**Planted units.** Random residual ReLU nets (``planted_nets.py``) with a share p of hidden units declared unexplained,
40 pairs of prompts each: the 2×2 (B), integrated gradients' first passage (C), flow of absolute values and the signed
root decomposition of attribution graphs (A), and how they rank nets of one p. The truth is the 2×2 by brute force over
the true units; B computes the same by another way.

**Learned dictionaries.** Nets with seldom active units, a random share of them legible: *when such a unit is active* is
what rules may say. Transcoders are trained from three seeds on what each layer reads and writes; a latent is labelled
by the best legible unit on half of the tokens and scored on the other half (q: lower 95 % bound of 2·balanced
accuracy − 1). Ω is then compared with the planted truth, over nets and over seeds.
"""

import argparse
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import numpy as np
import torch
from planted_nets import PlantedNet, difference, exact, planted, prompts
from scipy.stats import spearmanr, theilslopes
from torch import Tensor

from heredity.circuits.attribution_graph_record import AttributionGraph, Kept
from heredity.circuits.opacity import opacity
from heredity.circuits.opacity_estimate import Opacity, Refused
from heredity.circuits.opacity_flow import flow_opacity
from heredity.circuits.opacity_parts import DictionaryPart
from heredity.circuits.opacity_profile import opacity_profile
from heredity.circuits.opacity_split import Split
from heredity.circuits.pairs import Pairs
from heredity.interp.dictionaries.record import Dictionary, Port
from heredity.interp.dictionaries.training.loop import train
from heredity.interp.dictionaries.training.recipe import Recipe
from heredity.interp.dictionaries.training.rows import Rows

RESULTS = Path(__file__).parent / "RESULTS.md"
SHARES = (0.0, 0.1, 0.3, 0.5, 0.8, 1.0)
PAIRS = 40


@dataclass(frozen=True)
class Measured:
    """One net: Ω, its terms, the companions."""

    omega: float
    needed: float
    alone: float
    first_passage: float
    completeness: float
    flow: float
    signed: float
    off: float
    """|Ω − brute force|."""


# --- planted units ---


def brute_force(net: PlantedNet, pairs: Pairs, q: Tensor) -> float:
    """Ω by plain loops over layers, units [L, M] clamped by their q."""
    read = net.readout[:, 0] - net.readout[:, 1]

    def run(tokens: Tensor, held: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        x, hidden = net.embedding[tokens[:, 0]], []
        for layer in range(net.n_layers):
            a = torch.relu(x @ net.W[layer] + net.b[layer])
            hidden.append(a)
            x = x + (a if held is None else q[layer] * a + (1 - q[layer]) * held[layer]) @ net.out[layer]
        return x @ read, hidden

    (v11, h1), (v00, h0) = run(pairs.clean, None), run(pairs.corrupt, None)
    v10, v01 = run(pairs.clean, h0)[0], run(pairs.corrupt, h1)[0]
    return float((v11 - v10 + v01 - v00).sum() / (v11 - v00).sum() / 2)


def graph_of(net: PlantedNet, token: int) -> tuple[AttributionGraph, Tensor]:
    """The attribution graph of the logit difference at a token, and the unit of each of its latents."""
    x, read = net.embedding[token], net.readout[:, 0] - net.readout[:, 1]
    active, rows, writes, pres, biases = [], [], [], [], []
    for layer in range(net.n_layers):
        pre = x @ net.W[layer] + net.b[layer]
        for unit in (pre > 0).nonzero()[:, 0].tolist():
            active.append((layer, 0, unit))
            rows.append(net.W[layer][:, unit])
            writes.append(pre[unit] * net.out[layer][unit])
            pres.append(pre[unit])
            biases.append(net.b[layer][unit])
        x = x + torch.relu(pre) @ net.out[layer]
    targets, latents = torch.stack([*rows, read]), torch.tensor(active)
    weights = targets @ torch.stack(writes).T
    weights[:-1][latents[:, None, 0] <= latents[None, :, 0]] = 0
    weights = torch.cat([weights, (targets @ net.embedding[token])[:, None]], 1)
    constant = torch.cat([torch.stack(biases), torch.zeros(1, dtype=torch.float64)])
    graph = AttributionGraph(
        prompt=str(token),
        places=("",),
        n_layers=net.n_layers,
        latents=latents,
        activations=torch.stack(pres),
        errors=torch.zeros(0, 2, dtype=torch.int64),
        tokens=torch.tensor([[token, 0]]),
        logits=("difference",),
        logit_tokens=(-1,),
        logit_weights=torch.ones(1, dtype=torch.float64),
        weights=weights,
        read=torch.cat([torch.stack(pres), (x @ read)[None]]),
        constant=constant,
        dropped=torch.zeros(len(constant), 2, dtype=torch.float64),
        kept=Kept(len(latents), len(latents)),
    )
    return graph, latents[:, 2]


def one_net(seed: int, p: float) -> Measured | None:
    """A net and a draw of unexplained units; None where the effect is not told from 0."""
    net, pairs = planted(seed), prompts(planted(seed), PAIRS, seed)
    q = (torch.rand(4, 32, generator=torch.Generator().manual_seed(10_000 + seed)) >= p).double()
    split = Split(tuple(DictionaryPart(exact(net, layer), q[layer]) for layer in range(4)))
    found = opacity(net, pairs, difference, split, routing=False, controls=0)
    profile = opacity_profile(net, pairs, difference, split)
    if isinstance(found, Refused) or isinstance(profile, Refused):
        return None
    flows = []
    for token in pairs.clean[:, 0].tolist():
        graph, units = graph_of(net, token)
        assert float(graph.residuals().max()) < 1e-9
        flow = flow_opacity(graph, q[graph.latents[:, 0], units])
        flows.append((flow.absolute, np.nan if flow.signed[0] is None else flow.signed[0]))
    absolute, signed = np.array(flows).T
    return Measured(
        found.omega.estimate,
        found.needed.estimate,
        found.alone.estimate,
        profile.touch.estimate,
        profile.completeness,
        float(absolute.mean()),
        float(np.nanmedian(signed)),
        abs(found.omega.estimate - brute_force(net, pairs, q)),
    )


def planted_units(n: int, first: int) -> list[str]:
    lines = [
        f"{n} nets per p (4 layers, width 16, 32 units), {PAIRS} pairs each; medians over nets, then rank correlation "
        "over the nets of one p.",
        "",
        "| p | Ω (B) | needed | alone | first passage (C) | absolute flow (A) | signed flow | C~B | slope C on B | A~B "
        "| signed~B | A~C | max off brute force |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for p in SHARES:
        nets = [m for m in (one_net(first + i, p) for i in range(n)) if m is not None]
        column = {name: np.array([getattr(m, name) for m in nets]) for name in Measured.__dataclass_fields__}
        b, c, a, s = (column[name] for name in ("omega", "first_passage", "flow", "signed"))
        middle = [
            f"{np.median(column[k]):.2f}" for k in ("omega", "needed", "alone", "first_passage", "flow", "signed")
        ]
        ranks = [f"{spearmanr(x, y)[0]:.2f}" if p > 0 else "–" for x, y in ((c, b), (a, b), (s, b), (a, c))]
        slope = f"{theilslopes(c, b)[0]:.2f}" if p > 0 else "–"
        cells = [f"{p:g}", *middle, ranks[0], slope, *ranks[1:], f"{column['off'].max():.1e}"]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], len(nets), flush=True)
    return [*lines, ""]


# --- learned dictionaries ---


def trained(net: PlantedNet, layer: int, seed: int, *, latents: int = 64, k: int = 6, steps: int = 800) -> Dictionary:
    """A BatchTopK transcoder of a layer, trained on all tokens, in the net's own precision."""
    ports = Port(f"mlp_in@{layer}"), Port(f"mlp_out@{layer}")
    seen = net.capture(torch.arange(len(net.embedding))[:, None], [port.site for port in ports])
    rows = Rows((tuple(value[:, 0].float() for value in seen.values()),), ports)
    recipe = Recipe(kind="transcoder", latents=latents, k=k, batch=512, tokens=512 * steps, massive=None, seed=seed)
    d = train(recipe, rows).dictionary
    assert d.norm is not None
    encoder, bias, decoder, offset, norm = (
        each.double() for each in (d.W_enc[0], d.b_enc, d.W_dec[0], d.b_dec[0], d.norm)
    )
    return Dictionary("transcoder", d.reads, d.writes, (encoder,), bias, (decoder,), (offset,), d.activation, norm=norm)


def labelled(net: PlantedNet, d: Dictionary, layer: int, legible: Tensor) -> Tensor:
    """q of each latent: the legible unit whose activity predicts its own best on even tokens, scored on odd ones."""
    tokens = torch.arange(len(net.embedding))[:, None]
    seen = net.capture(tokens, [f"mlp_in@{layer}", f"mlp_post@{layer}"])
    active = d.encode(seen[f"mlp_in@{layer}"][:, 0]).to_dense() > 0
    units = seen[f"mlp_post@{layer}"][:, 0][:, legible.bool()] > 0
    q = torch.zeros(d.n_latents, dtype=torch.float64)
    even = torch.arange(len(tokens)) % 2 == 0
    for latent in range(d.n_latents):
        on = active[:, latent]
        if units.shape[1] == 0 or min(int((on & even).sum()), int((on & ~even).sum())) < 10:
            continue
        best = int(accuracy(units[even], on[even])[0].argmax())
        balanced, error = accuracy(units[~even][:, best : best + 1], on[~even])
        q[latent] = max(0.0, float(2 * (balanced - 1.645 * error) - 1))
    return q


def accuracy(predicted: Tensor, on: Tensor) -> tuple[Tensor, Tensor]:
    """Balanced accuracy of predictions [T, n] and its standard error, [n]."""
    hit, miss = predicted[on].double(), (~predicted[~on]).double()
    # One more token, half right, keeps few tokens from being certain.
    shares = [(each.sum(0) + 0.5) / (len(each) + 1) for each in (hit, miss)]
    errors = [(s * (1 - s) / (len(each) + 1)) for s, each in zip(shares, (hit, miss), strict=True)]
    return (shares[0] + shares[1]) / 2, (errors[0] + errors[1]).sqrt() / 2


def learned_dictionaries(n: int, first: int, seeds: int = 3) -> list[str]:
    truth, found, missing = [], [], []
    for i in range(n):
        seed = first + i
        net = planted(seed, tokens=2000, bias=-1.0)
        pairs = prompts(net, PAIRS, seed)
        generator = torch.Generator().manual_seed(20_000 + seed)
        share = float(torch.rand((), generator=generator))
        legible = (torch.rand(4, 32, generator=generator) < share).double()
        estimates, errors = [], []
        for k in range(seeds):
            dictionaries = [trained(net, layer, 100 * k + layer) for layer in range(4)]
            q = [labelled(net, d, layer, legible[layer]) for layer, d in enumerate(dictionaries)]
            split = Split(tuple(DictionaryPart(d, each) for d, each in zip(dictionaries, q, strict=True)))
            opaque = opacity(net, pairs, difference, split, routing=False, controls=0)
            every = opacity(
                net, pairs, difference, split.with_q([torch.ones_like(x) for x in q]), routing=False, controls=0
            )
            if isinstance(opaque, Opacity) and isinstance(every, Opacity):
                estimates.append(opaque.omega.estimate)
                errors.append(every.omega.estimate)
        if len(estimates) == seeds:
            truth.append(brute_force(net, pairs, legible))
            found.append(estimates)
            missing.append(errors)
            print(
                f"{seed} share {share:.2f} truth {truth[-1]:.3f}",
                np.round(estimates, 3),
                np.round(errors, 3),
                flush=True,
            )
    t, f, e = np.array(truth), np.array(found), np.array(missing)
    spread = np.abs(f - f.mean(1, keepdims=True))
    by_seed = ", ".join(f"{spearmanr(f[:, k], t)[0]:.3f}" for k in range(seeds))
    rank, slope = spearmanr(f.mean(1), t)[0], theilslopes(f.mean(1), t)[0]
    draws = np.random.default_rng(0).integers(len(t), size=(2000, len(t)))
    low, high = np.quantile([spearmanr(f[draw].mean(1), t[draw])[0] for draw in draws], [0.025, 0.975])
    return [
        f"Learned dictionaries ({len(t)} nets, {seeds} seeds, BatchTopK, 6 of 64 latents, planted Ω from "
        f"{t.min():.2f} to {t.max():.2f}): rank correlation of Ω with the planted truth {rank:.3f} "
        f"[{low:.2f}; {high:.2f}] (bootstrap over nets; single seeds {by_seed}), slope {slope:.2f}; "
        f"over seeds, |Ω − mean| is {spread.mean():.3f} on "
        f"average, {np.quantile(spread, 0.95):.3f} at the 95th percentile, below 0.05 in {np.mean(spread < 0.05):.0%}. "
        f"With every latent taken for explained Ω is {np.median(e):.3f} (what the dictionaries leave over).",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=int, default=60)
    parser.add_argument("--learned", type=int, default=40)
    parser.add_argument("--first", type=int, default=1000, help="seed of the first net")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    lines = [f"\n## Opacity against planted truth\n\n{platform.processor() or platform.machine()}, one thread.\n"]
    if options.nets:
        lines += planted_units(options.nets, options.first)
    if options.learned:
        lines += learned_dictionaries(options.learned, options.first)
    lines.append(f"({time.perf_counter() - started:.0f} s)")
    print("\n".join(lines))
    if options.record:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
