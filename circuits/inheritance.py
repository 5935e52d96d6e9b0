"""How much of what a circuit does the other model's parts would do as well: inherited, and so emergent and lost.

The metric m is the logit of what the successor says minus that of what the parent says, in the contexts of a behaviour
(where both say the same, its log-probability, signed so that the successor is ahead). For a node v of the successor,

    e(v) = m(S) − m(S with v at its mean)                                  what v does for the behaviour
    c(v) = m(S with v standing in) − m(S with v at its mean)               what its counterpart does in its place
    h(v) = min(1, max(0, Σ c / Σ e))                                       over contexts

with three forwards of the running model, no first-order estimate. What stands in is not the value that the parent's
node has in the parent, which differs already because something changed before it; it is what the parent's node makes of
the *successor's* stream (:func:`.components.read_stream`). So a node that passes on news by old rules is inherited, and
the node that made the news is not. Its deviation from its own mean over ordinary text is put in, on the successor's
mean: a node that does the same twice as strongly is half inherited, wherever both have their means.

The circuit of what S says are the nodes whose e(v) is above 0 (its 95 % interval is). Its emergence is the mean of
1 − h(v), weighted with e(v); inheritance is the rest. The embedding and the unembedding carry every behaviour, so they
count only as far as they changed. ``lost`` is the same with the models exchanged: the circuit of what P says, and what
the successor's nodes make of P's stream; exchanging the models exchanges the two numbers. RelIE (2509.05291) compares
effects in two models too, of zero-ablated latents, and of each in its own model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from heredity.interp.model import Edit, Model
from heredity.interp.readout import unembed

from .attribution import Prompts
from .components import Donor, Node, node_sites, read_stream, stream_sites
from .intervals import BOOTSTRAPS, Interval
from .writes import ENTRY, mlp_write, write_site

OUTER = ("embed", "unembed")


@dataclass(frozen=True)
class NodeInheritance:
    """One node of the circuit.

    Attributes:
        effect: e(v), units of the metric, mean over contexts.
        inherited: h(v); None where the effect cannot be told from 0.
    """

    node: Node
    effect: Interval
    inherited: Interval | None


@dataclass(frozen=True)
class Emergence:
    """One model's circuit and what of it the other does not have.

    Attributes:
        nodes: everything measured, in the order given.
        share: the circuit's emergence; None where no node has an effect above 0.
        circuit: its nodes.
    """

    nodes: tuple[NodeInheritance, ...]
    share: Interval | None
    circuit: tuple[Node, ...]

    def carriers(self, share: float) -> list[Node]:
        """The fewest nodes whose e·(1 − h) makes up ``share`` of all of it; of nothing new, none."""
        new = [
            (each.effect.estimate * (1 - each.inherited.estimate), each.node) for each in self.nodes if each.inherited
        ]
        new = sorted([pair for pair in new if pair[0] > 0], key=lambda pair: (-pair[0], pair[1]))
        summed = np.cumsum([value for value, _ in new])
        count = int(np.searchsorted(summed, share * summed[-1])) + 1 if new else 0
        return [node for _, node in new[:count]]


@dataclass(frozen=True)
class Means:
    """What nodes write on average over ordinary text, [d_model]; the unembedding: mean logits [d_vocab]."""

    own: dict[Node, Tensor]
    """Of the model itself."""
    other: dict[Node, Tensor]
    """Of the other model's nodes, reading this model's stream."""


StandIn = Callable[[Node], Tensor]
"""By what a node's counterpart deviates from its mean, [batch, pos, d_model] (the unembedding: [batch, d_vocab])."""


def mean_writes(model: Model, other: Model, batches: Sequence[tuple[Tensor, Tensor]], nodes: Sequence[Node]) -> Means:
    """Means over the real tokens of ``batches`` = (tokens, mask) [batch, pos]."""
    totals: tuple[dict[Node, Tensor], dict[Node, Tensor]] = ({}, {})
    count = 0
    for tokens, mask in batches:
        count += int(mask.sum())
        for total, (donor, final) in zip(totals, writes_of_both(model, other, tokens), strict=True):
            for node in nodes:
                with torch.inference_mode():
                    value = unembed(_model(donor), final)[mask] if node.kind == "unembed" else donor.write(node)[mask]
                    total[node] = total.get(node, 0) + value.double().sum(0)
    own, others = ({node: (value / count).float() for node, value in total.items()} for total in totals)
    return Means(own, others)


def emergence(
    model: Model, other: Model, prompts: Prompts, means: Means, nodes: Sequence[Node], seed: int
) -> Emergence:
    """What of ``model``'s circuit for what it says at ``prompts`` the ``other`` does not have.

    Args:
        model, other: the successor and the parent (or, for what is lost, the parent and the successor), of the same
            parameters.
        prompts: ``says_successor`` is what ``model`` says.
        means: of :func:`mean_writes`.
        nodes: the nodes measured.
        seed: of the bootstrap.
    """
    (own, final), (standing, _) = writes_of_both(model, other, prompts.tokens)
    bench = Bench(model, other, prompts)

    def deviation(donor: Donor, mean: dict[Node, Tensor]) -> StandIn:
        def of(node: Node) -> Tensor:
            if node.kind != "unembed":
                return donor.write(node) - mean[node]
            last = final[prompts.rows, prompts.last][:, None]
            return unembed(_model(donor), last)[:, 0] - mean[node]

        return of

    effects, carried = bench.effects(nodes, deviation(own, means.own), deviation(standing, means.other))
    return summarise(nodes, effects, carried, seed)


def exchanged(prompts: Prompts) -> Prompts:
    """The same contexts with the parent in the place of the successor."""
    return Prompts(prompts.tokens, prompts.last, prompts.says_parent, prompts.says_successor)


def summarise(nodes: Sequence[Node], effects: np.ndarray, carried: np.ndarray, seed: int) -> Emergence:
    """From e and c, [nodes, contexts] both, to shares with percentile bootstrap intervals over contexts."""
    e, c = resampled(effects, seed), resampled(carried, seed)
    held = _held(e, c)
    found = [NodeInheritance(node, *each) for node, each in zip(nodes, inherited(e, c), strict=True)]
    inside = np.array([each.inherited is not None for each in found])
    if not inside.any():
        return Emergence(tuple(found), None, ())
    inner = np.array([node.kind not in OUTER for node in nodes])
    share = _interval(_new(e[inside], held[inside], inner[inside]))
    return Emergence(tuple(found), share, tuple(each.node for each in found if each.inherited is not None))


def resampled(values: np.ndarray, seed: int) -> np.ndarray:
    """Means over all contexts, then over contexts drawn from them; [rows, contexts] → [rows, 1 + draws]."""
    n = values.shape[1]
    draws = np.random.default_rng(seed).integers(n, size=(BOOTSTRAPS, n))
    return np.concatenate([values.mean(1, keepdims=True), values[:, draws].mean(-1)], axis=1)


def inherited(effects: np.ndarray, carried: np.ndarray) -> list[tuple[Interval, Interval | None]]:
    """Of each row of :func:`resampled` e and c: e and h, the latter None where e cannot be told from 0."""
    found = []
    for effect, held in zip(map(_interval, effects), _held(effects, carried), strict=True):
        found.append((effect, _interval(held) if effect.low > 0 else None))
    return found


def _new(effects: np.ndarray, held: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """Σ e·(1 − h) / Σ e, of outer nodes only the new part below the line; [nodes, draws] → [draws]."""
    weight = np.maximum(effects, 0.0)
    new = weight * (1 - held)
    whole = np.where(inner[:, None], weight, new).sum(0)
    return np.divide(new.sum(0), whole, out=np.zeros_like(whole), where=whole > 0)


def _held(effects: np.ndarray, carried: np.ndarray) -> np.ndarray:
    return np.clip(np.divide(carried, effects, out=np.zeros_like(effects), where=effects > 0), 0.0, 1.0)


def _interval(draws: np.ndarray) -> Interval:
    low, high = np.quantile(draws[1:], [0.025, 0.975])
    return Interval(float(draws[0]), float(low), float(high))


# --- interventions ---


class Bench:
    """A model at the contexts of a behaviour, one node of it exchanged at a time."""

    def __init__(self, model: Model, other: Model, prompts: Prompts) -> None:
        self.model, self.prompts = model, prompts
        self.kept, self.at = prompts.last.unique(return_inverse=True)
        self.agree = prompts.says_successor == prompts.says_parent
        self.turn = torch.ones(len(prompts.last))
        own = self._logits(model)
        gap = self._score(own) - self._score(self._logits(other))
        # Where both say the same the model may be the less sure one: then that is what it does differently.
        self.turn = torch.where(self.agree & (gap < 0), -1.0, 1.0)
        self.base, self.own = self._score(own), own

    def effects(self, nodes: Sequence[Node], own: StandIn, standing: StandIn) -> tuple[np.ndarray, np.ndarray]:
        """e and c of every node, [nodes, contexts]."""
        effects, carried = [], []
        for node in nodes:
            deviation = own(node)
            ablated = self._without(node, deviation)
            effects.append(self.base - ablated)
            carried.append(self._without(node, deviation - standing(node)) - ablated)
        shape = (len(nodes), len(self.base))
        stacked = [torch.stack(rows).double().numpy() if rows else np.zeros(shape) for rows in (effects, carried)]
        return stacked[0], stacked[1]

    def _without(self, node: Node, part: Tensor) -> Tensor:
        """The metric [batch] with ``part`` taken off what ``node`` writes."""
        if node.kind == "unembed":
            return self._score(self.own - part)
        if not part.any():
            return self.base
        site = ENTRY if node.kind == "embed" else write_site(self.model, node.layer, node.kind)
        return self._score(self._logits(self.model, {site: lambda value: value - part}))

    def _logits(self, model: Model, edits: dict[str, Edit] | None = None) -> Tensor:
        with torch.inference_mode():
            logits = model.logits(self.prompts.tokens, edits=edits or {}, positions=self.kept)
        return logits[self.prompts.rows, self.at].float()

    def _score(self, at: Tensor) -> Tensor:
        rows, says, other = self.prompts.rows, self.prompts.says_successor, self.prompts.says_parent
        contrast = at[rows, says] - at[rows, other]
        return self.turn * torch.where(self.agree, torch.log_softmax(at, -1)[rows, says], contrast)


def writes_of_both(model: Model, other: Model, tokens: Tensor) -> Iterator[tuple[Donor, Tensor]]:
    """``model``'s own writes, then what ``other``'s nodes make of its stream; each with ``model``'s last residual."""
    wanted = [*node_sites(model), *(site for site in stream_sites(model) if site != ENTRY), "final"]
    with torch.inference_mode():
        seen = model.capture(tokens, wanted)
        final = seen.pop("final")
        stream = {site: seen[site] for site in stream_sites(model)}
        values = {site: seen[site] for site in node_sites(model)}
        for layer in range(model.shape.n_layers):
            values[f"mlp_out@{layer}"] = mlp_write(model, layer, values[f"mlp_out@{layer}"])
    yield Donor(values, model), final
    yield read_stream(other, tokens, stream), final


def _model(donor: Donor) -> Model:
    assert donor.model is not None
    return donor.model
