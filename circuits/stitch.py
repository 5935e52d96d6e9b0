"""Inheritance between models whose parts do not correspond: what of a node's write the other model's stream foretells.

No value of another architecture can be put in node by node. But on the same tokens its stream can be asked: an affine
map (ridge, in float64), fitted on ordinary text, predicts what each head and MLP writes from the other model's stream
at several depths together. In the contexts of a behaviour that prediction stands in for the node
(:mod:`.inheritance`): what the other model knows anywhere, in linear form, is inherited; what it never computes is not.
Two things differ from models of one architecture. A node that only passes on news has news in its value, and counts as
new. And what fails to be linear counts as new too, so the same measurement is made where nothing is new: ``ordinary``
is the share of the nodes' effect on the model's own predictions, in ordinary text, that the prediction keeps. Stitching
is of Lenc & Vedaldi 2015 and Bansal et al. 2106.07682, here from a whole stream to single nodes.

N tokens of ordinary text, F features (widths of the sites read).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from heredity.interp.model import Model

from .attribution import Prompts
from .components import Node, run_donor
from .inheritance import Bench, Emergence, summarise
from .writes import ENTRY

SITES = 8
"""Depths of the stream that are read, beside its beginning."""
PENALTIES = (1.0, 10.0, 100.0, 1000.0)
"""Tried on a fifth of the text, for features of unit variance."""


@dataclass(frozen=True)
class Stitch:
    """What nodes of one model write, foretold from another's stream.

    Attributes:
        sites: of the other model, whose values on a token are the features [F].
        centre, scale: of the features.
        weights: per node, [F, d_model].
        means: of the nodes' writes, [d_model].
        penalty: the ridge penalty chosen.
        r2: share of the writes' variance, all nodes together, that is foretold on text used for nothing else.
        r2_of: the same of every node; NaN for one that always writes the same.
    """

    sites: tuple[str, ...]
    centre: Tensor
    scale: Tensor
    weights: dict[Node, Tensor]
    means: dict[Node, Tensor]
    penalty: float
    r2: float
    r2_of: dict[Node, float]

    def features(self, other: Model, tokens: Tensor) -> Tensor:
        """Standardised features [batch, pos, F]."""
        return (_stream(other, tokens, self.sites).double() - self.centre) / self.scale


def fit(model: Model, other: Model, texts: Sequence[tuple[Tensor, Tensor]], nodes: Sequence[Node]) -> Stitch:
    """Fit on ``texts`` = (tokens, mask) [batch, pos], by :func:`ridge`.

    Args:
        model: whose ``nodes`` (heads and MLPs) are foretold.
        other: whose stream is read, on the same tokens.
        texts: ordinary text.
        nodes: of ``model``.

    Raises:
        ValueError: fewer than 50 tokens.
    """
    sites = _sites(other)
    read, written = [], []
    for tokens, mask in texts:
        donor = run_donor(model, tokens)
        read.append(_stream(other, tokens, sites)[mask].double())
        written.append(torch.stack([donor.write(node)[mask] for node in nodes], 1).double())
    x, y = torch.cat(read), torch.cat(written)
    found = ridge(x, y.flatten(1))
    shape = y.shape[1:]
    missed, whole = (part.reshape(shape).sum(1) for part in (found.missed, found.whole))
    weights, means = found.weights.reshape(-1, *shape), found.means.reshape(shape)
    return Stitch(
        sites,
        found.centre,
        found.scale,
        {node: weights[:, i] for i, node in enumerate(nodes)},
        {node: means[i] for i, node in enumerate(nodes)},
        found.penalty,
        float(1 - missed.sum() / whole.sum()),
        {node: float(1 - missed[i] / whole[i]) for i, node in enumerate(nodes)},
    )


@dataclass(frozen=True)
class Ridge:
    """An affine map from x [N, F] to y [N, D], and how it does on text used for nothing else.

    Attributes:
        centre, scale: of x [F].
        weights: for standardised x, [F, D].
        means: of y [D].
        penalty: the one chosen.
        missed, whole: squared error and squared deviation from the mean, of each column of y [D].
    """

    centre: Tensor
    scale: Tensor
    weights: Tensor
    means: Tensor
    penalty: float
    missed: Tensor
    whole: Tensor


def ridge(x: Tensor, y: Tensor) -> Ridge:
    """Three fifths of the rows to fit, one to choose the penalty, one to report on; the map is then of the first four.

    Raises:
        ValueError: fewer than 50 rows.
    """
    if len(x) < 50:
        raise ValueError(f"a stitch needs at least 50 tokens of text, not {len(x)}")
    # Neighbours within a text are alike, so the parts are stretches of text, not single tokens.
    first, second = int(0.6 * len(x)), int(0.8 * len(x))
    centre, scale = x[:second].mean(0), x[:second].std(0).clamp_min(1e-6)
    means = y[:second].mean(0)
    x, y = (x - centre) / scale, y - means
    gram, product = x[:first].T @ x[:first], x[:first].T @ y[:first]
    tried = {}
    for penalty in PENALTIES:
        weights = solved(gram, product, penalty)
        tried[penalty] = float((x[first:second] @ weights - y[first:second]).square().sum())
    best = min(tried, key=lambda penalty: tried[penalty])
    gram += x[first:second].T @ x[first:second]
    weights = solved(gram, product + x[first:second].T @ y[first:second], best)
    missed = (y[second:] - x[second:] @ weights).square().sum(0)
    return Ridge(centre, scale, weights, means, best, missed, y[second:].square().sum(0))


def solved(gram: Tensor, product: Tensor, penalty: float) -> Tensor:
    """argmin over W of ‖x·W − y‖² + penalty·‖W‖², [F, d], given xᵀx and xᵀy."""
    return torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype), product)


def emergence_across(model: Model, other: Model, prompts: Prompts, stitch: Stitch, seed: int) -> Emergence:
    """:func:`.inheritance.emergence` with what ``stitch`` foretells from ``other``'s stream standing in.

    Args:
        model, other: of any architectures that read text as the same tokens.
        prompts: ``says_successor`` is what ``model`` says.
        stitch: of :func:`fit`; its nodes are measured.
        seed: of the bootstrap.
    """
    nodes = list(stitch.weights)
    own = run_donor(model, prompts.tokens)
    features = stitch.features(other, prompts.tokens)
    effects, carried = Bench(model, other, prompts).effects(
        nodes,
        lambda node: (own.write(node) - stitch.means[node]).to(own.write(node).dtype),
        lambda node: (features @ stitch.weights[node]).to(own.write(node).dtype),
    )
    return summarise(nodes, effects, carried, seed)


def ordinary(model: Model, texts: Sequence[tuple[Tensor, Tensor]], seed: int) -> Prompts:
    """One position of every text at random: there ``model`` says its first choice, and not its second."""
    rng = np.random.default_rng(seed)
    width = max(tokens.shape[1] for tokens, _ in texts)
    tokens = torch.cat([torch.nn.functional.pad(tokens, (0, width - tokens.shape[1])) for tokens, _ in texts])
    lengths = torch.cat([mask.sum(1) for _, mask in texts])
    last = torch.tensor([int(rng.integers(n // 2, n)) for n in lengths.tolist()])
    with torch.inference_mode():
        best = model.logits(tokens)[torch.arange(len(last)), last].topk(2).indices
    return Prompts(tokens, last, best[:, 0], best[:, 1])


def _sites(model: Model) -> tuple[str, ...]:
    layers = np.unique(np.linspace(0, model.shape.n_layers - 1, min(SITES, model.shape.n_layers)).round().astype(int))
    return (ENTRY, *(f"resid_post@{layer}" for layer in layers.tolist()))


def _stream(model: Model, tokens: Tensor, sites: Sequence[str]) -> Tensor:
    with torch.inference_mode():
        seen = model.capture(tokens, sites)
    return torch.cat([seen[site] for site in sites], -1)
