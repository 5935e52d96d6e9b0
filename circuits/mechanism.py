"""What carries one behaviour in one model: the fewest heads and MLPs found without which it goes.

Nodes are ranked by attribution patching with the gradients at both ends (Syed et al. 2310.10348), the top of the
ranking is measured by exchanging each node's write for that on the counterfactual prompt, and the carriers are the
smallest set found whose joint exchange takes :data:`TARGET` of what all nodes take that take something alone. Nodes are
ranked and carriers chosen on one half of the prompts; every number that is reported comes from the other. The embedding
is no candidate: exchanging it exchanges the prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from heredity.interp.model import Model

from .atp import attribute_nodes
from .layout import layout_of
from .node_patching import patch_nodes, patch_sets
from .pairs import Pairs
from .tasks.prepare import Half, half_of, prepare
from .tasks.screen import values
from .tasks.task import Task, Template

TARGET = 0.85
"""Share of what exchanging all supporting nodes takes that exchanging the carriers has to take."""
PRUNED = 24
"""Carriers up to which each is tried without."""


@dataclass(frozen=True)
class Readings:
    """What a model does on N pairs, and what its nodes carry of that.

    Attributes:
        clean, corrupt: the metric on both prompts of each pair, float64 [N].
        effects: per node the metric's fall when the node alone is exchanged, float64 [M], on the first M of the pairs.
        carried: its fall when all carriers are exchanged, float64 [N].
    """

    clean: np.ndarray
    corrupt: np.ndarray
    effects: Mapping[str, np.ndarray]
    carried: np.ndarray

    @property
    def effect(self) -> np.ndarray:
        """m(x) − m(x′), float64 [N]."""
        return self.clean - self.corrupt

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "clean": self.clean.tolist(),
            "corrupt": self.corrupt.tolist(),
            "effects": {name: value.tolist() for name, value in self.effects.items()},
            "carried": self.carried.tolist(),
        }


def readings(plain: Mapping[str, Any]) -> Readings:
    """What :meth:`Readings.plain` made."""
    effects = {name: np.array(value) for name, value in plain["effects"].items()}
    return Readings(np.array(plain["clean"]), np.array(plain["corrupt"]), effects, np.array(plain["carried"]))


def locate(
    model: Model, task: Task, *, pairs: int, measured: int, searched: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """The mechanism of ``task`` in ``model``, as JSON can hold it: a function of its arguments alone.

    Args:
        model: the model.
        task: what it does.
        pairs: pairs in each half.
        measured: nodes measured one by one.
        searched: pairs of the first half that are used, and of the other that single nodes are measured on, if not all.
        seed: of the draw of prompts.

    Returns:
        ``discovery`` and ``testing`` (the prompts of each half), ``carriers`` (nodes), and ``readings`` on the latter.

    Raises:
        TaskError: the prompts do not fit the model.
        ModelError: the architecture's parts cannot be exchanged one by one.
    """
    prepared = prepare(model, task, pairs, seed=seed)
    discovery = half_of(model, task, prepared.discovery.examples[:searched])
    candidates = ranked(model, discovery, measured)
    carriers = _fewest(model, discovery, candidates)
    return {
        "discovery": [example.model_dump(mode="json") for example in discovery.examples],
        "testing": [example.model_dump(mode="json") for example in prepared.testing.examples],
        "carriers": carriers,
        "readings": measure(model, prepared.testing, candidates, carriers, searched).plain(),
    }


def same_prompts(model: Model, task: Task, examples: Sequence[Mapping[str, Any]]) -> Half:
    """The prompts that a parent was measured on, for its successor.

    Raises:
        TaskError: they do not fit the successor's tokenizer.
    """
    return half_of(model, task, [Template.model_validate(example) for example in examples])


def ranked(model: Model, half: Half, count: int) -> list[str]:
    """Names of the ``count`` heads and MLPs that support the behaviour most by attribution, in the order of the
    computation (or all)."""
    layout = layout_of(model)
    inner = layout.sources[1:]
    if len(inner) <= count:
        return list(inner)
    pairs = half.pairs
    swapped = Pairs(pairs.corrupt, pairs.clean, pairs.last)
    ends = [
        attribute_nodes(model, each, half.metric, fix_attention=False, drop=False).scores[1 : len(layout.sources)]
        for each in (pairs, swapped)
    ]
    best = (ends[0] - ends[1]).topk(count).indices
    return [inner[i] for i in best.sort().values.tolist()]


def measure(
    model: Model, half: Half, nodes: Sequence[str], carriers: Sequence[str], searched: int | None = None
) -> Readings:
    """What ``model`` does on the prompts of ``half`` and what ``nodes`` (on the first ``searched`` pairs, if not on
    all), and ``carriers`` together (on all), carry of it.

    Raises:
        ModelError: the architecture's parts cannot be exchanged one by one.
    """
    layout, (clean, corrupt) = layout_of(model), values(model, half)
    rows = [layout.source_index[name] for name in nodes]
    together = [layout.source_index[name] for name in carriers]
    few = half.pairs if searched is None else half.pairs.of(torch.arange(min(searched, len(half.pairs))))
    alone = patch_nodes(model, layout, few, half.metric, rows).numpy()
    carried = patch_sets(model, layout, half.pairs, half.metric, [together])[0].numpy()
    return Readings(clean, corrupt, dict(zip(nodes, alone, strict=True)), carried)


def _fewest(model: Model, half: Half, candidates: Sequence[str]) -> list[str]:
    """The shortest beginning of the supporting candidates, largest effect first, that takes the target when exchanged,
    without the nodes that are not needed for that."""
    layout = layout_of(model)
    rows = [layout.source_index[name] for name in candidates]
    alone = patch_nodes(model, layout, half.pairs, half.metric, rows).mean(1)
    order = [rows[i] for i in alone.argsort(descending=True, stable=True).tolist()]
    supporting = order[: max(1, int((alone > 0).sum()))]

    def taken(sets: Sequence[Sequence[int]]) -> list[float]:
        return patch_sets(model, layout, half.pairs, half.metric, sets).mean(1).tolist()

    # Many sets at once, as what they share is computed once. Of what nodes can take at all: the rest goes from the
    # embedding to the logits directly.
    clean, corrupt = values(model, half)
    beginnings = [supporting[: i + 1] for i in range(len(supporting))]
    found = taken(beginnings)
    wanted = TARGET * min(found[-1], float((clean - corrupt).mean()))
    kept = next(nodes for nodes, much in zip(beginnings, found, strict=True) if much >= wanted)
    while 1 < len(kept) <= PRUNED:
        fewer = [[other for other in kept if other != row] for row in kept]
        left = taken(fewer)
        best = max(range(len(left)), key=left.__getitem__)
        if left[best] < wanted:
            break
        kept = fewer[best]
    return [layout.sources[row] for row in sorted(kept)]
