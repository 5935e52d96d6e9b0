"""Attention patterns recorded in one forward and held in another."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from heredity.interp.errors import ModelError
from heredity.interp.model import Model

_LEVEL = (1 << 30) + 1
"""Of hooks set here, so that they can be taken away without touching others."""
_TOLERANCE = 1e-4

Patterns = dict[int, Tensor]
"""By layer, [batch, head, query, key]."""


@contextmanager
def each_pattern(model: Model, rewrite: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Let ``rewrite`` give the pattern [batch, head, query, key] of every layer, given the layer and what it would be.

    Raises:
        ModelError: the architecture shows no patterns.
    """
    names = {f"blocks.{layer}.attn.hook_pattern": layer for layer in range(model.shape.n_layers)}
    if absent := [name for name in names if name not in model.bridge.hook_dict]:
        raise ModelError(
            f"this {model.shape.architecture} has no {absent[0]}",
            where=model.spec,
            remedy="Measure opacity without routing.",
        )
    points = {name: model.bridge.hook_dict[name] for name in names}
    try:
        for name, layer in names.items():
            points[name].add_hook(lambda tensor, hook, layer=layer: rewrite(layer, tensor), level=_LEVEL)
        yield
    finally:
        for point in points.values():
            point.remove_hooks(level=_LEVEL)


@contextmanager
def recorded_patterns(model: Model) -> Iterator[Patterns]:
    """The patterns of the last forward inside the context.

    Raises:
        ModelError: the architecture shows no patterns.
    """
    found: Patterns = {}

    def keep(layer: int, pattern: Tensor) -> Tensor:
        found[layer] = pattern.detach()
        return pattern

    with each_pattern(model, keep):
        yield found


@contextmanager
def held_patterns(model: Model, patterns: Patterns) -> Iterator[None]:
    """Hold the patterns in every forward inside the context.

    Raises:
        ModelError: the architecture shows no patterns.
    """
    with each_pattern(model, lambda layer, pattern: patterns[layer].to(pattern.dtype)):
        yield


@torch.no_grad()
def check_patterns(model: Model) -> None:
    """Make sure that the model computes with the patterns its hooks show and take.

    Raises:
        ModelError: it does not, so that routing cannot be told from what is routed.
    """
    tokens = torch.arange(min(6, model.shape.n_ctx))[None] % model.shape.d_vocab
    layers = range(model.shape.n_layers)
    sites = [f"{kind}@{layer}" for layer in layers for kind in ("attn_v", "attn_z")]
    with recorded_patterns(model) as patterns:
        model.capture(tokens, ["final"])
    even = {layer: torch.full_like(pattern, 1 / pattern.shape[-1]) for layer, pattern in patterns.items()}
    with held_patterns(model, even):
        seen = model.capture(tokens, sites)
    for layer in layers:
        z, v = seen[f"attn_z@{layer}"], seen[f"attn_v@{layer}"]
        want = v.mean(1).repeat_interleave(z.shape[2] // v.shape[2], 1)[:, None].expand_as(z)
        if not (z - want).norm() <= _TOLERANCE * want.norm():
            raise ModelError(
                f"the attention of layer {layer} of this {model.shape.architecture} computes with other patterns than "
                "those that can be held, so routing cannot be told from what is routed",
                where=model.spec,
                remedy="Measure opacity without routing.",
            )
