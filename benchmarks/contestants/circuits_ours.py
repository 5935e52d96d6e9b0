"""Ours, for ``circuits_worker.py``."""

from collections.abc import Callable

import numpy as np
import torch

from heredity.circuits import edges
from heredity.circuits.atp import attribute_nodes
from heredity.circuits.pairs import LogitDifference, Pairs
from heredity.interp.load import load


def tasks(directory: str, data: dict) -> dict[str, Callable[[], dict[str, np.ndarray]]]:
    model = load(directory)
    last = torch.tensor(data["last"])
    pairs = Pairs(torch.tensor(data["clean"]), torch.tensor(data["corrupt"]), last)
    back = Pairs(pairs.corrupt, pairs.clean, last)
    metric = LogitDifference(last, [[i] for i in data["right"]], [[i] for i in data["wrong"]])
    few, few_metric = back.of(torch.arange(data["few"])), LogitDifference(
        last[: data["few"]], metric.right[: data["few"]], metric.wrong[: data["few"]]
    )  # fmt: skip
    usual = edges.path

    def integrated() -> dict[str, np.ndarray]:
        return _edges(edges.attribute_edges(model, pairs, metric, steps=data["steps"]))

    def gate() -> dict[str, np.ndarray]:
        """At the points of the reference: a left sum of equal steps."""
        edges.path = lambda method, steps: [(k / steps, 1 / steps) for k in range(steps)]
        try:
            return integrated()
        finally:
            edges.path = usual

    def one_gradient() -> dict[str, np.ndarray]:
        # The other takes the gradient at the counterfactual; so ours is asked with both ends exchanged.
        return _edges(edges.attribute_edges(model, few, few_metric, method="eap"))

    def nodes() -> dict[str, np.ndarray]:
        found = attribute_nodes(model, back, metric, fix_attention=False, drop=False)
        return {"scores": found.scores[: len(found.layout.sources)].numpy()}

    return {"integrated": integrated, "gate": gate, "edges": one_gradient, "nodes": nodes}


def _edges(found: edges.EdgeScores) -> dict[str, np.ndarray]:
    return {"scores": found.scores.numpy(), "destinations": np.array(found.layout.destinations)}
