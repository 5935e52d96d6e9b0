"""The trained arrays as a dictionary that acts on activations as the models produce them."""

from collections.abc import Mapping
from typing import Any

import torch

from heredity.kernels import Activation, BatchTopK, JumpReLU, TopK

from ..record import Dictionary, Port
from .recipe import Recipe
from .step import BANDWIDTH
from .streams import Units, spread
from .weights import Layout, Weights


@torch.no_grad()
def fold(
    recipe: Recipe,
    layout: Layout,
    weights: Weights,
    units: Units,
    threshold: float,
    ports: tuple[Port, ...],
    provenance: Mapping[str, Any],
) -> Dictionary:
    """The dictionary, with training's units folded in; scores and thresholds stay what they were.

    Args:
        recipe, layout, weights, units: of the training.
        threshold: BatchTopK's at inference, a score in training's units.
        ports: the source's.
        provenance: to note in the dictionary, besides the units.
    """
    x_scale, y_scale = spread(units.x_rms, units.reads), spread(units.y_rms, units.writes)
    read = weights.W_enc / x_scale
    written = weights.W_dec * y_scale
    bias = weights.b_dec * y_scale + units.y_mean
    skip = None
    if weights.W_skip is not None:
        skip = weights.W_skip * y_scale / x_scale[:, None]
        bias = bias - units.x_mean @ skip
    reads, writes = _ports(recipe, ports)
    activation, norm = _rule(recipe, weights, threshold), None
    if recipe.activation != "jumprelu":
        norm = layout.score_per_activation(weights.W_dec)
    return Dictionary(
        kind="sae" if recipe.kind == "difference" else recipe.kind,
        reads=reads,
        writes=writes,
        W_enc=tuple(part.T.contiguous() for part in read.split(list(units.reads), 1)),
        b_enc=weights.b_enc.detach() - read @ units.x_mean,
        W_dec=tuple(part.contiguous() for part in written.split(list(units.writes), 1)),
        b_dec=tuple(part.clone() for part in bias.split(list(units.writes))),
        activation=activation,
        norm=norm,
        W_skip=skip,
        provenance={**provenance, "rms": [float(each) for each in units.y_rms]},
    )


def _ports(recipe: Recipe, ports: tuple[Port, ...]) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    if recipe.kind == "transcoder":
        return ports[:1], ports[1:]
    # What a difference's dictionary reads is no place of one model; by its site it can be told what it belongs to.
    chosen = ports[:1] if recipe.kind == "difference" else ports
    return chosen, chosen


def _rule(recipe: Recipe, weights: Weights, threshold: float) -> Activation:
    if weights.log_threshold is not None:
        return JumpReLU(weights.log_threshold.detach().exp(), BANDWIDTH)
    return TopK(recipe.k) if recipe.activation == "topk" else BatchTopK(threshold=threshold)
