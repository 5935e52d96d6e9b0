"""The reference code of EAP-IG (github.com/hannamw/EAP-IG), for ``circuits_worker.py``.

Its modules are read from a checkout and run with the device changed from CUDA to the CPU, and with prompts given as
token ids instead of text; nothing else is changed. The model is a HookedTransformer of the same weights, with grouped
keys and values repeated per head, as that code asks for.
"""

import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch


def tasks(directory: str, data: dict, checkout: str, batch: str) -> dict[str, Callable[[], dict[str, np.ndarray]]]:
    attribute, graphs = _on_cpu(Path(checkout))
    model = hooked(directory)
    graph = graphs.Graph.from_model(model)
    size = int(batch)
    fields = [torch.tensor(data[name]) for name in ("clean", "corrupt", "right", "wrong", "last")]

    def tokenized(model: Any, rows: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        lengths = torch.full((len(rows),), rows.shape[1])
        return rows, torch.ones_like(rows), lengths, rows.shape[1]

    attribute.tokenize_plus = tokenized

    def batches() -> list:
        columns = zip(*(field.split(size) for field in fields), strict=True)
        return [(clean, corrupt, (right, wrong, last)) for clean, corrupt, right, wrong, last in columns]

    def metric(logits: torch.Tensor, clean_logits: torch.Tensor, lengths: torch.Tensor, label: tuple) -> torch.Tensor:
        right, wrong, last = label
        rows = torch.arange(len(last))
        return -(logits[rows, last, right] - logits[rows, last, wrong]).sum()

    def integrated() -> dict[str, np.ndarray]:
        graph.reset()
        found = attribute.get_scores_eap_ig(model, graph, batches(), metric, steps=data["steps"], quiet=True)
        return {"scores": found.numpy().copy()}

    return {"integrated": integrated}


def _on_cpu(checkout: Path) -> tuple[ModuleType, ModuleType]:
    place = Path(tempfile.mkdtemp()) / "eap"
    place.mkdir()
    for path in (checkout / "src" / "eap").glob("*.py"):
        (place / path.name).write_text(path.read_text().replace("device='cuda'", "device='cpu'"))
    sys.path.append(str(place.parent))
    sys.modules["eap.visualization"] = ModuleType("eap.visualization")
    for name in ("get_color", "generate_random_color", "color_map"):
        setattr(sys.modules["eap.visualization"], name, None)
    return importlib.import_module("eap.attribute"), importlib.import_module("eap.graph")


def hooked(directory: str) -> Any:
    """The Llama in ``directory`` as a HookedTransformer."""
    import json

    from safetensors.torch import load_file
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    said = json.loads((Path(directory) / "config.json").read_text())
    heads, groups = said["num_attention_heads"], said["num_key_value_heads"]
    width, d_head = said["hidden_size"], said["hidden_size"] // heads
    cfg = HookedTransformerConfig(
        n_layers=said["num_hidden_layers"], d_model=width, n_ctx=512, d_head=d_head, n_heads=heads,
        n_key_value_heads=groups, d_mlp=said["intermediate_size"], d_vocab=said["vocab_size"], act_fn="silu",
        gated_mlp=True, normalization_type="RMS", final_rms=True, eps=said["rms_norm_eps"],
        positional_embedding_type="rotary", rotary_dim=d_head, rotary_adjacent_pairs=False,
        rotary_base=int(said["rope_parameters"]["rope_theta"]), device="cpu", original_architecture="LlamaForCausalLM",
    )  # fmt: skip
    w = load_file(Path(directory) / "model.safetensors")
    state = {"embed.W_E": w["model.embed_tokens.weight"], "ln_final.w": w["model.norm.weight"]}
    state["unembed.W_U"] = w.get("lm_head.weight", w["model.embed_tokens.weight"]).T.contiguous()
    state["unembed.b_U"] = torch.zeros(said["vocab_size"])
    for i in range(cfg.n_layers):
        theirs, ours = f"model.layers.{i}.", f"blocks.{i}."
        for a, b, n in (("q", "W_Q", heads), ("k", "_W_K", groups), ("v", "_W_V", groups)):
            weight = w[f"{theirs}self_attn.{a}_proj.weight"]
            state[f"{ours}attn.{b}"] = weight.unflatten(0, (n, d_head)).transpose(1, 2).contiguous()
            state[f"{ours}attn.{b.replace('W', 'b')}"] = torch.zeros(n, d_head)
        output = w[f"{theirs}self_attn.o_proj.weight"]
        state[f"{ours}attn.W_O"] = output.T.unflatten(0, (heads, d_head)).contiguous()
        state[f"{ours}attn.b_O"] = torch.zeros(width)
        for a, b in (("up", "W_in"), ("gate", "W_gate"), ("down", "W_out")):
            state[f"{ours}mlp.{b}"] = w[f"{theirs}mlp.{a}_proj.weight"].T.contiguous()
        state[f"{ours}mlp.b_in"] = torch.zeros(cfg.d_mlp or 0)
        state[f"{ours}mlp.b_out"] = torch.zeros(width)
        state[f"{ours}ln1.w"] = w[f"{theirs}input_layernorm.weight"]
        state[f"{ours}ln2.w"] = w[f"{theirs}post_attention_layernorm.weight"]
    model = HookedTransformer(cfg)
    absent = model.load_state_dict(state, strict=False).missing_keys
    if unexpected := [name for name in absent if not name.endswith(("mask", "IGNORE", "rotary_sin", "rotary_cos"))]:
        raise ValueError(f"weights without a source: {unexpected[:3]}")
    model.set_use_split_qkv_input(True)
    model.set_use_attn_result(True)
    model.set_use_hook_mlp_in(True)
    model.set_ungroup_grouped_query_attention(True)
    model.requires_grad_(False)
    return model.eval()
