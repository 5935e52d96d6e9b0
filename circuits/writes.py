"""What attention heads and MLPs add to the residual stream, also where a norm stands between a module and the stream.

Where the block norms what a module returns before adding it (Gemma 2 and 3, OLMo 2), the norm's scale at the position
goes with each head, so that the heads' writes still add up to the attention's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from heredity.interp.errors import ModelError
from heredity.interp.model import Edit, Model

ENTRY = "resid_pre@0"
"""Where the residual stream begins: token embeddings with learned positions and scaling."""


def outer_norm(model: Model, layer: int, kind: str) -> nn.Module | None:
    """The norm between the attention (``kind`` = "head") or the MLP ("mlp") of a layer and the stream, if any."""
    return getattr(model.bridge.blocks[layer], "_modules", {}).get("ln1_post" if kind == "head" else "ln2_post")


def outer_scale(model: Model, layer: int, z: Tensor) -> tuple[Tensor, Tensor]:
    """By what attention output is multiplied on its way to the stream: per position [batch, pos, 1], per dimension
    [d_model], given all head values ``z`` [batch, pos, head, d_head]."""
    weight, bias = model.head_weights(layer)
    norm = outer_norm(model, layer, "head")
    if norm is None:
        return z.new_ones(*z.shape[:2], 1), weight.new_ones(weight.shape[-1])
    out = torch.einsum("bphd,hdm->bpm", z, weight) + bias
    # An RMS norm maps x to c(x)·g·x. Its value at (1, …, 1) is g up to a factor, and projection finds c.
    gain = norm(torch.ones_like(bias)[None, None])[0, 0]
    shaped = out * gain
    return (norm(out) * shaped).sum(-1, keepdim=True) / shaped.square().sum(-1, keepdim=True).clamp_min(1e-30), gain


def head_writes(model: Model, layer: int, z: Tensor, heads: Sequence[int]) -> Tensor:
    """What ``heads`` write, [batch, pos, len(heads), d_model], given all values ``z`` [batch, pos, head, d_head]."""
    weight, bias = model.head_weights(layer)
    chosen = list(heads)
    writes = torch.einsum("bphd,hdm->bphm", z[:, :, chosen], weight[chosen]) + bias / model.shape.n_heads
    if outer_norm(model, layer, "head") is None:
        return writes
    scale, gain = outer_scale(model, layer, z)
    return writes * scale[:, :, None] * gain


def mlp_write(model: Model, layer: int, out: Tensor) -> Tensor:
    """What an MLP writes, given what it returns, [batch, pos, d_model] both."""
    norm = outer_norm(model, layer, "mlp")
    return out if norm is None else norm(out)


def write_site(model: Model, layer: int, kind: str) -> str:
    """Where something added to a write of the attention ("head") or the MLP ("mlp") can be added instead."""
    if outer_norm(model, layer, kind) is None:
        return f"{'attn' if kind == 'head' else 'mlp'}_out@{layer}"
    return f"{'resid_mid' if kind == 'head' else 'resid_post'}@{layer}"


def stream_scale(model: Model) -> float:
    """What every write is multiplied by where it enters the stream: 1, but for Granite."""
    return float(getattr(model.bridge.original_model.config, "residual_multiplier", 1.0))


def both(first: Edit, second: Edit) -> Edit:
    """``second`` after ``first``."""
    return lambda value: second(first(value))


def check_additive(model: Model) -> None:
    """Make sure that every layer adds to the stream what its heads and its MLP write, and nothing else.

    Raises:
        ModelError: it does not, so that exchanging a node would exchange more or less than the node.
    """
    tokens = torch.arange(min(8, model.shape.n_ctx))[None] % model.shape.d_vocab
    layers = range(model.shape.n_layers)
    kinds = ("resid_pre", "attn_z", "mlp_out", "resid_post")
    with torch.inference_mode():
        seen = model.capture(tokens, [f"{kind}@{layer}" for layer in layers for kind in kinds])
        for layer in layers:
            before, z, out, after = (seen[f"{kind}@{layer}"] for kind in kinds)
            writes = head_writes(model, layer, z, range(model.shape.n_heads)).sum(2) + mlp_write(model, layer, out)
            missing = (after - before - stream_scale(model) * writes).norm() / after.norm()
            if not missing < 1e-3:
                raise ModelError(
                    f"layer {layer} of this {model.shape.architecture} adds more to the residual stream than the "
                    "outputs of its heads and its MLP, so its parts cannot be exchanged one by one",
                    where=model.spec,
                    remedy="Use an architecture with plain residual blocks.",
                )
