"""Why a head looks from one position to another: its score as a sum over pairs of nodes.

The score before the softmax is bilinear in what the head reads at the query and at the key,

    score = scale · q · k,    q = R_q (W_Q ln(x_q) + b_Q),    k = R_k (W_K ln(x_k) + b_K),

with R the rotations of the two positions. In the local replacement model x_q and x_k are sums over nodes (latents,
errors, tokens, at whatever positions; attention below is held fixed) and constants, so the score is the sum of

    scale · q_s · k_u

over all pairs of a node s that feeds the query and a node u that feeds the key ("QK attributions", Kamath et al. 2025,
"Tracing attention computation through feature interactions", transformer-circuits.pub/2025/attention-qk).

One letter means one dimension: S nodes, with the constants as one more, d width of a head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from heredity.interp.errors import ModelError

from .attribution_graph_frozen import TOLERANCE
from .attribution_graph_nodes import Sources
from .attribution_graph_recording import keep, recording
from .reads import projection

KINDS = ("latent", "error", "token", "constant")
_ROWS = 256


@dataclass(frozen=True)
class Contributor:
    """A node: ``kind`` one of :data:`KINDS`; ``index`` is the latent or the token id, −1 for others."""

    kind: str
    layer: int = -1
    position: int = -1
    index: int = -1


@dataclass(frozen=True, eq=False)
class AttentionScore:
    """A head's score for a query and a key, taken apart.

    Attributes:
        layer, head, query, key: which.
        score: the model's, before soft-capping, mask and softmax.
        total: the sum over all pairs.
        by_query: [S + 1], sums over keys' nodes, in the order of ``nodes``.
        by_key: [S + 1], sums over queries' nodes.
        nodes: int64 [S + 1, 4], (number of the kind, layer, position, index).
        pairs: (query's node, key's node, contribution) of the pairs with the largest, either sign, largest first.
    """

    layer: int
    head: int
    query: int
    key: int
    score: float
    total: float
    by_query: Tensor
    by_key: Tensor
    nodes: Tensor
    pairs: tuple[tuple[Contributor, Contributor, float], ...]


@torch.no_grad()
def attention_score(nodes: Sources, layer: int, head: int, query: int, key: int, *, top: int = 20) -> AttentionScore:
    """Take apart the score of ``head`` of ``layer`` for positions ``query`` and ``key``.

    Args:
        nodes: of :func:`.attribution_graph.sources_at`.
        layer, head, query, key: which; ``key`` ≤ ``query``.
        top: how many pairs are named.

    Raises:
        ValueError: there is no such head or pair of positions.
        ModelError: the scores of this architecture are no scaled products of rotated queries and keys.
    """
    model, frozen = nodes.frozen.model, nodes.frozen
    if not (0 <= layer < model.shape.n_layers and 0 <= head < model.shape.n_heads):
        shape = f"{model.shape.n_layers} layers and {model.shape.n_heads} heads"
        raise ValueError(f"no head {layer}.{head} in a model of {shape}")
    if not 0 <= key <= query < frozen.n_positions:
        raise ValueError(f"no query looks from position {query} of {frozen.n_positions} to {key}")
    shared = head * model.shape.n_kv_heads // model.shape.n_heads
    rotation, scores, scale = _scoring(nodes, layer, head, shared)
    sides = [
        _side(nodes, layer, kind, which, position, rotation)
        for kind, which, position in (("q", head, query), ("k", shared, key))
    ]
    q, k = sides
    pairs = _largest(q, k, scale, top)
    table = _table(nodes)
    return AttentionScore(
        layer=layer,
        head=head,
        query=query,
        key=key,
        score=float(scores[query, key]),
        total=float(scale * (q.sum(1) @ k.sum(1))),
        by_query=scale * (k.sum(1) @ q),
        by_key=scale * (q.sum(1) @ k),
        nodes=table,
        pairs=tuple((_named(table[i]), _named(table[j]), value) for i, j, value in pairs),
    )


def _side(nodes: Sources, layer: int, kind: str, head: int, position: int, rotation: Tensor | None) -> Tensor:
    """What each node, and last the constants, put into a rotated query or key, [d, S + 1]."""
    p, norm = projection(nodes.frozen.model, layer, kind), nodes.frozen.layers[layer].attention_norm
    weight, bias = p.weight[head], p.bias[head]
    if rotation is not None:
        weight, bias = weight @ rotation[position], bias @ rotation[position]
    at = torch.full((weight.shape[1],), position, device=weight.device)
    found, _ = nodes.rows(torch.full_like(at, layer), at, norm.backward(weight.T, at), before_attention=True)
    stream = next(at.value for at in nodes.constants() if (at.where, at.layer) == ("attention", layer))
    constant = norm.forward(stream)[position] @ weight + bias
    return torch.cat([found, constant[:, None]], 1).double()


def _scoring(nodes: Sources, layer: int, head: int, shared: int) -> tuple[Tensor | None, Tensor, float]:
    """Rotations [P, d, d] or None, the head's scores [P, P], and the factor from products to scores; checked."""
    model, tokens = nodes.frozen.model, nodes.frozen.tokens
    hook = f"blocks.{layer}.attn.hook_"
    rotary = hook + "rot_q" in model.bridge.hook_dict
    seen: dict[str, Tensor] = {}
    names = ["attn_scores", *(("rot_q", "rot_k", "cos", "sin") if rotary else ())]
    with recording(model, {hook + name: keep(seen, name) for name in names}):
        # To the end: recording tells whether every hook point was passed.
        _, at = model.logits_and_capture(tokens[None], [f"attn_q@{layer}", f"attn_k@{layer}"])
    q, k = at[f"attn_q@{layer}"][0, :, head].double(), at[f"attn_k@{layer}"][0, :, shared].double()
    rotation = None
    if rotary:
        rotation = _rotations(seen["cos"].double(), seen["sin"].double(), q.shape[1])
        turned = [torch.einsum("pd,pde->pe", side, rotation) for side in (q, k)]
        for ours, theirs in zip(turned, (seen["rot_q"][:, head], seen["rot_k"][:, shared]), strict=True):
            _same(nodes, ours, theirs.double(), "rotation")
        q, k = turned
    scores = seen["attn_scores"][head].double()
    cap = getattr(model.bridge.original_model.config, "attn_logit_softcapping", None)  # pyright: ignore
    if cap:  # Gemma 2
        scores = cap * (scores / cap).atanh()
    visible = torch.ones_like(scores, dtype=torch.bool).tril() & (scores > -1e30)
    products = (q @ k.T)[visible]
    scale = float((scores[visible] @ products) / products.square().sum())
    _same(nodes, scale * products, scores[visible], "scores")
    return None if rotation is None else rotation.to(nodes.errors.dtype), scores, scale


def _rotations(cos: Tensor, sin: Tensor, width: int) -> Tensor:
    """Rotary embedding as matrices acting on rows, [P, d, d]; dimensions beyond those of ``cos`` [P, r] stay."""
    r = cos.shape[-1]
    basis = torch.eye(width, dtype=cos.dtype, device=cos.device)
    turned = torch.cat([-basis[:, r // 2 : r], basis[:, : r // 2]], 1)
    out = basis.expand(len(cos), width, width).clone()
    out[:, :, :r] = basis[:, :r] * cos[:, None] + turned * sin[:, None]
    return out


def _same(nodes: Sources, ours: Tensor, theirs: Tensor, what: str) -> None:
    if not (ours - theirs).norm() <= TOLERANCE * theirs.norm():
        model = nodes.frozen.model
        raise ModelError(
            f"the {what} of this {model.shape.architecture} are not what plain queries and keys give, so a head's "
            "score cannot be taken apart",
            where=model.spec,
            remedy="Use an architecture without norms of queries and keys or position biases on attention scores.",
        )


def _largest(q: Tensor, k: Tensor, scale: float, top: int) -> list[tuple[int, int, float]]:
    """The pairs with the largest contributions of either sign."""
    found: list[tuple[int, int, float]] = []
    for first in range(0, q.shape[1], _ROWS):
        part = scale * (q[:, first : first + _ROWS].T @ k)
        best = part.abs().flatten().topk(min(top, part.numel())).indices.tolist()
        found += [(first + i // part.shape[1], i % part.shape[1], float(part.flatten()[i])) for i in best]
    return sorted((pair for pair in found if pair[2]), key=lambda pair: -abs(pair[2]))[:top]


def _table(nodes: Sources) -> Tensor:
    n_layers, n_positions = nodes.errors.shape[:2]
    every = torch.arange(n_positions, device=nodes.errors.device)
    errors = torch.cartesian_prod(torch.arange(n_layers, device=every.device), every).view(-1, 2)
    minus = torch.full_like(every, -1)
    return torch.cat(
        [
            torch.cat([torch.zeros_like(nodes.latents[:, :1]), nodes.latents], 1),
            torch.cat([torch.ones_like(errors[:, :1]), errors, minus.repeat(n_layers)[:, None]], 1),
            torch.stack([torch.full_like(every, 2), minus, every, nodes.frozen.tokens], 1),
            torch.tensor([[3, -1, -1, -1]], device=every.device),
        ]
    )


def _named(row: Tensor) -> Contributor:
    kind, layer, position, index = row.tolist()
    return Contributor(KINDS[kind], layer, position, index)
