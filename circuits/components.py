"""The parts of a model that can be exchanged: heads, MLPs, embedding and unembedding, and forwards with some replaced.

A head is exchanged by what it writes to the residual stream (its values through its slice of the output projection,
plus its share of the bias), so that a change in either model's projection counts as part of the head. Replacing every
node of S by P's therefore gives P's logits exactly (tested).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heredity.interp.model import Edit, Model
from heredity.interp.readout import unembed


@dataclass(frozen=True, order=True)
class Node:
    """One exchangeable part."""

    layer: int
    kind: str
    """``embed``, ``head``, ``mlp`` or ``unembed``."""
    head: int = 0

    def __str__(self) -> str:
        return {"head": f"attn_head@{self.layer}.{self.head}", "mlp": f"mlp_out@{self.layer}"}.get(self.kind, self.kind)


def nodes_of(model: Model) -> list[Node]:
    """Every node of ``model``, in the order of the computation."""
    layers = range(model.shape.n_layers)
    inner = [
        node
        for layer in layers
        for node in (*(Node(layer, "head", h) for h in range(model.shape.n_heads)), Node(layer, "mlp"))
    ]
    return [Node(-1, "embed"), *inner, Node(model.shape.n_layers, "unembed")]


@dataclass(frozen=True)
class Donor:
    """Values to put in: per site [batch, pos, …] from a run on the same tokens, or means that broadcast."""

    values: Mapping[str, Tensor]
    """``attn_z@L`` [batch, pos, head, d_head] or head writes under ``writes@L`` [head, d_model]; ``mlp_out@L``."""
    model: Model | None
    """Whose output projections and unembedding go with the values; None for means."""

    def head_writes(self, layer: int, heads: Sequence[int]) -> Tensor:
        """Sum over ``heads`` of what they write, [batch, pos, d_model] or broadcastable to it."""
        if self.model is None:
            return self.values[f"writes@{layer}"][list(heads)].sum(0)
        return head_writes(self.model, layer, self.values[f"attn_z@{layer}"], heads).sum(2)


def head_writes(model: Model, layer: int, z: Tensor, heads: Sequence[int]) -> Tensor:
    """What ``heads`` write, [batch, pos, len(heads), d_model], given all values ``z`` [batch, pos, head, d_head]."""
    weight, bias = model.head_weights(layer)
    chosen = list(heads)
    return torch.einsum("bphd,hdm->bphm", z[:, :, chosen], weight[chosen]) + bias / model.shape.n_heads


def node_sites(model: Model) -> list[str]:
    """The sites whose values determine every node's write."""
    layers = range(model.shape.n_layers)
    return ["embed", *(f"{kind}@{layer}" for layer in layers for kind in ("attn_z", "mlp_out"))]


def run_donor(model: Model, tokens: Tensor) -> Donor:
    """``model``'s own values on ``tokens`` [batch, pos]."""
    with torch.inference_mode():
        return Donor(model.capture(tokens, node_sites(model)), model)


def mean_donor(model: Model, batches: Sequence[tuple[Tensor, Tensor]]) -> Donor:
    """Each head's and MLP's mean write over the real tokens of ``batches`` = (tokens, mask) [batch, pos]."""
    totals: dict[str, Tensor] = {}
    count = 0
    with torch.inference_mode():
        for tokens, mask in batches:
            values = model.capture(tokens, node_sites(model)[1:])
            count += int(mask.sum())
            for name, value in values.items():
                part = value[mask].double().sum(0)
                totals[name] = totals.get(name, torch.zeros_like(part)) + part
        means: dict[str, Tensor] = {}
        for layer in range(model.shape.n_layers):
            z = (totals[f"attn_z@{layer}"] / count).float()[None, None]
            means[f"writes@{layer}"] = head_writes(model, layer, z, range(model.shape.n_heads))[0, 0]
            means[f"mlp_out@{layer}"] = (totals[f"mlp_out@{layer}"] / count).float()
    return Donor(means, None)


def patched_logits(model: Model, tokens: Tensor, replaced: Collection[Node], donor: Donor) -> Tensor:
    """Logits [batch, pos, d_vocab] on ``tokens`` with the nodes in ``replaced`` giving the donor's values."""
    edits: dict[str, Edit] = {}
    heads: dict[int, list[int]] = {}
    for node in sorted(replaced):
        if node.kind == "head":
            heads.setdefault(node.layer, []).append(node.head)
        elif node.kind == "mlp":
            edits[f"mlp_out@{node.layer}"] = _constant(donor.values[f"mlp_out@{node.layer}"])
        elif node.kind == "embed":
            edits["embed"] = _constant(donor.values["embed"])
    for layer, chosen in heads.items():
        edits.update(_head_edits(model, layer, chosen, donor))
    if Node(model.shape.n_layers, "unembed") in replaced and donor.model is not None:
        residual = model.capture(tokens, ["final"], edits=edits)["final"]
        return unembed(donor.model, residual)
    return model.logits(tokens, edits=edits)


def _constant(value: Tensor) -> Edit:
    return lambda current: value.to(current.dtype).expand_as(current)


def _head_edits(model: Model, layer: int, heads: Sequence[int], donor: Donor) -> dict[str, Edit]:
    current: dict[str, Tensor] = {}

    def remember(z: Tensor) -> Tensor:
        current["z"] = z
        return z

    def exchange(out: Tensor) -> Tensor:
        own = head_writes(model, layer, current["z"], heads).sum(2)
        return out + donor.head_writes(layer, heads) - own

    return {f"attn_z@{layer}": remember, f"attn_out@{layer}": exchange}


Metric = Callable[[Tensor], Tensor]
"""Logits [batch, pos, d_vocab] → one number per row [batch]."""


def gradients(model: Model, tokens: Tensor, metric: Metric) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Metric per row [batch], the values at every node site and the metric's gradient at every node's write.

    Gradients are keyed ``embed``, ``attn_out@L`` and ``mlp_out@L``, [batch, pos, d_model].
    """
    watched: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}

    def watch(name: str) -> Edit:
        def edit(value: Tensor) -> Tensor:
            kept = value.detach().requires_grad_() if name == "embed" else value
            if name.startswith("attn_z"):
                values[name] = kept.detach()
                return kept
            kept.retain_grad()
            watched[name] = kept
            return kept

        return edit

    layers = range(model.shape.n_layers)
    names = ["embed", *(f"{kind}@{layer}" for layer in layers for kind in ("attn_z", "attn_out", "mlp_out"))]
    with torch.enable_grad():
        rows = metric(model.logits(tokens, edits={name: watch(name) for name in names}))
        rows.sum().backward()
    values.update({name: value.detach() for name, value in watched.items()})
    return rows.detach(), values, {name: value.grad for name, value in watched.items() if value.grad is not None}
