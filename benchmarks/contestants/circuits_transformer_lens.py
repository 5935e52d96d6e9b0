"""``attribution_patch`` of TransformerLens, at one gradient, for ``circuits_worker.py``."""

from collections.abc import Callable

import numpy as np
import torch

from heredity.interp.load import load


def tasks(directory: str, data: dict) -> dict[str, Callable[[], dict[str, np.ndarray]]]:
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, Node, attribution_patch

    model = load(directory)
    bridge, shape = model.bridge, model.shape
    # It needs a graph to begin somewhere; the earliest place is enough.
    bridge.original_model.get_input_embeddings().weight.requires_grad_(True)
    sources = ["embed"]
    for layer in range(shape.n_layers):
        sources += [f"attn_head_out@{layer}.{h}" for h in range(shape.n_heads)] + [f"mlp_out@{layer}"]

    def name(node: Node) -> str:
        if node.kind in ("embed", "logits"):
            return node.kind
        place = node.layer if node.head is None else f"{node.layer}.{node.head}"
        kind = {"q_input": "attn_q", "k_input": "attn_k", "v_input": "attn_v"}.get(node.kind, node.kind)
        return f"{kind}@{place}"

    def run(granularity: str, n: int) -> dict[str, np.ndarray]:
        """One pair at a time: each has other right and wrong answers, and this metric sees logits only."""
        nodes: dict[str, float] = {}
        edges: dict[tuple[str, str], float] = {}
        for i in range(n):
            clean, corrupt = (torch.tensor([data[side][i]]) for side in ("clean", "corrupt"))
            right, wrong, last = (data[key][i] for key in ("right", "wrong", "last"))

            def metric(logits: torch.Tensor, at: tuple = (right, wrong, last)) -> torch.Tensor:
                return logits[0, at[2], at[0]] - logits[0, at[2], at[1]]

            found = attribution_patch(bridge, clean, corrupt, metric, EdgeAttributionConfig(granularity=granularity))
            for node, score in found.node_scores.items():
                nodes[name(node)] = nodes.get(name(node), 0.0) + score / n
            for (a, b), score in found.edge_scores.items():
                key = name(a), name(b)
                edges[key] = edges.get(key, 0.0) + score / n
        if granularity == "node":
            return {"scores": np.array([nodes[source] for source in sources])}
        readers = sorted({b for _, b in edges})
        scores = np.array([[edges.get((a, b), 0.0) for b in readers] for a in sources])
        return {"scores": scores, "destinations": np.array(readers)}

    return {
        "nodes": lambda: run("node", len(data["clean"])),
        "edges": lambda: run("edge", data["few"]),
    }
