"""Estimates of what single nodes carry, from one gradient: attribution patching and its repairs, AtP*.

For a node n (what the embedding, a head or an MLP writes; a head's query, key or value) at all positions together,

    AtP(n) = Σ_positions ( n(x) − n(x′) ) · ∂m/∂n |_x

misses two kinds of nodes (Kramár et al. 2403.00745). Queries and keys of a saturated softmax: there the softmax is
computed for the exchanged ones (:mod:`.attention_changes`). Nodes whose direct and indirect effects cancel: GradDrop
computes the gradient once per layer l with what that layer writes held fixed, and

    magnitude(n) = mean over pairs of 1 / (L − 1) Σ_l | AtP_l(n) |

Rank by magnitudes; the sign is that of the scores, as in :mod:`.edges`: positive supports the behaviour.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from heredity.interp.model import Edit, Model

from .attention_changes import Attention, exchanged, record_attention
from .edges import PASS_TOKENS
from .layout import NodeLayout, layout_of
from .pairs import Metric, Pairs
from .prefix import Batch
from .writes import ENTRY, both, check_additive, head_writes, mlp_write, outer_norm, write_site


@dataclass(frozen=True)
class NodeScores:
    """Estimates for every node.

    Attributes:
        layout: names of sources and destinations.
        nodes: names of the nodes: the sources, then every head's query, key and value.
        scores: mean over pairs, in units of the metric, float64 [nodes].
        magnitudes: how large the effect may be, float64 [nodes]: of GradDrop, or mean over pairs of |score|.
    """

    layout: NodeLayout
    nodes: tuple[str, ...]
    scores: Tensor
    magnitudes: Tensor


def attribute_nodes(
    model: Model,
    pairs: Pairs,
    metric: Metric,
    *,
    fix_attention: bool = True,
    drop: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> NodeScores:
    """Estimates for all nodes of ``model`` on ``pairs``: AtP* by default, plain AtP with neither repair.

    Args:
        model: the model.
        pairs: N prompts with their counterfactuals.
        metric: what is attributed.
        fix_attention: take queries' and keys' changes exactly through the softmax.
        drop: compute magnitudes by GradDrop, at a backward per layer.
        progress: called with groups of pairs done and in all.

    Raises:
        ModelError: the architecture's nodes cannot be told apart.
    """
    layout = layout_of(model)
    check_additive(model)
    inner = tuple(name for name in layout.destinations if name.startswith("attn_"))
    nodes = (*layout.sources, *inner)
    scores = torch.zeros(len(nodes), len(pairs), dtype=torch.float64)
    magnitudes = torch.zeros_like(scores)
    share = not fix_attention  # patterns are recomputed over whole prompts
    groups = list(pairs.groups(PASS_TOKENS, share=share))
    for done, rows in enumerate(groups):
        batch = Batch(model, pairs, rows, share=share)
        group = batch.pairs
        changes = _Changes(model, layout, batch, fix_attention)
        scores[:, rows] = changes.along(_gradients(model, layout, batch, metric, [None]))[0]
        magnitudes[:, rows] = scores[:, rows].abs()
        if drop:
            magnitudes[:, rows] = 0
            per_pass = max(1, PASS_TOKENS // group.clean.numel())
            for first in range(0, layout.n_layers, per_pass):
                layers = list(range(first, min(first + per_pass, layout.n_layers)))
                found = changes.along(_gradients(model, layout, batch, metric, list(layers)))
                for copy, layer in enumerate(layers):
                    # What the layer itself writes is held fixed, so it carries nothing.
                    found[copy, layout.written_by(layer)] = 0
                    magnitudes[:, rows] += found[copy].abs() / max(1, layout.n_layers - 1)
        if progress is not None:
            progress(done + 1, len(groups))
    return NodeScores(layout, nodes, scores.mean(1), magnitudes.mean(1))


class _Changes:
    """How far every node of a group of pairs moves."""

    def __init__(self, model: Model, layout: NodeLayout, batch: Batch, fix_attention: bool) -> None:
        self.model, self.layout, self.fix_attention = model, layout, fix_attention
        n, layers, group = len(batch), range(layout.n_layers), batch.pairs
        inner = [f"attn_{kind}@{layer}" for layer in layers for kind in ("q", "k", "v", "z")]
        written = [f"mlp_out@{layer}" for layer in layers]
        with torch.inference_mode():
            seen = batch.capture(torch.cat([group.clean, group.corrupt]), [ENTRY, *inner, *written])
            for layer in layers:
                seen[f"mlp_out@{layer}"] = mlp_write(model, layer, seen[f"mlp_out@{layer}"])
                if outer_norm(model, layer, "head") is not None:
                    z = seen[f"attn_z@{layer}"]
                    seen[f"heads@{layer}"] = head_writes(model, layer, z, range(layout.n_heads))
            self.moved = {site: value[:n] - value[n:] for site, value in seen.items()}
            self.ends: list[tuple[Attention, Attention]] = []
            if fix_attention:
                ends = (record_attention(model, tokens) for tokens in (group.clean, group.corrupt))
                self.ends = list(zip(*ends, strict=True))

    def along(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Effects [copies, nodes, pairs] for gradients [copies, pairs, pos, …] by site."""
        layout, found = self.layout, []
        found.append(torch.einsum("bpm,cbpm->cb", self.moved[ENTRY], gradients[ENTRY])[:, None])
        for layer in range(layout.n_layers):
            # A head writes a linear function of its values, unless a norm stands behind it.
            if f"heads@{layer}" in self.moved:
                at = gradients[write_site(self.model, layer, "head")]
                found.append(torch.einsum("bphm,cbpm->chb", self.moved[f"heads@{layer}"], at))
            else:
                site = f"attn_z@{layer}"
                found.append(torch.einsum("bphd,cbphd->chb", self.moved[site], gradients[site]))
            at = gradients[write_site(self.model, layer, "mlp")]
            found.append(torch.einsum("bpm,cbpm->cb", self.moved[f"mlp_out@{layer}"], at)[:, None])
        for layer in range(layout.n_layers):
            for kind in "qkv":
                if self.fix_attention and kind != "v":
                    found.append(torch.stack([self._exchanged(layer, kind, g) for g in gradients[f"attn_z@{layer}"]]))
                else:
                    site = f"attn_{kind}@{layer}"
                    found.append(torch.einsum("bphd,cbphd->chb", self.moved[site], gradients[site]))
        return torch.cat(found, 1).double()

    def _exchanged(self, layer: int, kind: str, gradient: Tensor) -> Tensor:
        """Effect [heads, pairs] of a layer's queries, or of its keys with all the heads that share them."""
        own, other = self.ends[layer]
        scores = own.scores_of(other.q, own.k) if kind == "q" else own.scores_of(own.q, other.k)
        effect = exchanged(own.scores, scores, own.slope(gradient)).sum(-1)
        shared = 1 if kind == "q" else self.layout.n_heads // self.layout.n_kv_heads
        return effect.unflatten(1, (-1, shared)).sum(2).T


def _gradients(
    model: Model, layout: NodeLayout, batch: Batch, metric: Metric, dropped: list[int | None]
) -> dict[str, Tensor]:
    """∂m/∂site [copies, pairs, pos, …] at the clean prompts, in each copy with what one layer writes held fixed."""
    copies, n = len(dropped), len(batch)
    added: dict[str, Tensor] = {}

    def probe(site: str) -> Edit:
        def edit(value: Tensor) -> Tensor:
            # The gradient of something added to a value is the gradient at the value.
            added[site] = torch.zeros_like(value).requires_grad_()
            return value + added[site]

        return edit

    def hold(layer: int) -> Edit:
        held = torch.tensor([layer == which for which in dropped]).repeat_interleave(n)[:, None, None]
        return lambda value: torch.where(held, value.detach(), value)

    edits: dict[str, Edit] = {ENTRY: probe(ENTRY)}
    for layer in range(layout.n_layers):
        for kind in "qkvz":
            edits[f"attn_{kind}@{layer}"] = probe(f"attn_{kind}@{layer}")
        for kind, site in (("head", f"attn_out@{layer}"), ("mlp", f"mlp_out@{layer}")):
            if any(which is not None for which in dropped):
                edits[site] = hold(layer)
            if kind == "mlp" or outer_norm(model, layer, "head") is not None:
                at = write_site(model, layer, kind)
                edits[at] = both(edits[at], probe(at)) if at in edits else probe(at)
    with torch.enable_grad():
        batch.value(metric, batch.pairs.clean.repeat(copies, 1), edits).sum().backward()
    found = {}
    for site, value in added.items():
        gradient = torch.zeros_like(value) if value.grad is None else value.grad
        found[site] = gradient.detach().unflatten(0, (copies, n))
    return found
