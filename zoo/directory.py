"""The zoo's networks as Hugging Face directories: written, checked against transformers, read back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .language import CONTEXT, ID, WORDS
from .network import EPSILON, Size, Weights, forward

_LAYER = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_NORMS = ("input_layernorm", "post_attention_layernorm")
_WHOLE = {"embed": "model.embed_tokens.weight", "unembed": "lm_head.weight"}
_AGREEMENT = 1e-3


def _halves(rows: Tensor, size: Size) -> Tensor:
    """Query or key rows [L, H·E, D] from the network's order (rotated pairs adjacent) to that of transformers."""
    return rows.unflatten(1, (-1, size.head // 2, 2)).transpose(2, 3).flatten(1, 3)


def _pairs(rows: Tensor, size: Size) -> Tensor:
    """The inverse of :func:`_halves`."""
    return rows.unflatten(1, (-1, 2, size.head // 2)).transpose(2, 3).flatten(1, 3)


def state(weights: Weights, size: Size) -> Weights:
    """The weights under the names, and in the order, of transformers' Llama; every gain of its norms is one."""
    named = {path: weights[name] for name, path in _WHOLE.items()}
    for name, path in _LAYER.items():
        stacked = _halves(weights[name], size) if name in "qk" else weights[name]
        named |= {f"model.layers.{i}.{path}.weight": matrix for i, matrix in enumerate(stacked)}
    gains = [f"model.layers.{i}.{norm}.weight" for i in range(size.layers) for norm in _NORMS] + ["model.norm.weight"]
    named |= {name: torch.ones(size.width) for name in gains}
    return {name: value.contiguous() for name, value in named.items()}


def configuration(size: Size) -> Any:
    """The transformers configuration of a network of this size."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=size.width,
        intermediate_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": size.theta},
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        pad_token_id=ID["<pad>"],
        bos_token_id=ID["<bos>"],
        eos_token_id=ID["<eos>"],
    )


def tokenizer(words: Mapping[str, int] = ID, context: int = CONTEXT) -> Any:
    """The word-level tokenizer of ``words``: they stand between spaces, and ``<bos>`` is put in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(dict(words), unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<bos> $A", special_tokens=[("<bos>", words["<bos>"])]
    )
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=context, clean_up_tokenization_spaces=False, **names
    )


def save(weights: Weights, size: Size, directory: Path) -> None:
    """Write a model directory (configuration, weights in fp32, tokenizer) that transformers reads as a Llama.

    Raises:
        RuntimeError: transformers, given these files' content, computes other logits than :func:`.network.forward`.
    """
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    named, config = state(weights, size), configuration(size)
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(named)
    ids = torch.arange(3 * CONTEXT).view(3, CONTEXT) % len(WORDS)
    with torch.no_grad():
        apart = (model(ids, use_cache=False).logits - forward(weights, size, ids)).abs().max().item()
    if not apart < _AGREEMENT:
        raise RuntimeError(f"logits of the saved network differ by {apart:.2g} from those of the trained one")
    config.save_pretrained(directory)
    ends = {"pad_token_id": ID["<pad>"], "bos_token_id": ID["<bos>"], "eos_token_id": ID["<eos>"]}
    GenerationConfig(max_length=CONTEXT, **ends).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    save_file(named, directory / "model.safetensors", metadata={"format": "pt"})


def load(directory: Path) -> tuple[Weights, Size]:
    """Weights and size of a network written by :func:`save`."""
    from safetensors.torch import load_file

    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    size = Size(
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        hidden=config["intermediate_size"],
        theta=config["rope_parameters"]["rope_theta"],
    )
    named = load_file(directory / "model.safetensors")
    weights = {name: named[path] for name, path in _WHOLE.items()}
    for name, path in _LAYER.items():
        stacked = torch.stack([named[f"model.layers.{i}.{path}.weight"] for i in range(size.layers)])
        weights[name] = _pairs(stacked, size).contiguous() if name in "qk" else stacked
    return weights, size
