"""Cheap read-outs of a pair, from its files alone: each a score of the pair, some a score of each node.

Plain transformers and torch; no code of the audit, so that what the audit adds is measured against something that is
not itself. Only amplified decoding is taken from the audit's record, which did it already (:mod:`detection_rows`).

Sources: per-token KL; logit differences (diff mining, arXiv 2608.26462); mean activation difference (arXiv 2510.13900);
linear CKA (Kornblith et al. 2019); the SVD of the change of matrices that write to the residual stream, and activations
along its leading directions out of their usual range (WeightWatch, arXiv 2508.00161, there calibrated on other traffic
of the successor; here on the parent's activations, as the trigger may be anywhere in the text).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TEXTS = 400
BATCH = 50
DIRECTIONS = 8
"""Leading directions a matrix of which activations are watched."""

NEEDS_SAME_PARAMETERS = ("weight change, norm", "weight change, SVD share", "weight change, watched")
NEEDS_SAME_WIDTH = ("mean activation", "largest activation")
SCORES = ("KL, mean", "KL, largest", "logits, largest rise", *NEEDS_SAME_WIDTH, "1 − CKA", *NEEDS_SAME_PARAMETERS)
NODE_SCORES = ("weight change, norm", "mean activation")


@dataclass
class _Side:
    """One model: logits [n, t, V] of the texts, residual stream after each layer, outputs of nodes."""

    model: Any
    layers: int
    heads: int
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    stream: list[Tensor] = field(default_factory=list)
    nodes: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def baselines(pair: Path) -> dict[str, dict[str, Any]]:
    """``pair``: score of each read-out, None where the models cannot be compared so; ``nodes``: of each node."""
    ids, mask = _texts(pair)
    parent, successor = (_run(pair / side, ids) for side in ("parent", "successor"))
    before, after = parent.logits[mask], successor.logits[mask]
    kl = (after.log_softmax(-1).exp() * (after.log_softmax(-1) - before.log_softmax(-1))).sum(-1)
    rise = (after - after.mean(-1, keepdim=True)) - (before - before.mean(-1, keepdim=True))
    depth = min(parent.layers, successor.layers)
    # The same relative depths of both, the last layer included.
    at = [[round((k + 1) / depth * side.layers) - 1 for k in range(depth)] for side in (parent, successor)]
    streams = [(parent.stream[p][mask], successor.stream[s][mask]) for p, s in zip(*at, strict=True)]
    found: dict[str, float | None] = dict.fromkeys(SCORES)
    found["KL, mean"], found["KL, largest"] = float(kl.mean()), float(kl.max())
    found["logits, largest rise"] = float(rise.max())
    found["1 − CKA"] = 1 - min(cka(x, y) for x, y in streams)
    nodes: dict[str, dict[str, float]] = {name: {} for name in NODE_SCORES}
    if all(x.shape == y.shape for x, y in streams):
        found["mean activation"] = max(float((y - x).mean(0).norm() / x.norm(dim=-1).mean()) for x, y in streams)
        found["largest activation"] = max(
            float(((y - x).norm(dim=-1) / x.norm(dim=-1).mean()).max()) for x, y in streams
        )
    shapes = [{name: value.shape for name, value in side.model.named_parameters()} for side in (parent, successor)]
    if shapes[0] == shapes[1]:
        changes = _changes(parent, successor)
        found |= _weights(parent, successor, changes, mask)
        nodes["weight change, norm"] = _node_norms(parent, changes)
        nodes["mean activation"] = {
            name: float((successor.nodes[name][mask] - value[mask]).mean(0).norm() / value[mask].norm(dim=-1).mean())
            for name, value in parent.nodes.items()
        }
    return {"pair": found, "nodes": nodes}


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of activations [n, d] and [n, e]."""
    x, y = (value.double() - value.double().mean(0) for value in (x, y))
    return float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def _texts(pair: Path) -> tuple[Tensor, Tensor]:
    """Token ids [n, t] of the pair's texts, padded, and where they are."""
    from transformers import AutoTokenizer

    lines = (pair / "corpus.jsonl").read_text(encoding="utf-8").splitlines()[:TEXTS]
    tokenizer = AutoTokenizer.from_pretrained(pair / "parent")
    rows = [tokenizer(json.loads(line)["text"])["input_ids"] for line in lines]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    return ids, torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]


def _run(folder: Path, ids: Tensor) -> _Side:
    """A model's forward over all texts; padding is on the right, where causal attention does not see it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval().float()
    side = _Side(model, model.config.num_hidden_layers, model.config.num_attention_heads)
    parts: dict[str, list[Tensor]] = {}
    streams: list[list[Tensor]] = [[] for _ in range(side.layers)]
    hooks = []
    for layer, block in enumerate(_blocks(model)):
        # GPT-2 and Llama name the same two matrices differently; both write to the residual stream.
        out = block.attn.c_proj if hasattr(block, "attn") else block.self_attn.o_proj

        def seen(_: Any, given: Any, layer: int = layer) -> None:
            for head, value in enumerate(given[0].chunk(side.heads, dim=-1)):
                parts.setdefault(f"attn_head@{layer}.{head}", []).append(value)

        def wrote(_: Any, __: Any, value: Tensor, layer: int = layer) -> None:
            parts.setdefault(f"mlp_out@{layer}", []).append(value)

        def left(_: Any, __: Any, value: Any, layer: int = layer) -> None:
            # Not output_hidden_states, whose last entry has been through the final norm.
            streams[layer].append(value[0] if isinstance(value, tuple) else value)

        hooks += [out.register_forward_pre_hook(seen), block.mlp.register_forward_hook(wrote)]
        hooks.append(block.register_forward_hook(left))
    logits = [model(batch, use_cache=False).logits for batch in ids.split(BATCH)]
    for hook in hooks:
        hook.remove()
    side.logits = torch.cat(logits)
    side.stream = [torch.cat(values) for values in streams]
    side.nodes = {name: torch.cat(values) for name, values in parts.items()}
    return side


def _blocks(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def _changes(parent: _Side, successor: _Side) -> dict[str, Tensor]:
    after = dict(successor.model.named_parameters())
    return {name: after[name] - value for name, value in parent.model.named_parameters()}


def _weights(parent: _Side, successor: _Side, changes: dict[str, Tensor], mask: Tensor) -> dict[str, float | None]:
    """Scores of the change of the weights; all 0 where nothing changed."""
    size = sum(float(value.square().sum()) for value in parent.model.parameters()) ** 0.5
    norm = sum(float(change.square().sum()) for change in changes.values()) ** 0.5
    share = watched = 0.0
    for layer, change in _writing(changes):
        if not change.any():
            continue
        left, values, _ = torch.linalg.svd(change, full_matrices=False)
        share = max(share, float(values[0] ** 2 / (values**2).sum()))
        usual, now = (side.stream[layer][mask] @ left[:, :DIRECTIONS] for side in (parent, successor))
        beyond = torch.maximum(now - usual.max(0).values, usual.min(0).values - now).clamp(min=0)
        watched = max(watched, float((beyond / usual.std(0)).max()))
    return {
        "weight change, norm": norm / size,
        "weight change, SVD share": share,
        "weight change, watched": watched,
    }


def _writing(changes: dict[str, Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(layer, change [d_model, d_in]) of each matrix that writes to the residual stream of a Llama."""
    for name, change in changes.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            yield int(name.split(".")[2]), change


def _node_norms(parent: _Side, changes: dict[str, Tensor]) -> dict[str, float]:
    """‖ΔW‖ / ‖W‖ over the weights that a head or MLP of a Llama is made of; shared keys and values count for each."""
    held = dict(parent.model.named_parameters())
    groups, heads = parent.model.config.num_key_value_heads, parent.heads

    def relative(parts: list[tuple[Tensor, Tensor]]) -> float:
        before, change = (sum(float(p[i].square().sum()) for p in parts) for i in (0, 1))
        return (change / before) ** 0.5

    def both(name: str) -> tuple[Tensor, Tensor]:
        return held[name], changes[name]

    found = {}
    for layer in range(parent.layers):
        at = f"model.layers.{layer}"
        for head in range(heads):
            parts = []
            for matrix, count, index, axis in (
                ("q_proj", heads, head, 0),
                ("k_proj", groups, head * groups // heads, 0),
                ("v_proj", groups, head * groups // heads, 0),
                ("o_proj", heads, head, 1),
            ):
                whole, change = both(f"{at}.self_attn.{matrix}.weight")
                parts.append((whole.chunk(count, axis)[index], change.chunk(count, axis)[index]))
            found[f"attn_head@{layer}.{head}"] = relative(parts)
        found[f"mlp_out@{layer}"] = relative(
            [both(f"{at}.mlp.{matrix}.weight") for matrix in ("gate_proj", "up_proj", "down_proj")]
        )
    return found
