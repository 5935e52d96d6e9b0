"""What queries, keys, values and MLPs read from the residual stream: through which norm, by which projection.

Everything here is checked against the running model (:func:`check_reads`): effects of edges are computed with it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heredity.interp.errors import ModelError
from heredity.interp.model import Model

KINDS = ("q", "k", "v")


@dataclass(frozen=True)
class Projection:
    """The queries, keys or values of a layer as a linear function of the normed stream."""

    weight: Tensor
    """[head, d_model, d_head]"""
    bias: Tensor
    """[head, d_head]"""


def projection(model: Model, layer: int, kind: str) -> Projection:
    """The projection ``kind`` ("q", "k" or "v") of a layer; keys and values have one per key-value head."""
    linear = getattr(model.bridge.blocks[layer].attn, kind).original_component
    weight = linear.weight if type(linear).__name__ == "Conv1D" else linear.weight.T  # [d_model, heads * d_head]
    heads = model.shape.n_heads if kind == "q" else model.shape.n_kv_heads
    d_head = weight.shape[1] // heads
    bias = linear.bias if linear.bias is not None else weight.new_zeros(weight.shape[1])
    return Projection(weight.reshape(-1, heads, d_head).permute(1, 0, 2), bias.reshape(heads, d_head))


def norm(model: Model, layer: int, kind: str) -> nn.Module:
    """The norm between the stream and the attention (``kind`` "attn") or the MLP ("mlp") of a layer.

    Raises:
        ModelError: there is none.
    """
    parts = getattr(model.bridge.blocks[layer], "_modules", {})
    found = parts.get("ln1") if kind == "attn" else parts.get("ln2", parts.get("ln1"))  # Cohere has one for both
    if found is None:
        raise ModelError(
            f"layer {layer} of this {model.shape.architecture} has no norm before its {kind}, so edges into it "
            "cannot be told apart",
            where=model.spec,
            remedy="Use an architecture with plain pre-norm attention.",
        )
    return found.original_component


def through_norm(module: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient at the stream, given that at the norm's output.

    Args:
        module: the norm.
        x: the stream at the norm's input, [..., d_model].
        gradient: [..., n, d_model], n gradients of each place.
    """
    with torch.enable_grad():
        places = x.detach()[..., None, :].expand_as(gradient).requires_grad_()
        return torch.autograd.grad(module(places), places, gradient)[0]


def read_sites(model: Model, parallel: bool) -> dict[str, str]:
    """Site of the stream that each layer's attention (``attn@L``) and MLP (``mlp@L``) read."""
    found = {}
    for layer in range(model.shape.n_layers):
        found[f"attn@{layer}"] = f"resid_pre@{layer}"
        found[f"mlp@{layer}"] = f"resid_pre@{layer}" if parallel else f"resid_mid@{layer}"
    return found


def check_reads(model: Model, parallel: bool) -> None:
    """Make sure that norms and projections compute what the model computes.

    Raises:
        ModelError: they do not, so that edges of this architecture cannot be told apart.
    """
    tokens = torch.arange(min(8, model.shape.n_ctx))[None] % model.shape.d_vocab
    layers, places = range(model.shape.n_layers), read_sites(model, parallel)
    sites = {*places.values(), *(f"attn_{kind}@{layer}" for layer in layers for kind in KINDS)}
    with torch.inference_mode():
        seen = model.capture(tokens, sorted(sites | {f"mlp_in@{layer}" for layer in layers}))
        for layer in layers:
            normed = norm(model, layer, "attn")(seen[places[f"attn@{layer}"]])
            pairs = [(norm(model, layer, "mlp")(seen[places[f"mlp@{layer}"]]), seen[f"mlp_in@{layer}"], "MLP")]
            for kind in KINDS:
                p = projection(model, layer, kind)
                ours = torch.einsum("bpm,hmd->bphd", normed, p.weight) + p.bias
                pairs.append((ours, seen[f"attn_{kind}@{layer}"], f"{kind} projection"))
            for ours, theirs, what in pairs:
                if not (ours - theirs).norm() <= 1e-3 * theirs.norm():
                    raise ModelError(
                        f"the {what} of layer {layer} of this {model.shape.architecture} reads more than the normed "
                        "residual stream, so edges into it cannot be told apart",
                        where=model.spec,
                        remedy="Use an architecture with plain pre-norm attention.",
                    )
