"""How well units are explained, in the form that a split needs, and the units of models without a dictionary."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from heredity.interp.dictionaries.recovered import grouped
from heredity.interp.explain.contexts import Contexts
from heredity.interp.explain.measure import explain
from heredity.interp.explain.nodes import SHARE, neuron_features, principal
from heredity.interp.explain.record import Explanation
from heredity.interp.model import Encoded, Model
from heredity.kernels import FeatureCSR

from .opacity_parts import HeadsPart, NeuronsPart, Part

ONE_SIDED_95 = 1.6449
BATCH_TOKENS = 1024
"""Padded tokens in a forward."""


def q_of(explanations: Sequence[Explanation], n_units: int) -> Tensor:
    """q of each unit, float32 [F]; 0 where none was measured, since what nobody could label is not explained.

    Raises:
        ValueError: an explanation is of no such unit.
    """
    return _placed(explanations, [e.q or 0.0 for e in explanations], n_units)


def redrawn_q(explanations: Sequence[Explanation], n_units: int, seed: int) -> Tensor:
    """As :func:`q_of`, with each lower bound drawn from its sampling distribution: normal, with the standard error that
    lies between an explanation's balanced accuracy and its bound.

    Raises:
        ValueError: as :func:`q_of`.
    """
    noise, q = np.random.default_rng(seed).standard_normal(len(explanations)), []
    for e, z in zip(explanations, noise, strict=True):
        if e.q is None or e.low is None or e.balanced_accuracy is None:
            q.append(0.0)
        else:
            low = e.low + z * (e.balanced_accuracy - e.low) / ONE_SIDED_95
            q.append(float(np.clip(2 * low - 1 - (e.null or 0.0), 0, 1)))
    return _placed(explanations, q, n_units)


def redrawn(
    parts: Sequence[Part], explanations: Sequence[Sequence[Explanation]], draws: int, seed: int
) -> list[list[Part]]:
    """``parts`` with q drawn ``draws`` times from its uncertainty.

    Args:
        parts: units.
        explanations: of each part's units.
        draws, seed: how many, and from what.
    """
    out = []
    for draw in range(draws):
        seeds = np.random.SeedSequence([seed, draw]).generate_state(len(parts))
        pairs = zip(parts, explanations, seeds, strict=True)
        out.append([part.with_q(redrawn_q(each, len(part.q), int(s)).to(part.q)) for part, each, s in pairs])
    return out


def explained_neurons(
    model: Model, texts: Sequence[Encoded], layer: int, neurons: Sequence[int], *, seed: int, share: float = SHARE
) -> tuple[NeuronsPart, list[Explanation]]:
    """Some neurons of a layer's MLP with explanations learned and scored on ``texts``; the others count as unexplained.

    Args:
        model: the model.
        texts: ordinary text, none of it among the prompts of a behaviour.
        layer: which.
        neurons: which; explaining one takes a fraction of a second.
        seed: of halves, samples and shuffles.
        share: of the tokens, at which a neuron counts as active.

    Raises:
        SiteError: the MLP has no neurons of its own.
        ValueError: no such neuron.
    """
    n, chosen = len(model.neuron_weights(layer)[0]), list(neurons)
    if any(not 0 <= neuron < n for neuron in chosen):
        raise ValueError(f"the MLP of layer {layer} has neurons 0 to {n - 1}, not {chosen}")
    site = f"mlp_post@{layer}"
    values = values_at(model, texts, [site], chosen)[site]
    features = neuron_features(values, share=share)
    found = explain(features, Contexts(tuple(texts)), range(len(chosen)), seed=seed)
    found = [e.model_copy(update={"latent": chosen[e.latent]}) for e in found]
    thresholds = torch.full((n,), torch.inf)
    thresholds[chosen] = smallest(features)
    return NeuronsPart(layer, q_of(found, n), thresholds), found


def explained_heads(
    model: Model,
    texts: Sequence[Encoded],
    layer: int,
    *,
    seed: int,
    along: Literal["norm", "direction"] = "direction",
    share: float = SHARE,
) -> tuple[HeadsPart, list[Explanation]]:
    """The heads of a layer with explanations learned and scored on ``texts``.

    Args:
        model, texts, layer, seed, share: as of :func:`explained_neurons`.
        along: what of a head is measured (:func:`heredity.interp.explain.nodes.head_features`). Along one direction,
            what the head writes elsewhere stays unexplained; by norm, an explanation of *when* it writes much is taken
            for one of all it writes then.

    Raises:
        ValueError: ``along`` is neither.
    """
    if along not in ("norm", "direction"):
        raise ValueError(f"along must be 'norm' or 'direction', not {along!r}")
    weight, bias = model.head_weights(layer)
    site = f"attn_z@{layer}"
    z = values_at(model, texts, [site])[site]
    columns, centres, directions = [], [], []
    for head in range(len(weight)):
        write = (z[:, head] @ weight[head] + bias / len(weight)).detach()
        mean, direction = principal(write)
        columns.append(write.norm(dim=-1) if along == "norm" else (write - mean) @ direction)
        centres.append(mean)
        directions.append(direction)
    features = neuron_features(torch.stack(columns, 1), share=share)
    found = explain(features, Contexts(tuple(texts)), range(len(weight)), seed=seed)
    q, thresholds = q_of(found, len(weight)), smallest(features)
    if along == "norm":
        return HeadsPart(layer, q, thresholds), found
    return HeadsPart(layer, q, thresholds, torch.stack(directions), torch.stack(centres)), found


def _placed(explanations: Sequence[Explanation], q: Sequence[float], n_units: int) -> Tensor:
    absent = [e.latent for e in explanations if not 0 <= e.latent < n_units]
    if absent:
        raise ValueError(f"an explanation is of unit {absent[0]}, of {n_units}")
    out = torch.zeros(n_units)
    out[[e.latent for e in explanations]] = torch.tensor(list(q), dtype=torch.float32)
    return out


@torch.no_grad()
def values_at(
    model: Model, texts: Sequence[Encoded], sites: Sequence[str], columns: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Values at ``sites`` of all tokens in the order of the texts, [T, …] each; of some columns only.

    Raises:
        SiteError: the model lacks a site.
    """
    rows: dict[str, list[Tensor]] = {site: [torch.empty(0)] * len(texts) for site in sites}
    for members, tokens, mask in grouped(texts, BATCH_TOKENS):
        for site, value in model.capture(tokens, list(sites)).items():
            kept = value if columns is None else value[..., list(columns)]
            for i, each, real in zip(members, kept, mask, strict=True):
                rows[site][i] = each[real].clone()
    return {site: torch.cat([row for row in found if len(row)]) for site, found in rows.items()}


def smallest(features: FeatureCSR) -> Tensor:
    """Smallest absolute value stored for each latent, infinity where there is none: [F]."""
    found = torch.full((features.n_latents,), torch.inf, dtype=features.dtype)
    return found.scatter_reduce(0, features.indices.long(), features.values.abs(), "amin")
