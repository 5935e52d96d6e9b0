"""What a training needs in memory, estimated beforehand: a budget is kept by a smaller buffer, or nothing is begun."""

from dataclasses import replace
from typing import TypeVar

from ...errors import TrainingError
from .recipe import Recipe
from .running import Running
from .stores import Stores
from .streams import places

FLOAT = 4
"""Bytes of a weight."""
COPIES = 7
"""Of the weights at most at once: weights, gradients, Adam's two moments, and what a checkpoint is written from or the
dead latents' rows and gradients, three more."""
BASE = 700_000_000
"""Bytes that the interpreter and its libraries take (more than was seen: 0.5 GB)."""
SMALLEST = 8
"""Batches that must be shuffled together at least, or neighbours in a text would be neighbours in a batch."""

_S = TypeVar("_S", bound=Stores | Running)


def needed(recipe: Recipe, source: Stores | Running) -> int:
    """Bytes at most resident while ``recipe`` is trained on ``source``, an estimate from above."""
    reads, writes = places(recipe.kind, source.widths)
    weights = recipe.latents * (sum(reads) + sum(writes) + 4) * FLOAT * COPIES
    columns = sum(source.widths)
    # Rows of the buffer, and once more while they are joined; a batch in and out, its errors and their gradients.
    rows = max(source.buffer, recipe.batch) * columns * _bytes(source) * 2 + recipe.batch * columns * FLOAT * 10
    # Candidates of the selection: place, latent, value, score, and as many again while they are ordered.
    active = recipe.batch * (4 * recipe.k * recipe.k_start + recipe.aux_k) * 64
    return int(BASE + _models(source) + weights + rows + active)


def within(recipe: Recipe, source: _S, budget: float | int) -> _S:
    """``source`` with the buffer that fits into ``budget`` bytes, at most the one it has.

    Raises:
        TrainingError: even the smallest does not.
    """
    least = min(source.buffer, SMALLEST * recipe.batch)
    if (floor := needed(recipe, replace(source, buffer=least))) > budget:
        reads, writes = places(recipe.kind, source.widths)
        each = recipe.latents * (sum(reads) + sum(writes)) * FLOAT
        what = (
            f"about {floor / 1e9:.1f} GB are needed, {budget / 1e9:.1f} allowed; {each * COPIES / 1e9:.1f} of them for "
            f"{recipe.latents} latents x {sum(reads) + sum(writes)} columns x {COPIES} copies (weights, gradients, "
            "Adam's moments, a checkpoint)"
        )
        raise TrainingError(what, where="memory", remedy="Allow more, or lower latents or batch.")
    buffer = source.buffer
    while buffer > least and needed(recipe, replace(source, buffer=buffer)) > budget:
        buffer = max(least, buffer // 2)
    return replace(source, buffer=buffer)


def _bytes(source: Stores | Running) -> int:
    """Of one stored value."""
    if isinstance(source, Running):
        return FLOAT
    return max(store.manifest.torch_dtype.itemsize for store in source.stores)


def _models(source: Stores | Running) -> int:
    if isinstance(source, Stores):
        return 0
    parameters = [p for model in source.models for p in model.bridge.original_model.parameters()]
    return sum(p.numel() * p.element_size() for p in parameters)
