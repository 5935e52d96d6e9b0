"""What a model directory must satisfy before anything in it is loaded: no code, no pickle, no impossible claims."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ModelError, TokenizerError
from .tensors import FLOATS, Stored, read_header, read_json

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
)  # fmt: skip
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# Largest value believed of each size, by the names the families use. Far above any published model.
_BOUNDS = {
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers"): 4_096,
    ("hidden_size", "n_embd", "d_model", "head_dim", "d_kv"): 1 << 18,
    ("intermediate_size", "n_inner", "ffn_dim", "d_ff"): 1 << 22,
    ("num_attention_heads", "n_head", "num_heads", "num_key_value_heads", "num_kv_heads"): 8_192,
    ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"): 65_536,
    ("vocab_size",): 1 << 24,
    ("max_position_embeddings", "n_positions", "n_ctx", "seq_length"): 1 << 30,
}
_MAY_BE_NULL = frozenset({"n_inner", "head_dim", "num_key_value_heads", "intermediate_size"})
# Settings that make transformers fetch code or kernels, or read other files than the ones checked here.
_FORBIDDEN = {
    "auto_map": ("it asks for code of its own to be run", "Use a model whose architecture transformers has built in."),
    "quantization_config": (
        "quantised weights cannot be read here",
        "Dequantise the model first and save it as float safetensors; quantised .gguf files are read directly.",
    ),
    "transformers_weights": ("it names another weights file", "Remove the field and call the file model.safetensors."),
    "kernel_config": ("it asks for other kernels", "Remove the field."),
    "fusion_config": ("it asks for fused modules", "Remove the field."),
    "distributed_config": ("it asks for a distributed model", "Remove the field."),
}
_MAX_BUFFERS = 1 << 30
_PLAIN_ATTENTION = (None, "eager", "sdpa")


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose configuration and headers passed every check that needs no model."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Stored]

    @property
    def files(self) -> list[Path]:
        """Every file a loader needs: configuration, weights, index and tokenizer."""
        names = ("config.json", "generation_config.json", *TOKENIZER_FILES)
        shards = sorted({tensor.file for tensor in self.tensors.values()})
        index = [] if shards == [self.directory / "model.safetensors"] else [self.directory / _INDEX]
        return [self.directory / n for n in names if (self.directory / n).is_file()] + shards + index


_INDEX = "model.safetensors.index.json"


def check_directory(directory: Path) -> Checkpoint:
    """The checkpoint in ``directory``, once its files, configuration and headers hold together.

    Raises:
        ModelError: something in it cannot or must not be loaded.
        TokenizerError: it has no tokenizer.
    """
    names = _listing(directory)
    if "config.json" not in names:
        adapter = "adapter_config.json" in names
        raise ModelError(
            "no config.json" + (" (this is an adapter)" if adapter else ""),
            where=str(directory),
            remedy="Name an adapter as BASE+ADAPTER." if adapter else "Give a Hugging Face model directory.",
        )
    code = sorted(name for name in names if name.endswith((".py", ".so")))
    if code:
        raise ModelError(
            "the directory holds code, and code from a model is never run",
            where=str(directory / code[0]),
            remedy="Use a model whose architecture transformers has built in, and remove the file.",
        )
    config = read_json(directory / "config.json")
    check_config(config, directory / "config.json")
    check_tokenizer_files(directory)
    tensors = read_tensors(directory, names)
    _check_size(config, tensors, directory)
    return Checkpoint(directory, config, tensors)


def check_config(config: dict[str, Any], path: Path) -> None:
    """Refuse a configuration that asks for code, or whose sizes cannot be meant.

    Raises:
        ModelError: naming the field.
    """

    def refuse(field: str, what: str, remedy: str = "Correct the field.") -> ModelError:
        return ModelError(what, where=f"{path}: {field}", remedy=remedy)

    for field, (what, remedy) in _FORBIDDEN.items():
        if config.get(field):
            raise refuse(field, what, remedy)
    for field in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
        if config.get(field) not in _PLAIN_ATTENTION:
            raise refuse(field, f"attention {config[field]!r} is not built in", "Remove the field.")
    nested = sorted(key for key, value in config.items() if key.endswith("_config") and _has_layers(value))
    if nested:
        raise refuse(nested[0], "a model of several parts", "Give a text-only language model.")
    for fields, most in _BOUNDS.items():
        for field in fields:
            if field in config and not (config[field] is None and field in _MAY_BE_NULL):
                value = config[field]
                # Some families give one value per layer; each must make sense.
                values = value if isinstance(value, list) and value else [value]
                if not all(type(v) is int and 1 <= v <= most for v in values):
                    raise refuse(field, f"{str(value)[:60]} is not a whole number from 1 to {most}")
    hidden, heads = _first(config, "hidden_size", "n_embd", "d_model"), _first(config, "num_attention_heads", "n_head")
    if hidden and heads and not config.get("head_dim") and hidden % heads:
        raise refuse("num_attention_heads", f"{heads} heads do not divide a width of {hidden}")
    kv_heads = _first(config, "num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        raise refuse("num_key_value_heads", f"{kv_heads} key-value heads do not divide {heads} heads")


def check_tokenizer_files(directory: Path) -> None:
    """Refuse a directory without a tokenizer, or one whose tokenizer asks for code.

    Raises:
        TokenizerError: naming the file.
    """
    if not any((directory / name).is_file() for name in _VOCABULARIES):
        raise TokenizerError(
            "no tokenizer", where=str(directory), remedy="Save the tokenizer (tokenizer.json) beside the weights."
        )
    path = directory / "tokenizer_config.json"
    if path.is_file() and read_json(path, TokenizerError).get("auto_map"):
        raise TokenizerError(
            "it asks for code of its own to be run",
            where=f"{path}: auto_map",
            remedy="Save the tokenizer as tokenizer.json and remove the field.",
        )


def read_tensors(directory: Path, names: set[str]) -> dict[str, Stored]:
    """Headers of the weight files that transformers would read, by tensor name.

    Raises:
        ModelError: there are none, they are pickles, or index and files contradict each other.
    """
    if "model.safetensors" in names:
        return read_header(directory / "model.safetensors")
    if _INDEX not in names:
        pickles = sorted(name for name in names if name.endswith(_PICKLES))
        if pickles:
            raise ModelError(
                "pickled weights can run code when read",
                where=str(directory / pickles[0]),
                remedy="Save the model with safe_serialization=True and give that directory.",
            )
        raise ModelError(
            "no model.safetensors", where=str(directory), remedy="Give the directory that holds the weights."
        )
    where = directory / _INDEX
    weight_map = read_json(where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError("no weight_map", where=str(where), remedy="Replace the file with an undamaged copy.")
    tensors: dict[str, Stored] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors", shard):
            raise ModelError(
                f"{shard!r} is not a safetensors file in this directory",
                where=f"{where}: weight_map",
                remedy="Keep every shard beside the index and name it without a path.",
            )
        if shard not in names:
            raise ModelError(
                "the shard is missing", where=str(directory / shard), remedy="Add the file the index names."
            )
        held = read_header(directory / shard)
        twice = sorted(set(held) & set(tensors))
        if twice:
            raise ModelError(
                f"tensor {twice[0]!r} is also in {tensors[twice[0]].file.name}",
                where=str(directory / shard),
                remedy="Keep one copy of each tensor.",
            )
        tensors |= held
    wrong = sorted(n for n, shard in weight_map.items() if n not in tensors or tensors[n].file.name != shard)
    if wrong:
        raise ModelError(
            f"tensor {wrong[0]!r} is not in {weight_map[wrong[0]]}",
            where=f"{where}: weight_map",
            remedy="Replace index and shards with copies that belong together.",
        )
    return tensors


def check_fit(checkpoint: Checkpoint, model: Any) -> None:
    """Compare the stored tensors with ``model``, the same architecture built on the meta device.

    Tied weights may be stored once; names may carry or lack the base model's prefix, as transformers allows.
    Where both unknown and absent names remain, the architecture may rename on load, and transformers' own account
    is checked after loading instead (:func:`check_account`).

    Raises:
        ModelError: naming the tensor that is missing, unexpected or of another shape.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    prefix = f"{model.base_model_prefix}."
    found: dict[str, Stored] = {}
    strangers = []
    for name, tensor in checkpoint.tensors.items():
        target = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in wanted), None)
        if target is not None:
            found[target] = tensor
        elif not _tolerated(name, model):
            strangers.append(name)
    for name, tensor in found.items():
        if tensor.shape != wanted[name]:
            raise _misfit(tensor.file, tensor.name, f"shape {list(tensor.shape)}, expected {list(wanted[name])}")
        if tensor.dtype not in FLOATS and model.state_dict()[name].is_floating_point():
            raise _misfit(tensor.file, tensor.name, f"dtype {tensor.dtype}, not a floating-point type")
    absent = _absent(set(wanted) - set(found), set(found), model)
    numel = sum(p.numel() for p in model.parameters())
    stored = sum(tensor.numel for tensor in checkpoint.tensors.values())
    if numel > 2 * stored + 1_000_000:
        raise _misfit(checkpoint.directory, "config.json", f"describes {numel} parameters, the files hold {stored}")
    # Tables made on the spot (masks, positions) are in no file, so only their size can speak for them.
    made = sum(buffer.numel() * buffer.element_size() for _, buffer in model.named_buffers())
    if made > _MAX_BUFFERS:
        raise _misfit(checkpoint.directory, "config.json", f"needs {made >> 20} MiB of tables beside the weights")
    if strangers and not absent:
        raise _misfit(checkpoint.tensors[strangers[0]].file, strangers[0], "unexpected tensor")
    if absent and not strangers:
        raise _misfit(checkpoint.directory, absent[0], "missing tensor")


def check_account(info: dict[str, Any], model: Any, where: Path) -> None:
    """Refuse a load that transformers reports as incomplete (``output_loading_info``).

    Raises:
        ModelError: naming the first tensor it could not place or had to make up.
    """
    for what in ("missing", "unexpected", "mismatched"):
        for key in sorted(map(str, info.get(f"{what}_keys") or ())):
            if what != "unexpected" or not _tolerated(key, model):
                raise _misfit(where, key, f"{what} tensor")
    if info.get("error_msgs"):
        raise _misfit(where, "weights", str(info["error_msgs"]))


def check_finite(model: Any, where: Path) -> None:
    """Refuse weights that hold NaN or infinity.

    Raises:
        ModelError: naming the first such tensor.
    """
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.numel():
            low, high = value.aminmax()
            if not (low.isfinite() and high.isfinite()):
                raise ModelError(
                    "NaN or infinite values", where=f"{where}: {name}", remedy="Use a checkpoint with finite weights."
                )


def _absent(names: set[str], found: set[str], model: Any) -> list[str]:
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    groups = {name: {name, tied.get(name, name)} | {t for t, s in tied.items() if s == name} for name in names}
    patterns = tuple(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    return sorted(n for n in names if not groups[n] & found and not any(re.search(p, n) for p in patterns))


def _tolerated(name: str, model: Any) -> bool:
    # Buffers that older releases stored, which transformers drops too.
    buffers = {buffer for buffer, _ in model.named_buffers()}
    if {name, f"{model.base_model_prefix}.{name}"} & buffers or name.endswith("rotary_emb.inv_freq"):
        return True
    return any(re.search(p, name) for p in (getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()))


def _misfit(where: Path, field: str, what: str) -> ModelError:
    return ModelError(what, where=f"{where}: {field}", remedy="Use weights and config.json that belong together.")


def _listing(directory: Path) -> set[str]:
    try:
        names = {entry.name for entry in directory.iterdir()}
    except OSError as fault:
        raise ModelError(
            f"cannot be read ({fault.strerror or fault})",
            where=str(directory),
            remedy="Check the path and its permissions.",
        ) from None
    if not names:
        raise ModelError("the directory is empty", where=str(directory), remedy="Give a Hugging Face model directory.")
    return names


def _check_size(config: dict[str, Any], tensors: dict[str, Stored], directory: Path) -> None:
    # Cheap lower bounds, so that a boast of a thousand layers is refused before even the empty model is built.
    layers = _first(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers") or 1
    hidden = _first(config, "hidden_size", "n_embd", "d_model") or 1
    vocab = _first(config, "vocab_size") or 1
    stored = sum(tensor.numel for tensor in tensors.values())
    if layers > len(tensors) or hidden > stored or vocab > stored:
        raise _misfit(
            directory,
            "config.json",
            f"{layers} layers of width {hidden} and {vocab} tokens cannot be in "
            f"{len(tensors)} tensors of {stored} numbers in all",
        )


def _has_layers(value: Any) -> bool:
    return isinstance(value, dict) and _first(value, "num_hidden_layers", "n_layer", "hidden_size") is not None


def _first(config: dict[str, Any], *fields: str) -> int | None:
    return next((config[f] for f in fields if type(config.get(f)) is int), None)
