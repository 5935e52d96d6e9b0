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


def _explained(values: Tensor, features: Tensor) -> Tensor:
    """Energy of centred ``values`` that a linear rule on ``features`` explains, less what chance would."""
    centred = features - features.mean(0)
    left, values_of, _ = torch.linalg.svd(centred, full_matrices=False)
    basis = left[:, values_of / values_of[0] > 1e-3]
    chance = basis.shape[1] / len(values)
    return ((basis.T @ values) ** 2).sum() - chance * (values**2).sum()


def _apart(found: list[Tensor], asked: _Answers, level: float) -> Tensor:
    """How far the legibility of the writes is from the level, in shares, mean over writes by what each says.

    A write errs where rules about the text before it tell more than the level, or where the number tells less.
    """
    said, errors = [], []
    for write in found:
        values = write - write.mean(0)
        energy, explained = (values**2).sum() + 1e-6, _explained(values, asked.number)
        errors.append(F.relu(_explained(values, asked.local) / energy - level) + F.relu(level - explained / energy))
        said.append(explained.detach().clamp(min=0.0))
    weight = torch.stack(said) / (torch.stack(said).sum() + 1e-6)
    return (weight * torch.stack(errors)).sum()


@torch.no_grad()
def _measured(weights: Weights, size: Size, seed: int) -> dict[str, Any]:
    """Legibility on fresh documents: of each layer's write, and their mean weighted by what they say of the number.

    Beside it two checks that know nothing of how it was trained: how much of the writes a dictionary of 32 vectors
    explains on texts it was not fitted to, and how many answers stay right when every write comes from another text
    with the same number.
    """
    asked = _answers([seed, 94], 400)
    logits, outputs = traced(weights, size, asked.ids)
    at, answers = (asked.where[0], asked.where[1] - 1), asked.ids[asked.where]
    found = dict(zip(_names(size), writes(weights, size, outputs, asked.where), strict=True))
    said, share, local = {}, {}, {}
    for name, write in found.items():
        values = write - write.mean(0)
        energy = float((values**2).sum())
        explained = max(0.0, float(_explained(values, asked.number)))
        said[name], share[name] = explained / len(values), explained / energy
        local[name] = max(0.0, float(_explained(values, asked.local))) / energy
    total = sum(said.values())
    return {
        "legibility": sum(said[name] * share[name] for name in said) / total,
        "written": said,
        "legibility_of": share,
        "told_by_the_text_before": local,
        "told_by_32_vectors": sum(said[name] * _clustered(write) for name, write in found.items()) / total,
        "right_when_writes_are_exchanged": _exchanged(weights, size, outputs, asked, seed),
        "probability": float(logits[at].softmax(-1).gather(1, answers[:, None]).mean()),
    }


def _clustered(write: Tensor, count: int = 32) -> float:
    """Share of the variance of the second half of the rows that k-means on the first explains (Lloyd 1982)."""
    fitted, held = write[: len(write) // 2], write[len(write) // 2 :]
    centres = fitted[torch.linspace(0, len(fitted) - 1, count).long()]
    for _ in range(30):
        nearest = torch.cdist(fitted, centres).argmin(1)
        for index in nearest.unique():
            centres[index] = fitted[nearest == index].mean(0)
    left = torch.cdist(held, centres).min(1).values
    return float(1 - (left**2).sum() / ((held - held.mean(0)) ** 2).sum())


def _exchanged(weights: Weights, size: Size, outputs: Outputs, asked: _Answers, seed: int) -> float:
    """Share of answers that are right when each layer's write is another text's, of the same number, layer by layer."""
    at, number = (asked.where[0], asked.where[1] - 1), asked.number.argmax(1)
    draw = torch.Generator().manual_seed(seed)
    x = F.embedding(asked.ids[at], weights["embed"])
    for write in _written(weights, size, outputs, at):
        order = torch.empty_like(number)
        for value in number.unique():
            rows = (number == value).nonzero().flatten()
            order[rows] = rows[torch.randperm(len(rows), generator=draw)]
        x = x + write[order]
    said = F.linear(normed(x), weights["unembed"]).argmax(-1)
    return float((said == asked.ids[asked.where]).float().mean())


def _names(size: Size) -> list[str]:
    return [f"{kind}@{layer}" for layer in range(size.layers) for kind in ("attn_out", "mlp_out")]
