"""Edge scores by relevance instead of gradients: the backward pass of layer-wise relevance propagation.

    score(u→v) = mean over pairs of Σ_positions ( a_u(x) − a_u(x′) ) · R_v

(RelP, Jafari et al. 2508.21258). R is the gradient at x of the model with its non-linear parts made linear at x:

* a norm divides by the scale it had (LN rule),
* an activation multiplies by the ratio of output to input it had (identity rule),
* of a gated MLP's product each factor passes on half (half rule),
* attention patterns are differentiated, or held fixed (``hold_attention``: then queries and keys score 0).

One forward at x and one backward; where gradients are far from effects because an activation or a norm curves, this is
nearer. Values in the forward do not change.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from heredity.interp.errors import ModelError
from heredity.interp.model import Model

from .attribution_graph_frozen import freeze_norm
from .edges import EdgeScores, Method, attribute_edges
from .pairs import Metric, Pairs


def attribute_edges_by_relevance(
    model: Model,
    pairs: Pairs,
    metric: Metric,
    *,
    hold_attention: bool = False,
    method: Method = "eap",
    steps: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EdgeScores:
    """Scores of all edges of ``model`` on ``pairs``, with the sign of :mod:`.edges`.

    Args:
        model, pairs, metric: as there.
        hold_attention: hold attention patterns fixed too.
        method: where the relevance is taken; RelP takes it at x (``eap``), ``eap-ig`` averages it over the line.
        steps: as there.
        progress: as there.

    Raises:
        ModelError: the architecture's edges cannot be told apart, or the rules do not apply to its parts.
    """
    with relevance_rules(model, hold_attention=hold_attention):
        found = attribute_edges(model, pairs, metric, method=method, steps=steps or 1, progress=progress)
    return replace(found, method="relp" if method == "eap" else f"relp, {method}")


@contextmanager
def relevance_rules(model: Model, *, hold_attention: bool = False) -> Iterator[None]:
    """Let gradients through ``model`` follow the rules.

    Raises:
        ModelError: it has an MLP whose first projections cannot be told from its activation, or a part that the
            forwards inside never passed, so that the rules were not followed.
    """
    bridge: Any = model.bridge
    expected: set[str] = set()
    passed: set[str] = set()
    with ExitStack() as stack:

        def hook(handle: Any) -> None:
            stack.callback(handle.remove)

        norms = {"ln_final": bridge.ln_final}
        for layer, block in enumerate(bridge.blocks):
            for name in ("ln1", "ln2", "ln1_post", "ln2_post"):
                if name in block._modules:
                    norms[f"{name} of layer {layer}"] = block._modules[name]
            name = f"MLP of layer {layer}"
            expected.add(name)
            _hook_mlp(model, name, block.mlp, passed, hook)
            if hold_attention:
                for kind in ("q", "k"):
                    expected.add(f"{kind} of layer {layer}")
                    projection = getattr(block.attn, kind)
                    hook(projection.register_forward_hook(_hold(passed, f"{kind} of layer {layer}")))
        for name, norm in norms.items():
            expected.add(name)
            # The wrapper calls what it wraps, or computes by itself with a scale that passes a hook point.
            hook(norm.original_component.register_forward_hook(_norm_rule(model, passed, name)))
            if (scale := getattr(norm, "hook_scale", None)) is not None:
                hook(scale.register_forward_hook(_hold(passed, name)))
        yield
    if silent := sorted(expected - passed):
        raise _refused(model, f"the forward of this {model.shape.architecture} never passes the {silent[0]}")


def with_gradient_of(value: Tensor, other: Tensor) -> Tensor:
    """``value`` with the gradient that ``other`` has."""
    return value.detach() + (other - other.detach())


def _norm_rule(
    model: Model, passed: set[str], name: str
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
    def rule(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        x = inputs[0]
        if not (torch.is_grad_enabled() and x.requires_grad):
            return None
        passed.add(name)
        flat = x.flatten(0, -2)
        frozen = freeze_norm(module, flat.detach(), out.detach().flatten(0, -2), name, model)
        return with_gradient_of(out, frozen.forward(flat).view_as(x))

    return rule


def _hook_mlp(model: Model, name: str, mlp: Any, passed: set[str], hook: Callable[[Any], None]) -> None:
    """Make what a layer's MLP gives to its last projection linear in what its first ones return."""
    first = [part for part in (getattr(mlp, kind, None) for kind in ("in", "gate")) if part is not None]
    last = getattr(mlp, "out", None)
    if not first or last is None:
        raise _refused(model, f"the {name} of this {model.shape.architecture} has no projections to tell apart")
    returned: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        returned.append(out)

    def rule(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        hidden, factors = inputs[0], list(returned)
        returned.clear()
        if not (torch.is_grad_enabled() and hidden.requires_grad):
            return None
        if len(factors) != len(first):
            raise _refused(model, f"the {name} of this {model.shape.architecture} hides its projections")
        passed.add(name)
        shares = [factor * _ratio(hidden, factor) for factor in factors]
        return with_gradient_of(hidden, torch.stack(shares).mean(0)), *inputs[1:]

    for part in first:
        hook(part.register_forward_hook(keep))
    hook(last.register_forward_pre_hook(rule))


def _hold(passed: set[str], name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
    def rule(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        if not out.requires_grad:  # a scale that is only shown; another tensor would count as an edit
            return None
        passed.add(name)
        return out.detach()

    return rule


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    above, below = above.detach(), below.detach()
    return torch.where(below == 0, 0.0, above / torch.where(below == 0, 1.0, below))


def _refused(model: Model, what: str) -> ModelError:
    return ModelError(
        f"{what}, so relevance cannot be passed back through it",
        where=model.spec,
        remedy="Use an architecture with LayerNorm or RMS norm and a plain or gated MLP, or another method.",
    )
