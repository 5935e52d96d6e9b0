"""Where in the successor its divergence from the parent sits: whole sites exchanged, one at a time."""

import torch
from torch import Tensor

from heredity.interp.model import Model

from .components import Node, nodes_of, patched_logits, run_donor
from .writes import check_additive


def site_shares(parent: Model, successor: Model, tokens: Tensor, mask: Tensor) -> dict[str, float]:
    """Share of Σ KL(S‖P) over the real tokens [batch, pos] that closes when the parent's values are put in at a site.

    Sites are ``embed``, ``attn_out@L`` (all heads), ``mlp_out@L`` and ``unembed``. What one site reads comes from
    others, so shares overlap and need not add up to 1; a share below 0 means that the exchange alone does harm.

    Raises:
        ModelError: the successor's architecture has parts that cannot be exchanged one by one.
    """
    check_additive(successor)
    sites: dict[str, list[Node]] = {}
    for node in nodes_of(successor):
        sites.setdefault(f"attn_out@{node.layer}" if node.kind == "head" else str(node), []).append(node)
    with torch.inference_mode():
        target = parent.logits(tokens).float().log_softmax(-1)
        donor = run_donor(parent, tokens)

        def left(nodes: list[Node]) -> float:
            own = patched_logits(successor, tokens, nodes, donor).float().log_softmax(-1)
            size = min(own.shape[-1], target.shape[-1])
            kl = (own[..., :size].exp() * (own[..., :size] - target[..., :size])).sum(-1).clamp_min(0)
            return float(kl[mask].double().sum())

        whole = left([])
        return {site: 1 - left(nodes) / whole if whole else 0.0 for site, nodes in sites.items()}
