"""Attribution graphs: how the latents of transcoders (or SAEs) at one prompt make one another and the next token.

The method of Ameisen et al. 2025, "Circuit tracing: revealing computational graphs in language models"
(transformer-circuits.pub/2025/attribution-graphs/methods.html), with the conventions of decoderesearch/circuit-tracer:
exact linear direct effects in the local replacement model (:mod:`.replacement`), node by node
(:mod:`.attribution_graph_nodes`), latents chosen by their influence on the targets (:mod:`.influence`).

What makes it quick: targets near in position go through the model together, each joining at its own layer, and the
gradient is carried only over the layers below and the positions before them; it passes attention as three matrix
products.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from heredity.interp.dictionaries.record import Dictionary, DictionarySet
from heredity.interp.dictionaries.splicing import layers_of
from heredity.interp.model import Model

from .attribution_graph_memory import BUFFER_SHARE, Memory, estimate, room
from .attribution_graph_nodes import Sources, frozen_mlps, sources
from .attribution_graph_record import AttributionGraph, Explained, Kept
from .attribution_graph_rows import Rows
from .attribution_graph_targets import Target, salient_logits
from .replacement import Frozen, freeze

AT_ONCE = 512
"""Latents explained together at most."""
ROUNDS = 8
"""Rankings of latents that have no row yet, where not all get one: a latent without a direct effect on a target ranks
only once latents that it feeds have theirs."""

Targets = Sequence[Target] | Callable[[Model, Tensor], Sequence[Target]]


@torch.no_grad()
def attribution_graph(
    model: Model,
    dictionaries: Dictionary | DictionarySet,
    prompt: str | Sequence[int] | Tensor,
    *,
    targets: Targets = salient_logits,
    max_latents: int = 7500,
    constant_positions: int = 0,
    budget: int = 2 << 30,
    progress: Callable[[int, int], None] | None = None,
) -> AttributionGraph:
    """The attribution graph of ``targets`` at the last position of ``prompt``.

    Args:
        model: the model.
        dictionaries: transcoders (skip, cross-layer) or SAEs of MLP outputs. In layers without one, all of the MLP's
            output is an error node.
        prompt: text, or token ids.
        targets: what is explained, or a function of the model and the last position's logits [V].
        max_latents: nodes among the active latents, most influential first; the published value.
        constant_positions: at so many positions from the first, MLP outputs are constants rather than nodes
            (circuit-tracer always leaves out one, the beginning-of-text token).
        budget: bytes for the graph and what computing it needs (:func:`memory`), beside model and dictionaries.
            Latents are left out, and counted, where it does not suffice. Large attention patterns go into a temporary
            file. The model's own forward is not counted: its attention takes some 4·H·P² numbers at a time.
        progress: called with latents explained and to explain.

    Raises:
        ModelError: the architecture is not supported, or the frozen model does not compute what the model computes.
        DictionaryError: a dictionary does not fit.
        ValueError: an empty prompt, no targets, or a budget too small for any latent.
    """
    nodes = sources_at(model, dictionaries, prompt, constant_positions=constant_positions, budget=budget)
    frozen = nodes.frozen
    chosen = list(targets(model, frozen.logits) if callable(targets) else targets)
    if not chosen:
        raise ValueError("an attribution graph needs a target")

    total = nodes.n_latents
    need = estimate(model.shape, n_tokens=frozen.n_positions, active=total, latents=0, dictionaries=len(nodes.active))
    wanted, ranked, reason = room(total, nodes.n_columns - total, max_latents, len(chosen), need.left(budget))
    unranked_share = 0.0
    if ranked < total:
        nodes, unranked_share = _most_effective(nodes, chosen, ranked)
    rows = Rows(nodes, chosen, wanted, lambda cone: _at_once(frozen, cone, budget // BUFFER_SHARE))
    dropped_share = _explain(rows, progress)
    kept = Kept(total, wanted, total - nodes.n_latents, unranked_share, dropped_share, reason)
    return _record(rows, kept, prompt if isinstance(prompt, str) else model.decode(frozen.tokens.tolist()))


@torch.no_grad()
def sources_at(
    model: Model,
    dictionaries: Dictionary | DictionarySet,
    prompt: str | Sequence[int] | Tensor,
    *,
    constant_positions: int = 0,
    budget: int = 2 << 30,
) -> Sources:
    """The local replacement model at a prompt, and what writes to its stream.

    Args and errors raised are those of :func:`attribution_graph`.
    """
    ids = _ids(model, prompt)
    need = estimate(model.shape, n_tokens=len(ids), active=0, latents=0)
    frozen = freeze(model, ids, mlps=frozen_mlps(dictionaries), on_disk=need.on_disk(budget))
    return sources(frozen, dictionaries, constant_positions)


def memory(
    model: Model, dictionaries: Dictionary | DictionarySet, n_tokens: int, per_token: int, latents: int
) -> Memory:
    """What a graph would need, before anything is computed.

    Args:
        model, dictionaries: as of :func:`attribution_graph`.
        n_tokens: length of the prompt.
        per_token: active latents per position, all layers together.
        latents: how many of them become nodes, at most.
    """
    active = per_token * n_tokens
    n = len(layers_of(dictionaries))
    return estimate(model.shape, n_tokens=n_tokens, active=active, latents=min(latents, active), dictionaries=n)


def _ids(model: Model, prompt: str | Sequence[int] | Tensor) -> Tensor:
    ids = model.encode(prompt).ids if isinstance(prompt, str) else prompt
    ids = torch.as_tensor(ids, dtype=torch.int64)
    if ids.ndim != 1 or not len(ids):
        raise ValueError("an attribution graph needs the token ids of one prompt")
    return ids


def _explain(rows: Rows, progress: Callable[[int, int], None] | None) -> float:
    """Fill in all rows, most influential latents first; the share of influence on latents that have none."""
    n, wanted = rows.nodes.n_latents, rows.wanted
    rows.explain_targets()
    if wanted == n:
        rows.explain(torch.arange(n), progress)
        return 0.0
    while rows.done < wanted:
        ranked = rows.influence()[:n].argsort(descending=True, stable=True)
        todo = min(-(-wanted // ROUNDS), wanted - rows.done)
        rows.explain(ranked[~rows.visited[ranked]][:todo].sort().values, progress)
    found = rows.influence()[:n]
    return float(found[~rows.visited].sum() / found.sum()) if found.sum() > 0 else 0.0


def _most_effective(nodes: Sources, targets: Sequence[Target], n: int) -> tuple[Sources, float]:
    """Only the ``n`` latents with the largest total effects as columns, and the share of the others."""
    effects = torch.zeros(nodes.n_latents, dtype=torch.float64, device=nodes.errors.device)
    last = torch.tensor([nodes.frozen.n_positions - 1], device=effects.device)
    for target in targets:
        at_stream = nodes.frozen.final.backward(target.direction.to(nodes.errors)[None], last)[0]
        effects += target.weight * nodes.total_effects(at_stream).abs().double()
    kept = torch.zeros(len(effects), dtype=torch.bool, device=effects.device)
    kept[effects.topk(n).indices] = True
    return nodes.keeping(kept), float(effects[~kept].sum() / effects.sum().clamp_min(1e-300))


def _at_once(frozen: Frozen, cone: int, size: int) -> int:
    """How many targets that need ``cone`` positions can be taken together in ``size`` bytes."""
    width = max(frozen.embedded.shape[1], len(frozen.layers[0].output))
    return max(1, min(AT_ONCE, size // (4 * cone * width * frozen.embedded.element_size())))


def _record(rows: Rows, kept: Kept, prompt: str) -> AttributionGraph:
    nodes, frozen, targets = rows.nodes, rows.nodes.frozen, rows.targets
    model, n_layers, device = frozen.model, len(frozen.layers), frozen.tokens.device
    latents, weights, dropped = rows.finished()
    positions = torch.arange(frozen.n_positions, device=device)
    logits = torch.stack([target.direction.to(frozen.last) @ frozen.last + target.bias for target in targets])
    return AttributionGraph(
        prompt=prompt,
        places=tuple(model.decode([token]) for token in frozen.tokens.tolist()),
        n_layers=n_layers,
        latents=nodes.latents[latents],
        activations=nodes.activations[latents],
        errors=torch.cartesian_prod(torch.arange(n_layers, device=device), positions).view(-1, 2),
        tokens=torch.stack([frozen.tokens, positions], 1),
        logits=tuple(target.label for target in targets),
        logit_tokens=tuple(-1 if target.token is None else target.token for target in targets),
        logit_weights=torch.tensor([target.weight for target in targets], dtype=torch.float64, device=device),
        weights=weights,
        read=torch.cat([nodes.activations[latents], logits]),
        constant=rows.constants(latents),
        dropped=dropped,
        kept=kept,
        provenance={
            "model": model.spec,
            "model_digest": model.digest,
            "vocabulary": model.shape.d_vocab,
            "dictionaries": [
                {"layer": a.layer, "reads": a.kind, **dict(a.dictionary.provenance)} for a in nodes.active
            ],
        },
        explained=_explained(nodes, nodes.latents[latents]),
    )


def _explained(nodes: Sources, latents: Tensor) -> dict[tuple[int, int], Explained]:
    """What dictionaries that have notes say of ``latents`` [n, 3]."""
    found = {}
    for a in nodes.active:
        if a.dictionary.notes is not None:
            for number in latents[latents[:, 0] == a.layer, 2].unique().tolist():
                latent = a.dictionary.latents[number]
                if latent.rule:
                    found[a.layer, number] = Explained(latent.rule, latent.q)
    return found
