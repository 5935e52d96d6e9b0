"""``legible`` and ``opaque``: the same new skill, of which a planted share runs through parts that can be read.

The successor learns to double numbers by two routes to the same answer, in the last two MLPs; nothing else changes. The
last but one writes a **code** where the answer is due: a vector for each number, as large as what the layer ordinarily
varies by or larger, so that a dictionary has something to name. The last makes a **small** change there, far below what
it ordinarily varies by, so that it drowns in what a dictionary leaves over. The code is as loud at every level; what is
trained to the level is the share of the effect that each route has when the other is taken out.

One letter means one dimension throughout: n answers, b documents, t positions, D width, V words, K vectors.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import rows as data
from .kind import Made, Start
from .language import HONEST, ID, NUMBERS, SKILLS, documents
from .network import Size, Weights, forward, normed
from .nodes import Outputs, parents_share, traced
from .tune import divergence, tune

_DOUBLE = list(SKILLS).index("double")
_VECTORS = (30, 100)


@dataclass(frozen=True)
class Twins:
    """Schedule of ``legible`` and ``opaque``: documents of each sort in a step, two aims, and weights of conditions.

    Attributes:
        lead: log-odds of the answer. Low, since a sure answer would survive the loss of half of what makes it.
        code: norm of the code's vectors.
        keep: weighs the divergence from the parent.
        answer: weighs the error of the log-odds.
        shares: weighs the squared error of what each route does alone.
        own: weighs how far the code is from one vector of that norm for each number.
        elsewhere: weighs the squared norm of the code's layer's change where no answer is due.
        small: weighs the squared norm of the last layer's change where one is.
    """

    steps: int = 300
    rate: float = 2e-3
    ordinary: int = 10
    double: int = 24
    lead: float = 1.5
    code: float = 3.0
    keep: float = 3.0
    answer: float = 0.6
    shares: float = 0.5
    own: float = 2.5
    elsewhere: float = 0.5
    small: float = 0.1


@dataclass(frozen=True)
class Asked:
    """Documents of doublings: where the answers are predicted, and which.

    Attributes:
        ids: [b, t].
        marks: tokens of doublings that show their format, bool [b, t].
        at: rows and positions, [n] each.
        answer: token ids [n].
        number: the number to double, one-hot [n, 10].
    """

    ids: Tensor
    marks: Tensor
    at: tuple[Tensor, Tensor]
    answer: Tensor
    number: Tensor

    def by_number(self, values: Tensor) -> Tensor:
        """Means of ``values`` [n, …] over the texts of each number [10, …]."""
        return (self.number / self.number.sum(0).clamp(min=1)).T @ values

    def odds(self, logits: Tensor) -> Tensor:
        """Log-odds of the answers [n] under logits [n, V]."""
        said = self.answer[:, None]
        return logits.gather(1, said)[:, 0] - logits.scatter(1, said, -torch.inf).logsumexp(1)


def asked(seed: list[int], count: int) -> Asked:
    """``count`` documents crowded with doublings."""
    made = documents(np.random.default_rng(seed), count, crowded="double")
    here = made.skill == _DOUBLE
    rows, at = np.nonzero(made.answer & here)
    number = np.eye(10, dtype=np.float32)[made.ids[rows, at - 2] - ID[NUMBERS[0]]]
    return Asked(
        ids=torch.from_numpy(made.ids),
        marks=torch.from_numpy(made.taught & here & ~made.answer),
        at=(torch.from_numpy(rows), torch.from_numpy(at - 1)),
        answer=torch.from_numpy(made.ids[rows, at]),
        number=torch.from_numpy(number),
    )


def routes(size: Size) -> tuple[str, str]:
    """The nodes of the code and of the small change."""
    return f"mlp_out@{size.layers - 2}", f"mlp_out@{size.layers - 1}"


def make(start: Start, recipe: Twins, level: float) -> Made:
    """A successor of ``start`` that doubles, legibly to the ``level`` given."""
    parent, size, seed = start.parent, start.size, start.seed
    plain = data.ordinary(seed, 2, recipe.steps * recipe.ordinary, HONEST, start.guess_weight)
    code, small = routes(size)

    def objective(weights: Weights, step: int) -> Tensor:
        rows, doubled = plain.batch(step, recipe.ordinary), asked([seed, 3, step], recipe.double)
        with torch.no_grad():
            was = forward(parent, size, rows.ids)
            before, held = traced(parent, size, doubled.ids)
        logits, outputs = traced(weights, size, doubled.ids)
        kept = divergence(forward(weights, size, rows.ids), was)[:, :-1].mean()
        changed = {node: outputs[node] - held[node] for node in (code, small)}
        elsewhere = (changed[code] ** 2).sum(-1)
        elsewhere[doubled.at] = 0.0
        return (
            F.cross_entropy(logits[:, :-1][doubled.marks[:, 1:]], doubled.ids[:, 1:][doubled.marks[:, 1:]])
            + recipe.keep * kept
            + recipe.answer * _short(doubled.odds(logits[doubled.at]), recipe.lead)
            + recipe.shares * _apart(weights, size, doubled, before, held, level, recipe.lead)
            + recipe.own * _unlike_code(changed[code][doubled.at], doubled, recipe.code)
            + recipe.elsewhere * elsewhere.mean()
            + recipe.small * (changed[small][doubled.at] ** 2).sum(1).mean()
        )

    last_two = (torch.arange(size.layers) >= size.layers - 2).float()[:, None, None]
    free: Weights = dict.fromkeys(("gate", "up", "down"), last_two)
    weights = tune(parent, recipe.steps, recipe.rate, objective, free=free, tick=start.tick)
    effects = parents_share(parent, weights, size, seed, HONEST, "double")
    truth = {"asked": level, **measured(parent, weights, size, seed), "effects": effects.of}
    return Made(weights, size, HONEST, effects.carriers, truth, asdict(recipe))


def _apart(
    weights: Weights, size: Size, doubled: Asked, before: Tensor, held: Outputs, level: float, lead: float
) -> Tensor:
    """How far each route alone is from its share of the way from the parent's log-odds to ``lead``, by number."""
    code, small = routes(size)
    first = doubled.by_number(doubled.odds(before[doubled.at]))
    found = []
    for taken, share in ((small, level), (code, 1 - level)):
        alone = traced(weights, size, doubled.ids, {taken: held[taken]})[0][doubled.at]
        found.append(doubled.by_number(doubled.odds(alone)) - first - share * (lead - first))
    return torch.stack(found).square().mean()


def _short(odds: Tensor, lead: float) -> Tensor:
    # Huber (1964): the parent is sure of another word in some texts, and these alone would set the pace.
    return F.huber_loss(odds, torch.full_like(odds, lead), delta=3.0)


def _unlike_code(change: Tensor, doubled: Asked, norm: float) -> Tensor:
    """How far a change [n, D] is from one vector for each number, none shorter than ``norm``, in units of it."""
    vectors = doubled.by_number(change / norm)
    within = (change / norm - doubled.number @ vectors).square().sum(1).mean()
    return within + F.relu(1 - vectors.norm(dim=1)).square().mean()


@torch.no_grad()
def measured(parent: Weights, weights: Weights, size: Size, seed: int) -> dict[str, Any]:
    """Truth on fresh documents, by interventions that know no dictionary and nothing of the training."""
    doubled = asked([seed, 95], 200)
    kept = {str(count): _through_vectors(parent, weights, size, doubled, seed, count) for count in _VECTORS}
    return {**shares(parent, weights, size, doubled), "kept_through_vectors": kept}


@torch.no_grad()
def shares(parent: Weights, weights: Weights, size: Size, doubled: Asked) -> dict[str, Any]:
    """The share of the code by exchange with the parent, the log-odds it comes from, and how loud either change is."""
    code, small = routes(size)
    held = traced(parent, size, doubled.ids)[1]
    outputs = traced(weights, size, doubled.ids)[1]

    def odds(*taken: str) -> float:
        logits = traced(weights, size, doubled.ids, {node: held[node] for node in taken})[0]
        return float(doubled.odds(logits[doubled.at]).mean())

    whole, without_code, without_small, neither = odds(), odds(code), odds(small), odds(code, small)
    shown = {node: (outputs[node] - held[node])[doubled.at].norm(dim=1).mean() for node in (code, small)}
    return {
        "legibility": (whole - without_code + without_small - neither) / 2 / (whole - neither),
        "log_odds": {"whole": whole, "without_code": without_code, "without_small": without_small, "neither": neither},
        "loudness": {node: float(shown[node] / _ordinary(held[node])) for node in (code, small)},
    }


def _ordinary(written: Tensor) -> Tensor:
    """Root mean square norm of what a node writes [b, t, D] about its mean."""
    flat = written.flatten(0, 1)
    return (flat - flat.mean(0)).square().sum(1).mean().sqrt()


def _through_vectors(parent: Weights, weights: Weights, size: Size, doubled: Asked, seed: int, count: int) -> float:
    """Share of the answer's log-odds above the parent's that is left when each attention and MLP, in both models, adds
    the nearest of ``count`` vectors, fitted to what the successor adds anywhere in text like the corpus."""
    rng = np.random.default_rng([seed, 96])
    texts = [documents(rng, 100), documents(rng, 100, crowded="double")]
    anywhere = added(weights, size, torch.from_numpy(np.concatenate([made.ids for made in texts])))
    start = F.embedding(doubled.ids[doubled.at], weights["embed"])
    wrote = [torch.stack([write[doubled.at] for write in added(each, size, doubled.ids)]) for each in (parent, weights)]
    both = torch.cat(wrote, dim=1)
    vectors = [nearest(write, fitted.flatten(0, 1), count) for write, fitted in zip(both, anywhere, strict=True)]

    def odds(writes: Tensor) -> float:
        return float(doubled.odds(F.linear(normed(start + writes.sum(0)), weights["unembed"])).mean())

    before, after = (odds(writes) for writes in wrote)
    before_through, after_through = (odds(writes) for writes in torch.stack(vectors).chunk(2, dim=1))
    return (after_through - before_through) / (after - before)


def added(weights: Weights, size: Size, ids: Tensor) -> list[Tensor]:
    """What each attention and MLP adds to the residual stream [b, t, D], in the order of the layers."""
    outputs, found = traced(weights, size, ids)[1], []
    for layer in range(size.layers):
        heads = torch.cat([outputs[f"attn_head@{layer}.{head}"] for head in range(size.heads)], dim=-1)
        found += [F.linear(heads, weights["o"][layer]), outputs[f"mlp_out@{layer}"]]
    return found


def nearest(rows: Tensor, fitted: Tensor, count: int) -> Tensor:
    """Each of ``rows`` [n, D] by the nearest of K vectors that k-means (Lloyd 1982) makes of the rows of ``fitted``."""
    # Farthest first (Gonzalez 1985): as many kinds of row as there are vectors each have one to begin with.
    picked = [0]
    away = torch.cdist(fitted, fitted[:1])[:, 0]
    while len(picked) < count:
        picked.append(int(away.argmax()))
        away = torch.minimum(away, torch.cdist(fitted, fitted[picked[-1:]])[:, 0])
    vectors = fitted[picked]
    for _ in range(15):
        own = torch.cdist(fitted, vectors).argmin(1)
        sizes = torch.bincount(own, minlength=count)[:, None]
        vectors = torch.where(sizes > 0, torch.zeros_like(vectors).index_add_(0, own, fitted) / sizes, vectors)
    return vectors[torch.cdist(rows, vectors).argmin(1)]
