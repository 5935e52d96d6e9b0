"""PEFT LoRA directories, read under an allow-list and merged into the base: W ← W + s·B·A (Hu et al. 2021).

``base_model_name_or_path`` is never followed: the base is the one the user named.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import AdapterError
from .tensors import FLOATS, Stored, read_header, read_json

if TYPE_CHECKING:
    from torch import Tensor, nn

# Fields that decide the merged weights; they enter the digest.
_MEANING = (
    "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "bias", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
)  # fmt: skip
# Fields about training or book-keeping, whatever they say.
_IGNORED = frozenset(
    {
        "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout",
        "init_lora_weights", "peft_version", "megatron_core", "qalora_group_size", "runtime_config", "eva_config",
    }
)  # fmt: skip
# Initialisations that leave the base as it was; the others (PiSSA, OLoRA, LoftQ, ...) change the base's weights too.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_FACTORS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B"}
# Module names with the anchors and dots peft writes. No repetition: a pattern from a file must not run for hours.
_SAFE_PATTERN = re.compile(r"[A-Za-z0-9_.^$\\|()]{1,300}")
_MAX_RANK = 65_536


@dataclass(frozen=True)
class Adapter:
    """A checked LoRA directory: the fields that matter and the stored tensors by name."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Stored]


def read_adapter(directory: Path) -> Adapter:
    """The adapter in ``directory``; only its headers are read.

    Raises:
        AdapterError: it is malformed, pickled, or of a kind that is not plain LoRA.
    """
    path = directory / "adapter_config.json"
    if not path.is_file():
        raise _fault("no adapter_config.json", directory, "", "Give the directory that PEFT's save_pretrained wrote.")
    config = read_json(path, AdapterError)
    _check_config(config, path)
    weights = directory / "adapter_model.safetensors"
    if not weights.is_file():
        pickled = directory / "adapter_model.bin"
        if pickled.exists():
            raise _fault(
                "pickled weights can run code when read", pickled, "", "Save the adapter as adapter_model.safetensors."
            )
        raise _fault("no adapter_model.safetensors", directory, "", "Save the adapter with PEFT's save_pretrained.")
    tensors = read_header(weights, AdapterError)
    if not tensors:
        raise _fault("holds no tensors", weights, "", "Save the adapter again.")
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise _fault(f"dtype {tensor.dtype}, not a floating-point type", weights, name, "Save it as float32.")
    meaning = {field: config[field] for field in _MEANING if config.get(field) not in (None, {}, [])}
    return Adapter(directory, meaning, tensors)


def merge(adapter: Adapter, model: "nn.Module") -> None:
    """Merge ``adapter`` into ``model`` (transformers, float32) in place.

    Everything is checked before the first weight changes.

    Raises:
        AdapterError: naming the tensor or field that does not fit this base.
    """
    import torch
    from safetensors import safe_open

    path = adapter.directory / "adapter_model.safetensors"
    plan, factors = _plan(adapter, model)
    with safe_open(str(path), framework="pt") as stream, torch.no_grad():

        def read(tensor: Stored) -> "Tensor":
            value = stream.get_tensor(tensor.name).float()
            if not value.isfinite().all():
                raise _fault("NaN or infinite values", path, tensor.name, "Use an adapter with finite weights.")
            return value

        deltas = {name: (read(a), read(b)) for name, (a, b) in factors.items()}
        replaced = {name: read(tensor) for name, tensor in plan.items()}
        for name, value in replaced.items():
            model.get_parameter(name).copy_(value)
        for name, (a, b) in deltas.items():
            module, delta = model.get_submodule(name), b @ a
            weight: Any = module.weight
            weight += (delta.T if _is_transposed(module) else delta) * _scaling(adapter, name, a.shape[0])


def _plan(adapter: Adapter, model: "nn.Module") -> tuple[dict[str, Stored], dict[str, tuple[Stored, Stored]]]:
    """Parameters that are replaced, and modules that gain B·A, after every check against ``model``."""
    path = adapter.directory / "adapter_model.safetensors"
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    halves: dict[str, dict[str, Stored]] = {}
    replaced: dict[str, Stored] = {}
    for name, tensor in adapter.tensors.items():
        # peft keeps what a module had before it was wrapped one level down.
        bare = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        suffix = next((s for s in _FACTORS if bare.endswith(f".{s}")), None)
        if suffix is not None:
            halves.setdefault(bare[: -len(suffix) - 1], {})[_FACTORS[suffix]] = tensor
        elif bare in parameters and (".base_layer.weight" in name or _replaceable(adapter, bare)):
            replaced[bare] = tensor
        else:
            raise _fault("nothing in the base or adapter_config.json asks for this tensor", path, name, _OTHER_BASE)
    for name, pair in halves.items():
        _check_pair(adapter, name, pair, modules.get(name), path)
    # Beside the factors of an embedding peft stores the embedding itself, in case it was resized.
    for name in replaced:
        if not _replaceable(adapter, name) and name.removesuffix(".weight") not in halves:
            raise _fault("nothing in the base or adapter_config.json asks for this tensor", path, name, _OTHER_BASE)
    for name, tensor in replaced.items():
        if tensor.shape != tuple(parameters[name].shape):
            raise _fault(
                f"shape {list(tensor.shape)}, the base has {list(parameters[name].shape)}", path, name, _OTHER_BASE
            )
    _check_complete(adapter, modules, set(halves), set(replaced), path)
    _check_tied(model, {f"{name}.weight" for name in halves} | set(replaced), path)
    return replaced, {name: (pair["A"], pair["B"]) for name, pair in halves.items()}


_OTHER_BASE = "Give the base this adapter was trained on."


def _check_pair(adapter: Adapter, name: str, pair: dict[str, Stored], module: Any, path: Path) -> None:
    if module is None or type(module).__name__ not in ("Linear", "Conv1D", "Embedding"):
        raise _fault("the base has no such linear or embedding module", path, name, _OTHER_BASE)
    if set(pair) != {"A", "B"}:
        lost = next(iter({"A", "B"} - set(pair)))
        raise _fault(f"lora_{lost} is missing", path, name, "Save the adapter again.")
    a, b = pair["A"].shape, pair["B"].shape
    wide, tall = module.weight.shape[::-1] if not _is_transposed(module) else module.weight.shape
    rank = _by_pattern(adapter.config.get("rank_pattern"), name, adapter.config["r"])
    if a != (rank, wide) or b != (tall, rank):
        raise _fault(
            f"A {list(a)} and B {list(b)} do not make a rank-{rank} change of [{tall}, {wide}]", path, name, _OTHER_BASE
        )


def _check_complete(adapter: Adapter, modules: dict[str, Any], have: set[str], saved: set[str], path: Path) -> None:
    """Refuse an adapter that lacks tensors for a module its configuration lists by name."""
    targets, layers = adapter.config.get("target_modules"), adapter.config.get("layers_to_transform")
    for name in adapter.config.get("modules_to_save") or ():
        if not any(f".{name}." in f".{held}" for held in saved):
            raise _fault("modules_to_save lists it, but it is not stored", path, name, "Save the adapter again.")
    # Which modules a pattern or a choice of layers means is peft's to say; pairs were checked one by one.
    if not isinstance(targets, list) or layers is not None or adapter.config.get("exclude_modules"):
        return
    for name, module in modules.items():
        listed = any(name == target or name.endswith(f".{target}") for target in targets)
        kept = any(f".{k}." in f".{name}." for k in adapter.config.get("modules_to_save") or ())
        if listed and not kept and name not in have and type(module).__name__ in ("Linear", "Conv1D", "Embedding"):
            raise _fault("target_modules lists it, but it has no tensors", path, name, _OTHER_BASE)


def _check_tied(model: Any, changed: set[str], path: Path) -> None:
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    both = sorted(changed & (set(tied) | set(tied.values())))
    if both:
        raise _fault(
            "changes an embedding that input and output share, so the merged model would not be the adapted one",
            path,
            both[0],
            "Untie the embeddings before training (tie_word_embeddings: false), or leave them out of the adapter.",
        )


def _check_config(config: dict[str, Any], path: Path) -> None:
    def refuse(field: str, what: str, remedy: str = "Correct the field.") -> AdapterError:
        return _fault(what, path, field, remedy)

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", f"{str(config.get('peft_type'))[:40]!r} is not LORA", _MERGE_FIRST)
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        raise refuse("init_lora_weights", "this initialisation also changed the base's weights", _MERGE_FIRST)
    for field in sorted(set(config) - set(_MEANING) - _IGNORED):
        if config[field] not in (None, False, "", [], {}):
            raise refuse(field, "not supported here", _MERGE_FIRST)
    if type(config.get("r")) is not int or not 1 <= config["r"] <= _MAX_RANK:
        raise refuse("r", f"{str(config.get('r'))[:40]} is not a rank from 1 to {_MAX_RANK}")
    if not _is_number(config.get("lora_alpha")):
        raise refuse("lora_alpha", f"{str(config.get('lora_alpha'))[:40]} is not a number")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise refuse("bias", f"{str(config['bias'])[:40]!r} is not none, all or lora_only")
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict) or not all(map(_is_number, patterns.values())):
            raise refuse(field, "not an object of numbers")
        for pattern in patterns:
            if not _SAFE_PATTERN.fullmatch(pattern) or not _compiles(pattern):
                raise refuse(field, f"pattern {pattern[:60]!r} is not a plain module name", _MERGE_FIRST)
    for field in ("target_modules", "modules_to_save", "exclude_modules"):
        value = config.get(field)
        if value is not None and not isinstance(value, str) and not _are_names(value):
            raise refuse(field, "not a list of module names")
    if isinstance(config.get("modules_to_save"), str):
        raise refuse("modules_to_save", "not a list of module names")


_MERGE_FIRST = "Merge the adapter into its base with PEFT and give the merged directory."


def _scaling(adapter: Adapter, name: str, rank: int) -> float:
    alpha = _by_pattern(adapter.config.get("alpha_pattern"), name, adapter.config["lora_alpha"])
    return alpha / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank)


def _by_pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    # peft's rule: the first pattern that matches the end of the module's name.
    return next((v for p, v in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", name)), default)


def _replaceable(adapter: Adapter, name: str) -> bool:
    saved = adapter.config.get("modules_to_save") or ()
    bias = adapter.config.get("bias", "none") != "none" and name.endswith(".bias")
    return bias or any(f".{module}." in f".{name}" for module in saved)


def _is_transposed(module: Any) -> bool:
    # Stored [in, out] rather than [out, in]: GPT-2's Conv1D and, read as a map from tokens, an embedding.
    return type(module).__name__ in ("Conv1D", "Embedding")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e9


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _fault(what: str, path: Path, field: str, remedy: str) -> AdapterError:
    return AdapterError(what, where=f"{path}: {field}" if field else str(path), remedy=remedy)
