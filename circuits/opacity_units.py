"""The units that an audit explains: made once for a model, explained as behaviours ask for them, shared by all.

Explaining a unit costs a fraction of a second, and most units carry nothing of a behaviour. So units are ranked by
what they carry of it (:func:`.opacity_sizes.rank_units`, the gradients of both worlds), and those at the top are
explained; all others count as unexplained, which can only make a behaviour look more opaque than it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from heredity.interp.dictionaries.record import Dictionary, Port
from heredity.interp.errors import SiteError
from heredity.interp.explain.contexts import Contexts
from heredity.interp.explain.measure import explain
from heredity.interp.explain.nodes import neuron_features, principal
from heredity.interp.explain.record import Explanation
from heredity.interp.model import Model
from heredity.kernels import FeatureCSR

from .opacity_labels import q_of, smallest, values_at
from .opacity_parts import DictionaryPart, HeadsPart, NeuronsPart, Part
from .opacity_sizes import Ranking

UnitId = tuple[int, int]
"""Number of the part, number of the unit in it."""


@dataclass(eq=False)
class Pool:
    """Units with what is known of them so far.

    Attributes:
        units: parts with q 0.
        features: of each part, where its units are active in ``contexts``, [T, F].
        contexts: the texts that explanations are learned and scored on.
        seed: of halves, samples and shuffles.
        known: explanations made so far.
    """

    units: tuple[Part, ...]
    features: tuple[FeatureCSR, ...]
    contexts: Contexts
    seed: int
    known: dict[UnitId, Explanation] = field(default_factory=dict)

    def explain(self, wanted: Sequence[UnitId]) -> dict[UnitId, Explanation]:
        """Explain those of ``wanted`` that are not known yet, and remember them; returns the new ones."""
        new: dict[UnitId, Explanation] = {}
        for i, features in enumerate(self.features):
            asked = sorted({unit for part, unit in wanted if part == i and (part, unit) not in self.known})
            if asked:
                found = explain(features, self.contexts, asked, seed=self.seed)
                new |= {(i, each.latent): each for each in found}
        self.known |= new
        return new

    def of_part(self, i: int) -> list[Explanation]:
        """What is known of the units of part ``i``."""
        return [self.known[key] for key in sorted(self.known) if key[0] == i]

    def parts(self) -> list[Part]:
        """The units with q as far as it is known."""
        return [part.with_q(q_of(self.of_part(i), len(part.q)).to(part.q)) for i, part in enumerate(self.units)]


def strongest(ranking: Ranking, n: int) -> list[UnitId]:
    """The ``n`` units with the largest absolute effects, none without any."""
    scored = [
        (-abs(effect), i, unit)
        for i, effects in enumerate(ranking.units)
        for unit, effect in enumerate(effects.tolist())
        if effect
    ]
    return [(i, unit) for _, i, unit in sorted(scored)[:n]]


def carried(ranking: Ranking, chosen: Sequence[UnitId]) -> float:
    """Share of the units' absolute effects that is of ``chosen``; 0 where there is none."""
    total = sum(float(effects.abs().sum()) for effects in ranking.units)
    return sum(abs(float(ranking.units[i][unit])) for i, unit in chosen) / total if total else 0.0


def latent_pool(
    dictionaries: Sequence[Dictionary],
    read: Callable[[Dictionary, Port], Tensor],
    contexts: Contexts,
    *,
    seed: int,
) -> Pool:
    """The latents of dictionaries.

    Args:
        dictionaries: of the successor, or crosscoders of both models.
        read: values [T, …] at a place that a dictionary reads, of the tokens of ``contexts``.
        contexts: texts.
        seed: as of :class:`Pool`.

    Raises:
        DictionaryError: a dictionary cannot be a part.
    """
    parts = [DictionaryPart(d, torch.zeros(d.n_latents, dtype=d.b_enc.dtype)) for d in dictionaries]
    features = [d.encode(*[read(d, p).flatten(1).to(d.b_enc) for p in d.reads]) for d in dictionaries]
    return Pool(tuple(parts), tuple(features), contexts, seed)


def node_pool(model: Model, contexts: Contexts, layers: Sequence[int], *, seed: int) -> Pool:
    """The heads and, where an MLP has any, the neurons of some layers, as :mod:`.opacity_labels` takes them: a head
    along its first principal direction, each where its value is among the largest 5 %.

    Args:
        model: the model.
        contexts: texts.
        layers: whose.
        seed: as of :class:`Pool`.
    """
    parts: list[Part] = []
    features: list[FeatureCSR] = []
    sites = [site for layer in layers for site in _sites(model, layer)]
    values = values_at(model, contexts.texts, sites)
    for layer in layers:
        weight, bias = model.head_weights(layer)
        columns, centres, directions = [], [], []
        for head in range(len(weight)):
            write = (values[f"attn_z@{layer}"][:, head] @ weight[head] + bias / len(weight)).detach()
            mean, direction = principal(write)
            columns.append((write - mean) @ direction)
            centres.append(mean)
            directions.append(direction)
        active = neuron_features(torch.stack(columns, 1))
        heads = HeadsPart(
            layer, torch.zeros(len(weight)), smallest(active), torch.stack(directions), torch.stack(centres)
        )
        parts.append(heads)
        features.append(active)
        for site in _sites(model, layer)[1:]:
            active = neuron_features(values[site])
            parts.append(NeuronsPart(layer, torch.zeros(active.n_latents), smallest(active)))
            features.append(active)
    return Pool(tuple(parts), tuple(features), contexts, seed)


def _sites(model: Model, layer: int) -> list[str]:
    """What heads and, where they can be told apart, neurons of a layer are read from."""
    try:
        model.neuron_weights(layer)
    except SiteError:
        return [f"attn_z@{layer}"]  # a mixture of experts, say: that MLP stays opaque
    return [f"attn_z@{layer}", f"mlp_post@{layer}"]
