"""Which method finds the concepts that only one of two models has: recall and false positives where the truth is known.

    python benchmarks/toy_dictionaries.py --seeds 0:5 [--scenarios plain …] [--record]

Every scenario of ``toy.py`` is drawn with every seed; every recipe of ``toy_recipes.py`` is trained on it once and
judged by the criterion it was published with, on tokens it was not trained on. *Ours* is the verdict of
``heredity.interp.dictionaries.exclusives`` on two of those same dictionaries, DFC's and the difference's (L1's where
the models share no basis), which were chosen, with all thresholds, on seeds 100 and above. *Our verdict* is the same on
each dictionary alone: what the verdict does, apart from what a second dictionary adds. ``--record`` appends the table
to ``RESULTS.md``.

A latent that is called exclusive is right if its decoder row in that model has a cosine above 0.9 with a concept that
is truly that model's alone; otherwise it is a false positive. Recall is the share of exclusive concepts found so, the
false-positive rate the share of latents called so wrongly among the active latents that match no exclusive concept.
"""

import argparse
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import torch
from torch import Tensor
from toy import PARENT, SCENARIOS, SUCCESSOR, Pair, Scenario, draw
from toy_recipes import RECIPES, train

from heredity.interp.dictionaries import Dictionary, Exclusives, delta_norm, exclusives, latent_scaling, paired
from heredity.interp.dictionaries.exclusive import reconciled, same_basis

MATCH = 0.9
ALIVE = 30
"""Active held-out tokens below which a latent is dead: it is neither right nor wrong."""
Called = dict[int, int]
"""Latents called exclusive, and the model (0 parent, 1 successor)."""


@dataclass(frozen=True)
class Score:
    """One method on one draw of a scenario."""

    found: int
    exclusive: int
    false: int
    negatives: int
    called: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:5", help="first:past-the-last")
    parser.add_argument("--scenarios", nargs="+", default=[scenario.name for scenario in SCENARIOS])
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    first, last = map(int, arguments.seeds.split(":"))
    scores: dict[tuple[str, str], list[Score]] = defaultdict(list)
    for seed in range(first, last):
        for scenario in (each for each in SCENARIOS if each.name in arguments.scenarios):
            for method, score in judged(scenario, seed):
                scores[method, scenario.name].append(score)
                print(scenario.name, seed, method, score, flush=True)
    table = render(scores, arguments.seeds, time.monotonic() - start)
    print(table)
    if arguments.record:
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.write(table + "\n")


def judged(scenario: Scenario, seed: int) -> Iterator[tuple[str, Score]]:
    """Every method on one pair."""
    pair = draw(scenario, seed)
    trained: dict[str, Dictionary] = {}
    for name, recipe in RECIPES.items():
        # One decoder row for two models, and the difference of their activations, need one width.
        if scenario.widths[0] == scenario.widths[1] or not (recipe.difference or recipe.tied):
            latents = scenario.latents // 3 if recipe.difference else scenario.latents
            trained[name] = train(recipe, pair.parent, pair.successor, latents=latents, seed=seed)
    for method, (name, criterion) in PUBLISHED.items():
        if name in trained:
            yield method, score([(trained[name], criterion(trained[name], pair))], pair)
    verdicts = {name: judge(dictionary, pair) for name, dictionary in trained.items()}
    for name, (_, found) in verdicts.items():
        yield f"{name}, our verdict", score([(trained[name], by_verdict(found))], pair)
    first, second = bases(trained)
    crosscoder, found = verdicts[second]
    if crosscoder is not trained[second]:
        found = reconciled(crosscoder, found, *verdicts[first])
    both = (first, by_verdict(verdicts[first][1])), (second, by_verdict(found))
    yield OURS, score([(trained[name], called) for name, called in both], pair)


def bases(trained: dict[str, Dictionary]) -> tuple[str, str]:
    """The two recipes under our verdict, chosen on seeds 100–102: where the models share no basis, no difference."""
    return "DFC", "difference SAE" if "difference SAE" in trained and same_basis(trained["DFC"]) else "L1"


def by_norm(dictionary: Dictionary, pair: Pair) -> Called:
    """Δnorm above 0.9 or below 0.1 (Minder et al.)."""
    delta = delta_norm(dictionary)
    called = dict.fromkeys((delta < 0.1).nonzero()[:, 0].tolist(), 0)
    return called | dict.fromkeys((delta > 0.9).nonzero()[:, 0].tolist(), 1)


def by_norm_and_scaling(dictionary: Dictionary, pair: Pair) -> Called:
    """The same, and ν^ε < 0.2 and ν^r < 0.5, cut-offs as published."""
    scaling = latent_scaling(dictionary, in_batches(pair))
    clear = (scaling.nu_error < 0.2) & (scaling.nu_reconstruction < 0.5)
    return {latent: model for latent, model in by_norm(dictionary, pair).items() if clear[latent]}


def by_block(dictionary: Dictionary, pair: Pair) -> Called:
    """In the block dedicated to one model."""
    lengths = dictionary.decoder_norms
    return {j: int(lengths[1, j] > 0) for j in ((lengths == 0).any(0)).nonzero()[:, 0].tolist()}


def by_activation(dictionary: Dictionary, pair: Pair) -> Called:
    """Of the difference's latents: β of one model's activations under 0.2 of the other's."""
    features = dictionary.encode(pair.held_out[1] - pair.held_out[0]).to_dense()
    rows = dictionary.W_dec[0]
    parent, successor = (((features.T @ x) * rows).sum(1) for x in pair.held_out)
    low, high = torch.minimum(parent.abs(), successor.abs()), torch.maximum(parent.abs(), successor.abs())
    return {j: int(successor[j].abs() > parent[j].abs()) for j in (low < 0.2 * high).nonzero()[:, 0].tolist()}


def judge(dictionary: Dictionary, pair: Pair) -> tuple[Dictionary, Exclusives]:
    """The verdict, and the crosscoder it is on: a difference is read as one first."""
    crosscoder = dictionary if dictionary.kind == "crosscoder" else paired(dictionary, in_batches(pair))
    return crosscoder, exclusives(crosscoder, in_batches(pair))


def by_verdict(found: Exclusives) -> Called:
    """Ours."""
    return {v.latent: int(v.model == "successor") for v in found.latents if v.verdict.endswith("-only")}


Criterion = Callable[[Dictionary, Pair], Called]
PUBLISHED: dict[str, tuple[str, Criterion]] = {
    "L1, Δnorm": ("L1", by_norm),
    "BatchTopK, Δnorm": ("BatchTopK", by_norm),
    "BatchTopK, Δnorm and ν": ("BatchTopK", by_norm_and_scaling),
    "DSF, Δnorm": ("DSF", by_norm),
    "DFC, its blocks": ("DFC", by_block),
    "DFC, Δnorm": ("DFC", by_norm),
    "difference SAE, β": ("difference SAE", by_activation),
}
OURS = "ours"


def score(parts: list[tuple[Dictionary, Called]], pair: Pair) -> Score:
    """Against the truth; latents that are hardly ever active are left out."""
    own = [torch.tensor([i for i, kind in enumerate(pair.kinds) if kind == name]) for name in (PARENT, SUCCESSOR)]
    found: list[set[int]] = [set(), set()]
    false = negatives = calls = 0
    for dictionary, called in parts:
        x = pair.held_out if dictionary.kind == "crosscoder" else (pair.held_out[1] - pair.held_out[0],)
        count = torch.bincount(dictionary.encode(*x).indices.long(), minlength=dictionary.n_latents)
        alive = count >= ALIVE
        matches = [_matches(dictionary, model, pair.directions[model][own[model].long()]) for model in range(2)]
        negatives += int((alive & ~matches[0].any(1) & ~matches[1].any(1)).sum())
        for j, model in called.items():
            if alive[j]:
                found[model] |= set(matches[model][j].nonzero()[:, 0].tolist())
                false += not bool(matches[model][j].any())
                calls += 1
    return Score(sum(map(len, found)), sum(map(len, own)), false, negatives, calls)


def in_batches(pair: Pair, size: int = 8192) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(pair.held_out[0]), size):
        yield pair.held_out[0][start : start + size], pair.held_out[1][start : start + size]


def _matches(dictionary: Dictionary, model: int, directions: Tensor) -> Tensor:
    """Whether each latent's row matches each direction [F, n]; the difference's rows point away from the parent's."""
    decoder = dictionary.W_dec[model] if dictionary.kind == "crosscoder" else dictionary.W_dec[0]
    cosines = torch.nn.functional.normalize(decoder, dim=1) @ directions.T
    if dictionary.kind == "sae" and model == 0:
        cosines = -cosines
    return cosines > MATCH


def render(scores: dict[tuple[str, str], list[Score]], seeds: str, seconds: float) -> str:
    """Tables of recall and of false positives, mean ± standard deviation over seeds."""
    methods = list(dict.fromkeys(method for method, _ in scores))
    methods.sort(key=lambda method: method == OURS)
    scenarios = list(dict.fromkeys(scenario for _, scenario in scores))
    lines = [
        "",
        f"## Exclusive latents on activations of known truth, seeds {seeds}",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, one thread, torch {torch.__version__}, {seconds:.0f} s; "
        f"`benchmarks/toy_dictionaries.py`. Mean ± standard deviation over seeds.",
    ]
    parts = {
        "Recall of exclusive concepts": lambda s: s.found / s.exclusive if s.exclusive else None,
        "False-positive rate, %": lambda s: 100 * s.false / s.negatives if s.negatives else None,
        "Latents called exclusive that are not, of all called (summed over seeds)": None,
    }
    for title, value in parts.items():
        lines += [
            "",
            f"### {title}",
            "",
            "| method | " + " | ".join(scenarios) + " |",
            "|---" * (len(scenarios) + 1) + "|",
        ]
        for method in methods:
            cells = [_cell(scores.get((method, scenario)), value) for scenario in scenarios]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(scores: list[Score] | None, value: Callable[[Score], float | None] | None) -> str:
    if not scores:
        return "n/a"
    if value is None:
        return f"{sum(s.false for s in scores)}/{sum(s.called for s in scores)}"
    values = [v for s in scores if (v := value(s)) is not None]
    if not values:
        return "–"
    spread = torch.tensor(values).std(unbiased=False)
    return f"{sum(values) / len(values):.2f} ± {spread:.2f}"


if __name__ == "__main__":
    main()
