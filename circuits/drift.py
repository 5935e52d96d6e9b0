"""How the activations moved as a whole: linear CKA by layer and mean difference through the logit lens.

Sources: linear CKA, Kornblith et al. 2019 (a thermometer of drift, never an alarm: it moves under translations
without functional change, arXiv 2210.16156); activation difference lens, arXiv 2510.13900.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from heredity.interp.align import align
from heredity.interp.model import Encoded, Model, pad
from heredity.interp.readout import nearest_tokens, unembedding

FIRST = 5
"""Positions at the start of a text whose mean difference is kept apart."""


@dataclass(frozen=True)
class LensReading:
    """The mean difference at one site and position, as the tokens it raises."""

    site: str
    position: str
    relative_norm: float
    tokens: tuple[str, ...]


@dataclass
class _Moments:
    """Sums over tokens, enough for centred cross-products: x from the parent, y from the successor."""

    n: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value


def sites_of(parent: Model, successor: Model, most: int = 8) -> list[tuple[str, str]]:
    """(parent site, successor site) at up to ``most`` equal relative depths, the last layer included."""
    count = min(most, parent.shape.n_layers, successor.shape.n_layers)
    out = []
    for k in range(1, count + 1):
        layers = [max(0, round(k / count * m.shape.n_layers) - 1) for m in (parent, successor)]
        out.append((f"resid_post@{layers[0]}", f"resid_post@{layers[1]}"))
    return out


def drift(
    parent: Model, successor: Model, batches: Sequence[Sequence[tuple[Encoded, Encoded]]]
) -> tuple[list[tuple[str, float]], list[LensReading]]:
    """(site, linear CKA) by depth, and the lens readings at the middle of the model (empty for unequal widths).

    ``batches`` hold texts as each model reads them; memory does not grow with their number.
    """
    pairs = sites_of(parent, successor)
    moments = {pair: _Moments() for pair in pairs}
    middle = pairs[len(pairs) // 2 - 1] if len(pairs) > 1 else pairs[0]
    same_width = parent.shape.d_model == successor.shape.d_model
    differences: dict[str, tuple[Tensor, float, int]] = {}
    for batch in batches:
        with torch.inference_mode():
            values_p = parent.capture(pad([p.ids for p, _ in batch])[0], list({a for a, _ in pairs}))
            values_s = successor.capture(pad([s.ids for _, s in batch])[0], list({b for _, b in pairs}))
        for pair in pairs:
            for i, (enc_p, enc_s) in enumerate(batch):
                at_p, at_s = align(enc_p, enc_s)
                x, y = values_p[pair[0]][i, at_p].double(), values_s[pair[1]][i, at_s].double()
                moment = moments[pair]
                moment.n += len(x)
                moment.add(x=x.sum(0), y=y.sum(0), xx=x.T @ x, yy=y.T @ y, xy=x.T @ y)
                if pair == middle and same_width:
                    _accumulate(differences, x, y)
    similarity = [(pair[1], _cka(moments[pair])) for pair in pairs]
    return similarity, _read(parent, middle[1], differences)


def _cka(moment: _Moments) -> float:
    """‖YᵀX‖_F² / (‖XᵀX‖_F ‖YᵀY‖_F) of the centred activations."""
    n, s = moment.n, moment.sums
    xx = s["xx"] - torch.outer(s["x"], s["x"]) / n
    yy = s["yy"] - torch.outer(s["y"], s["y"]) / n
    xy = s["xy"] - torch.outer(s["x"], s["y"]) / n
    return float(xy.square().sum() / (xx.norm() * yy.norm()))


def _accumulate(store: dict[str, tuple[Tensor, float, int]], x: Tensor, y: Tensor) -> None:
    difference, size = y - x, x.norm(dim=-1)
    entries = [(str(k), difference[k], float(size[k]), 1) for k in range(min(FIRST, len(x)))]
    entries.append(("all", difference.sum(0), float(size.sum()), len(x)))
    for name, vector, norm, count in entries:
        old = store.get(name, (torch.zeros_like(vector), 0.0, 0))
        store[name] = (old[0] + vector, old[1] + norm, old[2] + count)


def _read(model: Model, site: str, differences: dict[str, tuple[Tensor, float, int]]) -> list[LensReading]:
    lens = unembedding(model)
    out = []
    for name, (vector, norm, count) in differences.items():
        mean = vector / count
        tokens = nearest_tokens(model, lens @ mean.to(lens.dtype), 8) if mean.any() else ()
        out.append(LensReading(site, name, float(mean.norm()) / (norm / count), tokens))
    return out
