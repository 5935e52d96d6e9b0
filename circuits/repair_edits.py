"""Edits of the successor's weights that take a behaviour back: restore the parent's maps, or overwrite nodes' writes.

*Restore* makes the changed linear maps the parent's on the part of their input that the behaviour uses
(:mod:`.subspace`). *Overwrite* is also for models whose parts do not correspond: the output matrices of the circuit's
nodes are changed so that, on the inputs the behaviour gives them, they write what the parent's node wrote, or the
node's mean over ordinary text, with the least change of what they write on ordinary text (closed form: Meng et al.,
2210.07229, eq. 14, with our keys and values).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heredity.interp.errors import ModelError
from heredity.interp.model import Model

from .attribution import Prompts
from .components import Donor, Node, gradients, run_donor
from .linear import Factors, edited_weights, inputs, inputs_and_slopes, matrix
from .subspace import RIDGE, Subspace, excited, random, rotated
from .weights import parameters
from .writes import head_writes, outer_norm

MOST = 48
"""Directions kept per map."""


@dataclass(frozen=True)
class Restorable:
    """One map that the successor changed: ΔW = W_S − W_P [d_out, d_in], and the input directions to restore."""

    change: Tensor
    subspace: Subspace
    effect: float
    """First-order estimate of what ΔW does to the behaviour's metric, summed over contexts."""

    def factors(self, rank: int) -> Factors:
        """The edit −ΔW·Π for the first ``rank`` directions, at most half of the input's."""
        carries, reads = self.subspace.projector(min(rank, max(1, self.change.shape[1] // 2)))
        return -(self.change.double() @ carries), reads


def restorable(
    parent: Model,
    successor: Model,
    modules: Mapping[str, nn.Module],
    modules_parent: Mapping[str, nn.Module],
    prompts: Prompts,
    moments: Mapping[str, Tensor],
) -> dict[str, Restorable]:
    """The changed maps among ``modules`` (of the successor) that ``prompts`` pass through.

    Tokens weigh as much as the change is expected to matter there: |gᵀ ΔW x|, x the parent's input, g the gradient of
    logit(what S says) − logit(what P says) at the output, averaged over the two models.
    """
    own, other = parameters(successor), parameters(parent)
    changed = {name: m for name, m in modules.items() if name in other and not torch.equal(own[name], other[name])}
    metric = prompts.metric()
    _, _, slopes_s = inputs_and_slopes(successor, changed, prompts.tokens, metric)
    _, given, slopes_p = inputs_and_slopes(
        parent, {name: modules_parent[name] for name in changed}, prompts.tokens, metric
    )
    mask = torch.arange(prompts.tokens.shape[1])[None, :] <= prompts.last[:, None]
    found = {}
    for name, module in changed.items():
        if name not in slopes_s or name not in slopes_p:
            continue
        change = matrix(module, own[name] - other[name])
        slope = (slopes_s[name] + slopes_p[name]) / 2
        acts = torch.einsum("bpo,oi,bpi->bp", slope, change, given[name])[mask]
        if acts.abs().max() > 0:
            space = excited(given[name][mask], acts.abs() / acts.abs().sum(), moments[name], MOST)
            found[name] = Restorable(change, space, float(acts.sum()))
    return found


def random_restoration(
    maps: Mapping[str, Restorable], moments: Mapping[str, Tensor], ranks: Mapping[str, int], seed: int
) -> dict[str, Factors]:
    """The control: as many directions restored in the same maps, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, rank in ranks.items():
        space = random(moments[name], rank, generator)
        out[name] = (-(maps[name].change.double() @ space.carries), space.reads)
    return out


@dataclass(frozen=True)
class Output:
    """Where a node writes: columns ``start`` to ``stop`` of the weight ``name``."""

    node: Node
    name: str
    start: int
    stop: int


def outputs(successor: Model, modules: Mapping[str, nn.Module], nodes: Sequence[Node]) -> list[Output]:
    """The output matrices of the heads and MLPs among ``nodes``, in the order of the computation.

    Raises:
        ModelError: none of them has one that can be edited.
    """
    names = {id(module): name for name, module in modules.items()}
    width = successor.shape.d_head
    found = []
    for node in sorted(nodes):
        if node.kind not in ("head", "mlp") or outer_norm(successor, node.layer, node.kind) is not None:
            continue
        block = successor.bridge.blocks[node.layer]
        part = block.attn.o if node.kind == "head" else getattr(block.mlp, "_modules", {}).get("out")
        module = getattr(part, "original_component", part)
        if id(module) in names:
            start, stop = (node.head * width, (node.head + 1) * width) if node.kind == "head" else (0, -1)
            name = names[id(module)]
            found.append(Output(node, name, start, stop if stop >= 0 else matrix_width(successor, modules, name)))
    if not found:
        raise ModelError(
            "none of the circuit's parts has an output matrix that could be edited",
            where=successor.spec,
            remedy="Repair models of an architecture with plain residual blocks.",
        )
    return found


def matrix_width(model: Model, modules: Mapping[str, nn.Module], name: str) -> int:
    """d_in of a weight."""
    return matrix(modules[name], parameters(model)[name]).shape[1]


def overwriting(
    parent: Model,
    successor: Model,
    modules: Mapping[str, nn.Module],
    places: Sequence[Output],
    prompts: Prompts,
    moments: Mapping[str, Tensor],
    means: Donor | None,
    strength: float,
) -> dict[str, Factors]:
    """Edits after which the nodes at ``places`` write the parent's values (or ``means``) on ``prompts``.

    ``strength`` weighs the behaviour's tokens against ordinary ones. Later nodes are edited for the inputs that they
    get once the earlier ones are.
    """
    donor = means or run_donor(parent, prompts.tokens)
    mask = torch.arange(prompts.tokens.shape[1])[None, :] <= prompts.last[:, None]
    _, _, slopes = gradients(successor, prompts.tokens, prompts.metric())
    changes: dict[str, Factors] = {}
    for place in places:
        with edited_weights(successor, modules, changes):
            given = inputs(successor, {place.name: modules[place.name]}, prompts.tokens)[place.name]
            own = _write(successor, place.node, given, prompts.tokens)
        wanted = _target(donor, place.node).expand_as(own) - own
        kind = "attn_out" if place.node.kind == "head" else "mlp_out"
        weight = (wanted * slopes[f"{kind}@{place.node.layer}"]).sum(-1).abs()[mask].double()
        if not weight.max() > 0:
            continue
        keys, values = given[..., place.start : place.stop][mask].double(), wanted[mask].double()
        ordinary = moments[place.name][place.start : place.stop, place.start : place.stop]
        left, right = _least_squares(keys, values, weight / weight.sum(), ordinary, strength)
        whole = torch.zeros(len(moments[place.name]), right.shape[1], dtype=right.dtype)
        whole[place.start : place.stop] = right
        before = changes.get(place.name)
        changes[place.name] = (
            (left, whole) if before is None else (torch.cat([before[0], left], 1), torch.cat([before[1], whole], 1))
        )
    return changes


def random_overwriting(changes: Mapping[str, Factors], moments: Mapping[str, Tensor], seed: int) -> dict[str, Factors]:
    """The control: the same writes, on inputs drawn at random that are as large on ordinary text."""
    generator = torch.Generator().manual_seed(seed)
    return {name: (left, rotated(right, moments[name], generator)) for name, (left, right) in changes.items()}


def _write(model: Model, node: Node, given: Tensor, tokens: Tensor) -> Tensor:
    """What ``node`` writes, given its output projection's input."""
    if node.kind == "head":
        z = given.unflatten(-1, (model.shape.n_heads, model.shape.d_head))
        return head_writes(model, node.layer, z, [node.head])[:, :, 0]
    with torch.inference_mode():
        return model.capture(tokens, [f"mlp_out@{node.layer}"])[f"mlp_out@{node.layer}"]


def _target(donor: Donor, node: Node) -> Tensor:
    return donor.head_writes(node.layer, [node.head]) if node.kind == "head" else donor.values[f"mlp_out@{node.layer}"]


def _least_squares(keys: Tensor, values: Tensor, weight: Tensor, ordinary: Tensor, strength: float) -> Factors:
    """Δ = V K^T (C/s + K K^T)^-1 with weighted tokens as left·rightᵀ, cut where singular values no longer count."""
    c = ordinary.double()
    c = c + RIDGE * c.diagonal().mean().clamp_min(1e-30) * torch.eye(len(c), dtype=c.dtype)
    scaled = keys * weight[:, None]
    change = torch.linalg.solve(c / strength + scaled.T @ keys, scaled.T @ values).T
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    kept = max(1, int((s > s[0] * 1e-4).sum()))
    return u[:, :kept] * s[:kept], vh[:kept].T
