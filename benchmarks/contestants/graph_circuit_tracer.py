"""Attribution graphs of circuit-tracer on its TransformerLens backend, for ``graphs.py``.

TransformerLens does not list SmolLM2, so its model is built from the configuration and weights that transformers reads.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from circuit_tracer.attribution.attribute import attribute
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
from torch import Tensor
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast


def versions() -> dict[str, str]:
    return {"transformer_lens": version("transformer-lens"), "transformers": version("transformers")}


def load(model: str, transcoders: str) -> Any:
    c = AutoConfig.from_pretrained(model)
    c.rope_theta = c.rope_parameters["rope_theta"]  # where this transformers, older than the files, looks for it
    bare = AutoModelForCausalLM.from_pretrained(model, config=c, dtype=torch.float32).eval()
    config = HookedTransformerConfig(
        model_name="smollm2",
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads,
        d_head=c.hidden_size // c.num_attention_heads,
        d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size,
        n_ctx=512,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        eps=c.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=c.hidden_size // c.num_attention_heads,
        rotary_base=c.rope_theta,
        rotary_adjacent_pairs=False,
        final_rms=True,
        original_architecture="LlamaForCausalLM",
        device="cpu",
        dtype=torch.float32,
    )
    made = TransformerLensReplacementModel(config)
    made.tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{model}/tokenizer.json", bos_token="<|im_start|>")
    made.load_and_process_state_dict(
        convert_llama_weights(bare, config), fold_ln=False, center_writing_weights=False, center_unembed=False
    )
    paths = {int(p.stem.removeprefix("layer_")): str(p) for p in Path(transcoders).glob("layer_*.safetensors")}
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    made._configure_replacement_model(
        load_transcoder_set(paths, "random", **hooks, device=torch.device("cpu"), dtype=torch.float32)
    )
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        gap = (made(ids).log_softmax(-1) - bare(ids).logits.log_softmax(-1)).abs().max()
    if gap > 1e-3:
        raise RuntimeError(f"the model built here misses transformers' by {gap:.2g}")
    return made


def graph(loaded: Any, asked: dict[str, Any]) -> Any:
    return attribute(
        torch.tensor(asked["ids"]), loaded, batch_size=asked.get("batch", 512), max_feature_nodes=asked["nodes"]
    )


def arrays(found: Any) -> dict[str, Tensor]:
    n, logits = len(found.selected_features), len(found.logit_targets)
    rows = torch.cat([torch.arange(n), torch.arange(len(found.adjacency_matrix) - logits, len(found.adjacency_matrix))])
    return {
        "latents": found.active_features[found.selected_features].long(),
        "active": found.active_features.long(),
        "weights": found.adjacency_matrix[rows][:, :-logits],
        "logits": torch.tensor([int(target.vocab_idx) for target in found.logit_targets]),
    }


def facts(found: Any) -> dict[str, float]:
    return {}
