"""The other two causal checks of a circuit: what it gives to the parent, and what taking it out costs elsewhere.

**Transplant**: the parent runs with the successor's nodes in the place of its own, each reading the parent's stream as
it has become by then. So the parent is given the machinery, not the answer: a late node's *value* in the successor
already holds what every node before it found out, and would show the behaviour in any model. The share of the gap is
1 − KL(S ‖ P with the nodes) / KL(S ‖ P) at the contexts of the behaviour.

**Side effects**: KL(S ‖ S with the circuit reverted) per token of ordinary text in which the behaviour does not show.

Both stand beside random sets of as many nodes of the same kinds. B contexts.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from heredity.interp.model import Edit, Model
from heredity.interp.readout import unembed

from .attribution import Prompts
from .components import Donor, Node, patched_logits, run_donor, stream_sites
from .intervals import Interval, ratio
from .writes import ENTRY, both, head_writes, mlp_write, write_site


@dataclass(frozen=True)
class Checked:
    """A measurement of a set of nodes, and of random sets."""

    own: Interval
    controls: tuple[float, ...]


def transplant(
    parent: Model,
    successor: Model,
    prompts: Prompts,
    nodes: Collection[Node],
    controls: Sequence[Collection[Node]],
    seed: int,
) -> Checked:
    """Share of the gap that ``nodes`` of ``successor`` close in ``parent``, with its interval over contexts."""
    target = log_probs(at_last(successor, prompts, {}))
    base = divergence(target, log_probs(at_last(parent, prompts, {})))

    def left(some: Collection[Node]) -> np.ndarray:
        return divergence(target, log_probs(installed(parent, successor, prompts, some)))

    gained = ratio(base - left(nodes), base, seed)
    return Checked(gained, tuple(float(1 - left(some).sum() / base.sum()) for some in controls))


def installed(model: Model, donor: Model, prompts: Prompts, nodes: Collection[Node]) -> Tensor:
    """Logits [B, d_vocab] of ``model`` at the contexts with ``donor``'s ``nodes``, reading this run's stream, in the
    place of its own.

    Node by node, first to last: what comes before is settled when a node reads it.
    """
    tokens = prompts.tokens
    edits: dict[str, Edit] = {}
    stages: dict[tuple[int, str], list[int]] = {}
    for node in sorted(nodes):
        stages.setdefault((node.layer, node.kind), []).append(node.head)
    with torch.inference_mode():
        for (layer, kind), heads in sorted(stages.items()):
            if kind == "embed":
                embedded = donor.capture(tokens, [ENTRY])[ENTRY]
                edits[ENTRY] = lambda _, embedded=embedded: embedded
            elif kind in ("head", "mlp"):
                change = _difference(model, donor, tokens, layer, kind, heads, edits)
                site = write_site(model, layer, kind)
                add = _adding(change)
                edits[site] = both(edits[site], add) if site in edits else add
        if (model.shape.n_layers, "unembed") in stages:
            final = model.capture(tokens, ["final"], edits=edits)["final"][prompts.rows, prompts.last]
            return unembed(donor, final[:, None])[:, 0]
        return at_last(model, prompts, edits)


def side_effects(
    successor: Model,
    batches: Sequence[tuple[Tensor, Tensor]],
    donors: Sequence[Donor],
    nodes: Collection[Node],
    controls: Sequence[Collection[Node]],
    seed: int,
) -> Checked:
    """KL(S ‖ S with ``nodes`` exchanged), nats per token, mean over the texts of ``batches`` = (tokens, mask).

    Args:
        successor: S.
        batches: ordinary text, [batch, pos].
        donors: what is put in, one for each batch (:func:`.components.run_donor` of the parent, or means).
        nodes: the circuit.
        controls: random sets.
        seed: of the bootstrap, over texts.
    """
    with torch.inference_mode():
        own = [successor.logits(tokens).float().log_softmax(-1) for tokens, _ in batches]

    def moved(some: Collection[Node]) -> tuple[np.ndarray, np.ndarray]:
        sums, counts = [], []
        for (tokens, mask), donor, before in zip(batches, donors, own, strict=True):
            with torch.inference_mode():
                after = patched_logits(successor, tokens, some, donor).float().log_softmax(-1)
                size = min(before.shape[-1], after.shape[-1])
                kl = (before[..., :size].exp() * (before[..., :size] - after[..., :size])).sum(-1).clamp_min(0)
            sums.append((kl * mask).sum(1))
            counts.append(mask.sum(1))
        return torch.cat(sums).double().numpy(), torch.cat(counts).double().numpy()

    of_circuit = ratio(*moved(nodes), seed)
    return Checked(of_circuit, tuple(float(s.sum() / n.sum()) for s, n in map(moved, controls)))


def parents_values(parent: Model, batches: Sequence[tuple[Tensor, Tensor]]) -> list[Donor]:
    """``parent``'s values on the tokens of every batch."""
    return [run_donor(parent, tokens) for tokens, _ in batches]


def _difference(
    model: Model, donor: Model, tokens: Tensor, layer: int, kind: str, heads: Sequence[int], edits: dict[str, Edit]
) -> Tensor:
    """What ``donor``'s heads or MLP of a layer write when they read ``model``'s stream, less what ``model``'s do."""
    value = f"{'attn_z' if kind == 'head' else 'mlp_out'}@{layer}"
    middle = f"resid_mid@{layer}"
    read = middle if kind == "mlp" and middle in stream_sites(model) else f"resid_pre@{layer}"
    seen = model.capture(tokens, [read, value], edits=edits)
    theirs = donor.capture(tokens, [value], edits={read: lambda _: seen[read]})[value]
    if kind == "mlp":
        return mlp_write(donor, layer, theirs) - mlp_write(model, layer, seen[value])
    return (head_writes(donor, layer, theirs, heads) - head_writes(model, layer, seen[value], heads)).sum(2)


def _adding(change: Tensor) -> Edit:
    return lambda value: value + change


def at_last(model: Model, prompts: Prompts, edits: dict[str, Edit]) -> Tensor:
    """Logits [B, d_vocab] at the contexts."""
    with torch.inference_mode():
        kept, at = prompts.last.unique(return_inverse=True)
        return model.logits(prompts.tokens, edits=edits, positions=kept)[prompts.rows, at]


def log_probs(logits: Tensor) -> Tensor:
    """Log-probabilities in float32."""
    return torch.log_softmax(logits.float(), -1)


def divergence(target: Tensor, log_q: Tensor) -> np.ndarray:
    """KL(target ‖ q) [B], nats, over the tokens that both have."""
    size = min(target.shape[1], log_q.shape[1])
    kl = (target[:, :size].exp() * (target[:, :size] - log_q[:, :size])).sum(-1)
    return kl.clamp_min(0).double().numpy()
