"""Whether a model does a task at all: a circuit for something it does not do would be a circuit for nothing."""

from dataclasses import dataclass

import numpy as np
import torch

from heredity.interp.errors import TaskError
from heredity.interp.model import Model

from ..intervals import Interval, mean
from ..prefix import Batch
from .prepare import Half
from .task import Task

PASS_TOKENS = 512


@dataclass(frozen=True)
class Score:
    """How well a model does a task.

    Attributes:
        accuracy: share of clean prompts on which right answers are ahead of wrong ones (for "kl": on which the
            likeliest token is a right answer); None for "kl" without answers.
        clean, corrupt: the metric on both, means over pairs.
        effect: their difference.
    """

    accuracy: float | None
    clean: float
    corrupt: float
    effect: Interval


def score(model: Model, half: Half, *, kl: bool = False, seed: int = 0) -> Score:
    """How well ``model`` does the prompts of ``half``; ``kl`` if the metric says nothing about answers."""
    clean, corrupt = values(model, half)
    accuracy: float | None = float((clean > 0).mean())
    if kl:
        accuracy = _top(model, half) if all(half.right) else None
    return Score(accuracy, float(clean.mean()), float(corrupt.mean()), mean(clean - corrupt, seed))


def values(model: Model, half: Half) -> tuple[np.ndarray, np.ndarray]:
    """The metric on the clean and on the counterfactual prompts of ``half``, float64 [N] both."""
    pairs = half.pairs
    clean, corrupt = np.empty(len(pairs)), np.empty(len(pairs))
    for rows in pairs.groups(PASS_TOKENS // 2, share=True):
        batch = Batch(model, pairs, rows)
        with torch.inference_mode():
            found = batch.value(half.metric, torch.cat([batch.pairs.clean, batch.pairs.corrupt])).double().numpy()
        own = rows.numpy()
        clean[own], corrupt[own] = found[: len(rows)], found[len(rows) :]
    return clean, corrupt


def screen(model: Model, task: Task, half: Half, *, seed: int = 0) -> Score:
    """The score, if it is good enough.

    Raises:
        TaskError: the model prefers the right answers less often than the task asks, or the counterfactual prompts do
            not lower the metric (the 95 % interval of the difference reaches 0).
    """
    found = score(model, half, kl=task.metric == "kl", seed=seed)
    if found.accuracy is not None and found.accuracy < task.accuracy:
        raise TaskError(
            f"this model prefers the right answer on {found.accuracy:.0%} of {len(half.pairs)} prompts, the task asks "
            f"for {task.accuracy:.0%} (metric {found.clean:.3g} on clean prompts, {found.corrupt:.3g} on the "
            "counterfactual)",
            where=f"{task.file or task.name}, {model.spec}",
            remedy="Choose a task that this model does, or lower `accuracy` in the task file.",
        )
    if not found.effect.low > 0:
        raise TaskError(
            f"the counterfactual prompts do not lower the metric (difference {found.effect.estimate:.3g}, "
            f"95 % interval {found.effect.low:.3g} to {found.effect.high:.3g}, accuracy "
            f"{'not defined' if found.accuracy is None else format(found.accuracy, '.0%')})",
            where=f"{task.file or task.name}, {model.spec}",
            remedy="Let the counterfactual change what the answer depends on, or give more pairs.",
        )
    return found


def _top(model: Model, half: Half) -> float:
    hits = 0
    for rows in half.pairs.groups(PASS_TOKENS):
        group = half.pairs.of(rows)
        with torch.inference_mode():
            top = model.logits(group.clean)[torch.arange(len(rows)), group.last].argmax(-1)
        hits += sum(int(token) in half.right[row] for token, row in zip(top, rows.tolist(), strict=True))
    return hits / len(half.pairs)
