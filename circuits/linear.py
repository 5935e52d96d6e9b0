"""The linear maps of a model as its checkpoint stores them: what goes in, how much the output matters, edits in place.

Only matrices that transformers itself has under the same name and shape are listed. Where the wrapper split a joint
matrix into parts (query, key and value of GPT-2), the parts exist in this process alone, and so are left out; so is an
unembedding that is tied to the embedding, where an edit of one is an edit of the other.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from heredity.interp.model import Model

from .attribution import Metric
from .weights import parameters


def linear_maps(model: Model) -> dict[str, nn.Module]:
    """Modules y = W·x (+ b) by the name of their weight, in the order of the model."""
    hf = cast(Any, model.bridge.original_model)
    with torch.device("meta"):
        stored = {name: value.shape for name, value in type(hf)(hf.config).named_parameters()}
    known = parameters(model)
    found = {}
    for name, module in hf.named_modules():
        weight = name.replace("._original_component", "") + ".weight"
        plain = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if plain and weight in known and stored.get(weight) == known[weight].shape:
            found[weight] = module
    return found


def matrix(module: nn.Module, value: Tensor) -> Tensor:
    """``value`` of the module's weight as [d_out, d_in]."""
    return value.T if type(module).__name__ == "Conv1D" else value


def inputs(model: Model, modules: Mapping[str, nn.Module], tokens: Tensor) -> dict[str, Tensor]:
    """What goes into each of ``modules`` on ``tokens`` [batch, pos], as [batch, pos, d_in]."""
    seen: dict[str, Tensor] = {}
    with torch.inference_mode(), _hooked(modules, seen, None):
        model.logits(tokens)
    return seen


def inputs_and_slopes(
    model: Model, modules: Mapping[str, nn.Module], tokens: Tensor, metric: Metric
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The metric per row [batch], :func:`inputs`, and its gradient at each module's output [batch, pos, d_out]."""
    seen: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    with torch.enable_grad(), _hooked(modules, seen, added):
        rows = metric(model.logits(tokens))
        rows.sum().backward()
    slopes = {name: probe.grad for name, probe in added.items() if probe.grad is not None}
    return rows.detach(), seen, slopes


@contextmanager
def _hooked(
    modules: Mapping[str, nn.Module], seen: dict[str, Tensor], added: dict[str, Tensor] | None
) -> Iterator[None]:
    def watch(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
            seen[name] = given[0].detach()
            if added is None:
                return None
            # The gradient of something added to an output is the gradient at the output.
            added[name] = torch.zeros_like(out).requires_grad_()
            return out + added[name]

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Factors = tuple[Tensor, Tensor]
"""Left [d_out, r] and right [d_in, r] of a change left·rightᵀ of a weight [d_out, d_in]."""


@contextmanager
def edited_weights(model: Model, modules: Mapping[str, nn.Module], changes: Mapping[str, Factors]) -> Iterator[None]:
    """``changes`` added to the weights of that name (``modules`` of :func:`linear_maps`); the old values come back
    bit for bit."""
    weights = parameters(model)
    saved = {name: weights[name].clone() for name in changes}
    try:
        with torch.no_grad():
            for name, (left, right) in changes.items():
                change = (left.double() @ right.double().T).to(weights[name].dtype)
                weights[name].add_(matrix(modules[name], change))
        yield
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                weights[name].copy_(value)


def second_moments(
    model: Model, modules: Mapping[str, nn.Module], batches: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """E[x·xᵀ] of each module's input over the real tokens of ``batches`` = (tokens, mask), [d_in, d_in] in float64."""
    totals: dict[str, Tensor] = {}
    count = 0
    for tokens, mask in batches:
        for name, value in inputs(model, modules, tokens).items():
            rows = value[mask].double()
            totals[name] = totals.get(name, torch.zeros(rows.shape[1], rows.shape[1], dtype=rows.dtype)) + rows.T @ rows
        count += int(mask.sum())
    return {name: total / count for name, total in totals.items()}
