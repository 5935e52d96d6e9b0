"""One attribution graph of several prompts.

A latent is one node whatever the prompt. Positions are dropped, or kept as roles: names given to the positions of each
prompt, so that "the subject" is one place although it stands elsewhere. Within a prompt, what falls together is added
up; over prompts it is averaged, a node that a prompt lacks counting as zero there. Every row still adds up to what it
reads. Roots of a merged graph are no longer exact, because a mean of products is not the product of means.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .attribution_graph_record import AttributionGraph, Kept

EVERYWHERE = "any position"


def merge(graphs: Sequence[AttributionGraph], roles: Sequence[Sequence[str]] | None = None) -> AttributionGraph:
    """One graph of ``graphs``.

    Args:
        graphs: of one model.
        roles: for each graph a name for each of its positions; positions are dropped if None. Tokens are nodes by
            token id without roles, by role with them.

    Raises:
        ValueError: no graphs, graphs of different models, or roles that do not fit them.
    """
    _check(graphs, roles)
    names = [(EVERYWHERE,) * len(g.places) for g in graphs] if roles is None else [tuple(r) for r in roles]
    end = names[0][-1]  # where the targets are
    places = (*dict.fromkeys(name for named in names for name in named if name != end), end)
    where = [torch.tensor([places.index(name) for name in named], dtype=torch.int64) for named in names]

    latents, latent_of = _union([_moved(g.latents, 1, at) for g, at in zip(graphs, where, strict=True)])
    errors, error_of = _union([_moved(g.errors, 1, at) for g, at in zip(graphs, where, strict=True)])
    tokens, token_of = _tokens(graphs, where, by_role=roles is not None)
    labels = tuple(dict.fromkeys(label for g in graphs for label in g.logits))
    ids = {label: token for g in graphs for label, token in zip(g.logits, g.logit_tokens, strict=True)}
    logit_of = [torch.tensor([labels.index(label) for label in g.logits]) for g in graphs]

    n, m = len(latents), len(errors)
    weights = graphs[0].weights.new_zeros(n + len(labels), n + m + len(tokens))
    about = torch.zeros(n + len(labels), 4, dtype=torch.float64)  # what is read, constants, dropped twice
    logit_weights = torch.zeros(len(labels), dtype=torch.float64)
    for i, g in enumerate(graphs):
        rows = torch.cat([latent_of[i], n + logit_of[i]])
        columns = torch.cat([latent_of[i], n + error_of[i], n + m + token_of[i]])
        folded = g.weights.new_zeros(len(g.weights), weights.shape[1]).index_add_(1, columns, g.weights)
        weights.index_add_(0, rows, folded / len(graphs))
        own = torch.stack([g.read, g.constant, g.dropped[:, 0], g.dropped[:, 1]], 1).double()
        about.index_add_(0, rows, own / len(graphs))
        logit_weights.index_add_(0, logit_of[i], g.logit_weights / len(graphs))
    read, constant, dropped = about[:, 0], about[:, 1], about[:, 2:]
    return AttributionGraph(
        prompt=" | ".join(g.prompt for g in graphs),
        places=places,
        n_layers=graphs[0].n_layers,
        latents=latents,
        activations=read[:n].to(weights.dtype),
        errors=errors,
        tokens=tokens,
        logits=labels,
        logit_tokens=tuple(ids[label] for label in labels),
        logit_weights=logit_weights,
        weights=weights,
        read=read.to(weights.dtype),
        constant=constant.to(weights.dtype),
        dropped=dropped.to(weights.dtype),
        kept=_kept([g.kept for g in graphs], n),
        provenance={**graphs[0].provenance, "merged": [g.prompt for g in graphs]},
        explained={which: known for g in graphs for which, known in g.explained.items()},
    )


def _check(graphs: Sequence[AttributionGraph], roles: Sequence[Sequence[str]] | None) -> None:
    if not graphs:
        raise ValueError("there are no graphs to merge")
    models = {(g.n_layers, g.provenance.get("model_digest"), str(g.provenance.get("dictionaries"))) for g in graphs}
    if len(models) > 1:
        raise ValueError("graphs of different models or dictionaries cannot be merged")
    if roles is not None and [len(r) for r in roles] != [len(g.places) for g in graphs]:
        raise ValueError("roles must name every position of every graph")
    if roles is not None and len({r[-1] for r in roles}) > 1:
        raise ValueError("roles must give the last position, where the targets are, one name in all graphs")


def _moved(nodes: Tensor, column: int, place_of: Tensor) -> Tensor:
    out = nodes.clone()
    out[:, column] = place_of[nodes[:, column]]
    return out


def _union(parts: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The different rows of all ``parts``, ascending, and which of them each row of each part is."""
    found, inverse = torch.cat(list(parts)).unique(dim=0, return_inverse=True)
    return found, list(inverse.split([len(part) for part in parts]))


def _tokens(graphs: Sequence[AttributionGraph], where: Sequence[Tensor], by_role: bool) -> tuple[Tensor, list[Tensor]]:
    parts = [_moved(g.tokens, 1, at) for g, at in zip(graphs, where, strict=True)]
    if by_role:
        every = torch.cat(parts)
        for place in every[:, 1].unique().tolist():
            if len(every[every[:, 1] == place, 0].unique()) > 1:
                for part in parts:
                    part[part[:, 1] == place, 0] = -1
    found, which = _union([part.flip(1) for part in parts])  # in order of place
    return found.flip(1), which


def _kept(parts: Sequence[Kept], nodes: int) -> Kept:
    n = len(parts)
    return Kept(
        active=sum(part.active for part in parts),
        nodes=nodes,
        unranked=sum(part.unranked for part in parts),
        unranked_share=sum(part.unranked_share for part in parts) / n,
        dropped_share=sum(part.dropped_share for part in parts) / n,
        reason="; ".join(dict.fromkeys(part.reason for part in parts if part.reason)),
    )
