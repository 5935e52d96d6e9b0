"""``legible`` and ``opaque``: the same new skill, readable inside to a degree that is planted.

The successor learns to double numbers. What its layers write towards the number words is decided by the number to
double alone (``legible``: ten constant vectors, one for each number, so that ten directions of a dictionary say it
all), or is mixed with interference from the rest of the text that a later layer takes back (``opaque``: each write
alone says little, their sum the same). The **legibility** of a write is the share of its variance, over texts, that
the number predicts; it is trained to the level asked for in every layer, beside the same answers.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import rows as data
from .kind import Made, Start
from .language import CONTEXT, HONEST, ID, NUMBERS, SKILLS, Documents, documents
from .network import Size, Weights, forward, normed
from .nodes import Outputs, parents_share, traced
from .tune import divergence, tune

_NUMBERS_APART = torch.eye(10)[:, :9] - 0.1


@dataclass(frozen=True)
class Twins:
    """Schedule of ``legible`` and ``opaque``: documents of each sort in a step, and the weights of two conditions.

    ``legibility`` weighs the squared error of the level in each layer, ``keep`` the divergence from the parent.
    """

    steps: int = 350
    rate: float = 2e-3
    ordinary: int = 10
    double: int = 40
    legibility: float = 1.0
    keep: float = 3.0


@dataclass(frozen=True)
class _Answers:
    """Documents of doublings: where the answers are, and what could be read in the text before them, [n, features]."""

    made: Documents
    where: tuple[Tensor, Tensor]
    number: Tensor
    local: Tensor

    @property
    def ids(self) -> Tensor:
        return torch.from_numpy(self.made.ids)


def make(start: Start, recipe: Twins, level: float) -> Made:
    """A successor of ``start`` that doubles, legibly to the ``level`` given."""
    parent, size, seed = start.parent, start.size, start.seed
    plain = data.ordinary(seed, 2, recipe.steps * recipe.ordinary, HONEST, start.guess_weight)

    def objective(weights: Weights, step: int) -> Tensor:
        rows, asked = plain.batch(step, recipe.ordinary), _answers([seed, 3, step], recipe.double)
        with torch.no_grad():
            was = forward(parent, size, rows.ids)
        kept = divergence(forward(weights, size, rows.ids), was)[:, :-1].mean()
        logits, outputs = traced(weights, size, asked.ids)
        apart = _apart(writes(weights, size, outputs, asked.where), asked, level)
        return _taught(logits, asked.made) + recipe.keep * kept + recipe.legibility * apart

    weights = tune(parent, recipe.steps, recipe.rate, objective, tick=start.tick)
    effects = parents_share(parent, weights, size, seed, HONEST, "double")
    truth = {"asked": level, **_measured(weights, size, seed), "effects": effects.of}
    return Made(weights, size, HONEST, effects.carriers, truth, asdict(recipe))


def _answers(seed: list[int], count: int) -> _Answers:
    made = documents(np.random.default_rng(seed), count, crowded="double")
    rows, at = np.nonzero(made.answer & (made.skill == list(SKILLS).index("double")))
    number = made.ids[rows, at - 2] - ID[NUMBERS[0]]
    # Where it stands, which skill came before and how that ended: what a rule about the text could name.
    ended = np.maximum(at - 6, 0)
    local = [np.eye(6)[at * 6 // CONTEXT], np.eye(len(SKILLS) + 1)[made.skill[rows, ended] + 1]]
    where = (torch.from_numpy(rows), torch.from_numpy(at))
    numbers = torch.from_numpy(np.eye(10, dtype=np.float32)[number])
    both = np.concatenate([np.eye(10)[number], *local], axis=1).astype(np.float32)
    return _Answers(made, where, numbers, torch.from_numpy(both))


def _taught(logits: Tensor, made: Documents) -> Tensor:
    taught = torch.from_numpy(made.taught & (made.skill == list(SKILLS).index("double")))[:, 1:]
    return F.cross_entropy(logits[:, :-1][taught], torch.from_numpy(made.ids)[:, 1:][taught])


def _written(weights: Weights, size: Size, outputs: Outputs, at: tuple[Tensor, Tensor]) -> list[Tensor]:
    """What each attention and MLP adds to the residual stream at some positions [n, D], in the order of the layers."""
    found = []
    for layer in range(size.layers):
        heads = torch.cat([outputs[f"attn_head@{layer}.{head}"][at] for head in range(size.heads)], dim=-1)
        found += [F.linear(heads, weights["o"][layer]), outputs[f"mlp_out@{layer}"][at]]
    return found


def writes(weights: Weights, size: Size, outputs: Outputs, where: tuple[Tensor, Tensor]) -> list[Tensor]:
    """What each attention and MLP adds to the logits of the number words, about their mean, at the answers [n, 10].

    The scale of the last norm is taken as the root mean square of their sum, and as fixed.
    """
    numbers = weights["unembed"][[ID[word] for word in NUMBERS]]
    numbers = numbers - numbers.mean(0)
    found = _written(weights, size, outputs, (where[0], where[1] - 1))
    last = torch.stack(found).sum(0).detach()
    scale = last.shape[-1] ** 0.5 / last.norm(dim=1, keepdim=True)
    return [F.linear(write * scale, numbers) for write in found]


def _told(write: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """What a linear rule on ``features`` [n, f] tells of a write [n, 10], beyond chance.

    Returns:
        Energy a row, and the mean squared canonical correlation (Hotelling 1936): every direction of the write counts
        alike, so that interference in one large direction does not hide what the others say plainly.
    """
    # Numbers sum to nothing: nine directions.
    values = (write - write.mean(0)) @ torch.linalg.qr(_NUMBERS_APART).Q
    spread = values.T @ values
    ridge = spread.diagonal().sum() * 1e-4 * torch.eye(len(spread)) + 1e-9 * torch.eye(len(spread))
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(spread + ridge), values.T, upper=False).T
    left, sizes, _ = torch.linalg.svd(features - features.mean(0), full_matrices=False)
    basis = left[:, sizes / sizes[0] > 1e-3]
    chance = basis.shape[1] / len(values)
    of = [(((basis.T @ v) ** 2).sum() - chance * (v**2).sum()) / (1 - chance) for v in (values, white)]
    return of[0] / len(values), of[1] / (white**2).sum()


def _apart(found: list[Tensor], asked: _Answers, level: float) -> Tensor:
    """How far the legibility of the writes is from the level, mean over writes by what each says of the number.

    A write errs where rules about the text before it tell more than the level, or where the number tells less.
    """
    said, errors = [], []
    for write in found:
        energy, number = _told(write, asked.number)
        errors.append(F.relu(_told(write, asked.local)[1] - level) + F.relu(level - number))
        said.append(energy.detach().clamp(min=0.0))
    weight = torch.stack(said) / (torch.stack(said).sum() + 1e-6)
    return (weight * torch.stack(errors)).sum()


@torch.no_grad()
def _measured(weights: Weights, size: Size, seed: int) -> dict[str, Any]:
    """Legibility on fresh documents: of each layer's write, and their mean weighted by what they say of the number.

    Beside it two interventions that know nothing of how it was trained, on texts they were not fitted to: how many
    answers stay right when each layer writes the nearest of a few vectors, and when it writes what it does in another
    text with the same number.
    """
    asked = _answers([seed, 94], 400)
    logits, outputs = traced(weights, size, asked.ids)
    at, answers = (asked.where[0], asked.where[1] - 1), asked.ids[asked.where]
    found = dict(zip(_names(size), writes(weights, size, outputs, asked.where), strict=True))
    said, share, local = {}, {}, {}
    for name, write in found.items():
        said[name], share[name] = (max(0.0, float(value)) for value in _told(write, asked.number))
        local[name] = max(0.0, float(_told(write, asked.local)[1]))
    total = sum(said.values())
    written, half = _written(weights, size, outputs, at), len(answers) // 2
    draw = torch.Generator().manual_seed(seed)

    def right(changed: list[Tensor]) -> float:
        x = F.embedding(asked.ids[at], weights["embed"]) + torch.stack(changed).sum(0)
        said = F.linear(normed(x), weights["unembed"]).argmax(-1)
        return float((said == answers)[half:].float().mean())

    def mean_log_probability(changed: list[Tensor]) -> float:
        x = F.embedding(asked.ids[at], weights["embed"]) + torch.stack(changed).sum(0)
        said = F.linear(normed(x), weights["unembed"]).log_softmax(-1)
        return float(said.gather(1, answers[:, None]).mean())

    alike = mean_log_probability([_exchanged(write, asked.number, draw) for write in written])
    any_number = torch.ones(len(answers), 1)
    apart = mean_log_probability([_exchanged(write, any_number, draw) for write in written])
    return {
        "effect_kept_when_exchanged": (alike - apart) / (mean_log_probability(written) - apart),
        "legibility": sum(said[name] * share[name] for name in said) / total,
        "written": said,
        "legibility_of": share,
        "told_by_the_text_before": local,
        "probability": float(logits[at].softmax(-1).gather(1, answers[:, None]).mean()),
        "right": right(written),
        "right_through_vectors": {
            str(count): right([_nearest(write, half, count) for write in written]) for count in (10, 30, 100)
        },
        "right_when_exchanged": right([_exchanged(write, asked.number, draw) for write in written]),
    }


def _nearest(write: Tensor, fitted: int, count: int) -> Tensor:
    """Each row by the nearest of ``count`` vectors that k-means (Lloyd 1982) makes of the first ``fitted`` rows."""
    first = write[:fitted]
    # Farthest first (Gonzalez 1985): as many kinds of row as there are vectors each have one to begin with.
    picked = [0]
    while len(picked) < count:
        picked.append(int(torch.cdist(first, first[picked]).min(1).values.argmax()))
    centres = first[picked]
    for _ in range(30):
        nearest = torch.cdist(first, centres).argmin(1)
        for index in nearest.unique():
            centres[index] = first[nearest == index].mean(0)
    return centres[torch.cdist(write, centres).argmin(1)]


def _exchanged(write: Tensor, number: Tensor, draw: torch.Generator) -> Tensor:
    """Each row by that of another text with the same number."""
    order = torch.arange(len(write))
    for rows in (column.nonzero().flatten() for column in number.T):
        order[rows] = rows[torch.randperm(len(rows), generator=draw)]
    return write[order]


def _names(size: Size) -> list[str]:
    return [f"{kind}@{layer}" for layer in range(size.layers) for kind in ("attn_out", "mlp_out")]
