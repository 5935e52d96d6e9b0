"""The parts of a model that can be exchanged: heads, MLPs, embedding and unembedding, and forwards with some replaced.

A head is exchanged by what it writes to the residual stream (its values through its slice of the output projection,
plus its share of the bias, through the norm behind it where there is one), so that a change in either model's
projection counts as part of the head; learned positions count as part of the embedding. Replacing every node of S by
P's therefore gives P's logits exactly (tested).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from heredity.interp.errors import SiteError
from heredity.interp.model import Edit, Model
from heredity.interp.readout import unembed

from .writes import ENTRY, both, head_writes, mlp_write, outer_scale, write_site


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
    """``attn_z@L`` [batch, pos, head, d_head] or head writes under ``writes@L`` [head, d_model]; what MLPs write under
    ``mlp_out@L``; of a run also ``resid_pre@0``."""
    model: Model | None
    """Whose output projections and unembedding go with the values; None for means."""

    def write(self, node: Node) -> Tensor:
        """What ``node`` (not the unembedding) writes, [batch, pos, d_model]."""
        if node.kind == "head":
            return self.head_writes(node.layer, [node.head])
        return self.values[ENTRY if node.kind == "embed" else f"mlp_out@{node.layer}"]

    def head_writes(self, layer: int, heads: Sequence[int]) -> Tensor:
        """Sum over ``heads`` of what they write, [batch, pos, d_model] or broadcastable to it."""
        if self.model is None:
            return self.values[f"writes@{layer}"][list(heads)].sum(0)
        return head_writes(self.model, layer, self.values[f"attn_z@{layer}"], heads).sum(2)


def node_sites(model: Model) -> list[str]:
    """The sites whose values determine every node's write."""
    layers = range(model.shape.n_layers)
    return [ENTRY, *(f"{kind}@{layer}" for layer in layers for kind in ("attn_z", "mlp_out"))]


def run_donor(model: Model, tokens: Tensor) -> Donor:
    """``model``'s own values on ``tokens`` [batch, pos]."""
    with torch.inference_mode():
        return Donor(_as_written(model, model.capture(tokens, node_sites(model))), model)


def stream_sites(model: Model) -> list[str]:
    """The sites whose values are all that heads and MLPs read."""
    layers = range(model.shape.n_layers)
    # Where attention and MLP stand side by side there is no middle, and both read what comes before the block.
    with suppress(SiteError):
        model.site("resid_mid@0")
        return [f"{kind}@{layer}" for layer in layers for kind in ("resid_pre", "resid_mid")]
    return [f"resid_pre@{layer}" for layer in layers]


def read_stream(model: Model, tokens: Tensor, stream: Mapping[str, Tensor]) -> Donor:
    """What ``model``'s nodes make of another model's ``stream`` (values of :func:`stream_sites` on ``tokens``).

    Its embedding reads the tokens, as always. Nothing one node does reaches another: each reads the given stream.
    """
    edits = {site: _constant(value) for site, value in stream.items()}
    with torch.inference_mode():
        values = model.capture(tokens, node_sites(model)[1:], edits=edits)
        values |= model.capture(tokens, [ENTRY])
        return Donor(_as_written(model, values), model)


def mean_donor(model: Model, batches: Sequence[tuple[Tensor, Tensor]]) -> Donor:
    """Each head's and MLP's mean write over the real tokens of ``batches`` = (tokens, mask) [batch, pos]."""
    totals: dict[str, Tensor] = {}
    count = 0
    layers = range(model.shape.n_layers)

    def add(name: str, value: Tensor) -> None:
        part = value[mask].double().sum(0)
        totals[name] = totals.get(name, torch.zeros_like(part)) + part

    with torch.inference_mode():
        for tokens, mask in batches:
            values = _as_written(model, model.capture(tokens, node_sites(model)[1:]))
            count += int(mask.sum())
            for layer in layers:
                add(f"mlp_out@{layer}", values[f"mlp_out@{layer}"])
                # A write is linear in the scaled head values, which are smaller than the writes.
                z = values[f"attn_z@{layer}"]
                scale, _ = outer_scale(model, layer, z)
                add(f"attn_z@{layer}", z * scale[..., None])
                add(f"scale@{layer}", scale)
        means: dict[str, Tensor] = {}
        for layer in layers:
            z, scale, out = ((totals[f"{kind}@{layer}"] / count).float() for kind in ("attn_z", "scale", "mlp_out"))
            weight, bias = model.head_weights(layer)
            _, gain = outer_scale(model, layer, torch.ones_like(z)[None, None])
            means[f"writes@{layer}"] = (torch.einsum("hd,hdm->hm", z, weight) + scale * bias / len(z)) * gain
            means[f"mlp_out@{layer}"] = out
    return Donor(means, None)


def _as_written(model: Model, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """``values`` with what MLPs return replaced by what they write."""
    for layer in range(model.shape.n_layers):
        values[f"mlp_out@{layer}"] = mlp_write(model, layer, values[f"mlp_out@{layer}"])
    return values


def patched_logits(model: Model, tokens: Tensor, replaced: Collection[Node], donor: Donor) -> Tensor:
    """Logits [batch, pos, d_vocab] on ``tokens`` with the nodes in ``replaced`` giving the donor's values."""
    edits = patches(model, replaced, donor)
    if Node(model.shape.n_layers, "unembed") in replaced and donor.model is not None:
        residual = model.capture(tokens, ["final"], edits=edits)["final"]
        return unembed(donor.model, residual)
    return model.logits(tokens, edits=edits)


def patches(model: Model, replaced: Collection[Node], donor: Donor) -> dict[str, Edit]:
    """Edits with which the nodes in ``replaced`` (an unembedding among them left alone) give the donor's values."""
    edits: dict[str, Edit] = {}
    heads: dict[int, list[int]] = {}
    for node in sorted(replaced):
        if node.kind == "head":
            heads.setdefault(node.layer, []).append(node.head)
        elif node.kind == "mlp":
            edits |= _mlp_edits(model, node.layer, donor)
        elif node.kind == "embed":
            edits[ENTRY] = _constant(donor.values[ENTRY])
    for layer, chosen in heads.items():
        for site, edit in _head_edits(model, layer, chosen, donor).items():
            edits[site] = both(edits[site], edit) if site in edits else edit
    return edits


def _constant(value: Tensor) -> Edit:
    return lambda current: value.to(current.dtype).expand_as(current)


def _mlp_edits(model: Model, layer: int, donor: Donor) -> dict[str, Edit]:
    site, write = write_site(model, layer, "mlp"), donor.values[f"mlp_out@{layer}"]
    if site == f"mlp_out@{layer}":
        return {site: _constant(write)}
    current: dict[str, Tensor] = {}
    return {
        f"mlp_out@{layer}": _remember(current, "out"),
        site: lambda stream: stream + write - mlp_write(model, layer, current["out"]),
    }


def _head_edits(model: Model, layer: int, heads: Sequence[int], donor: Donor) -> dict[str, Edit]:
    current: dict[str, Tensor] = {}

    def exchange(out: Tensor) -> Tensor:
        own = head_writes(model, layer, current["z"], heads).sum(2)
        return out + donor.head_writes(layer, heads) - own

    return {f"attn_z@{layer}": _remember(current, "z"), write_site(model, layer, "head"): exchange}


def _remember(store: dict[str, Tensor], name: str) -> Edit:
    def edit(value: Tensor) -> Tensor:
        store[name] = value
        return value

    return edit


Metric = Callable[[Tensor], Tensor]
"""Logits [batch, pos, d_vocab] → one number per row [batch]."""


def gradients(model: Model, tokens: Tensor, metric: Metric) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Metric per row [batch], the values of :func:`run_donor` and the metric's gradient at every node's write.

    Gradients are keyed ``resid_pre@0``, ``attn_out@L`` and ``mlp_out@L``, [batch, pos, d_model].
    """
    added: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}

    def watch(name: str) -> Edit:
        def edit(value: Tensor) -> Tensor:
            values[name] = value.detach()
            return value

        return edit

    def probe(name: str) -> Edit:
        def edit(value: Tensor) -> Tensor:
            # The gradient of something added to a write is the gradient at the write, skip connections included.
            added[name] = torch.zeros_like(value).requires_grad_()
            return value + added[name]

        return edit

    edits: dict[str, Edit] = {name: watch(name) for name in node_sites(model)}
    places = {ENTRY: ENTRY}
    for layer in range(model.shape.n_layers):
        places[f"attn_out@{layer}"] = write_site(model, layer, "head")
        places[f"mlp_out@{layer}"] = write_site(model, layer, "mlp")
    for name, site in places.items():
        edits[site] = both(edits[site], probe(name)) if site in edits else probe(name)
    with torch.enable_grad():
        rows = metric(model.logits(tokens, edits=edits))
        rows.sum().backward()
    with torch.no_grad():
        values = _as_written(model, values)
    return rows.detach(), values, {name: value.grad for name, value in added.items() if value.grad is not None}
