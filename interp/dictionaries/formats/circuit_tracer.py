"""circuit-tracer: ``config.yaml`` beside per-layer (PLT) or cross-layer (CLT) transcoders of all layers.

::

    layer_{i}.safetensors  W_enc, W_dec [F, D], b_enc, b_dec (, activation_function.threshold, W_skip, k)
    W_enc_{i}.safetensors  W_enc_i [F, D], b_enc_i, b_dec_i (, threshold_i)
    W_dec_{i}.safetensors  W_dec_i [F, layers - i, D]: what layer i writes to layers i, i+1, …

A configuration may name other files instead, those of Gemma Scope included; ``hf://`` names are looked up below the
directory and never fetched.
"""

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from heredity.kernels import Activation, ReLU, TopK

from ...errors import DictionaryError
from ..record import Dictionary, DictionarySet, Port
from . import gemma_scope, places
from .arrays import Arrays, open_npz, open_safetensors
from .config import Fields, agreed, jump, top
from .fold import flipped

name = "circuit_tracer"
hints = ("activation",)
_MAX_CONFIG = 1 << 20
_MAX_LAYERS = 4096
_KINDS = ("transcoder_set", "cross_layer_transcoder")
_THRESHOLD = "activation_function.threshold"


def recognises(path: Path) -> bool:
    """A directory with ``config.yaml``, or that file."""
    return (path / "config.yaml").is_file() or path.name == "config.yaml"


def read(path: Path, activation: Activation | None = None) -> DictionarySet:
    """See :func:`.load_dictionary`."""
    directory = path.parent if path.name == "config.yaml" else path
    fields = _config(directory / "config.yaml")
    # Version 0.1 named no kind; it had one.
    kind = fields.choice("model_kind", _KINDS, _KINDS[0] if _old(fields) else None)
    layers = _cross(directory, fields, activation) if kind == _KINDS[1] else _single(directory, fields, activation)
    provenance = {key: fields.values[key] for key in ("model_name", "scan") if isinstance(fields.values.get(key), str)}
    return DictionarySet(tuple(layers), {"format": name, **provenance})


def _old(fields: Fields) -> bool:
    named = fields.values.get("transcoders")
    return isinstance(named, list) and bool(named) and all(isinstance(each, dict) for each in named)


def _config(path: Path) -> Fields:
    import yaml

    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise DictionaryError("larger than 1 MiB", where=str(path), remedy="Use the dictionary's own file.")
        found: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as fault:
        what = f"cannot be read ({fault.strerror or fault})"
        raise DictionaryError(what, where=str(path), remedy="Check the path and its permissions.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as fault:
        what = f"not valid YAML ({type(fault).__name__}: {str(fault)[:200]})"
        raise DictionaryError(what, where=str(path), remedy="Replace it with an undamaged copy.") from None
    if not isinstance(found, dict):
        raise DictionaryError("a mapping was expected", where=str(path), remedy="Use the dictionary's own file.")
    return Fields(path, found)


# --- per layer ---


def _single(directory: Path, fields: Fields, hint: Activation | None) -> list[Dictionary]:
    made = []
    for layer, file in enumerate(_files(directory, fields)):
        source, target = _port(fields, "feature_input_hook", layer), _port(fields, "feature_output_hook", layer)
        arrays = open_npz(file) if file.suffix == ".npz" else open_safetensors(file)
        if file.suffix == ".npz" or "w_enc" in arrays:
            each = gemma_scope.dictionary(arrays, source, target)
            # There JumpReLU ends in a ReLU, here it does not.
            jump(arrays.get("threshold", each.n_latents), file)
            agreed(each.activation, hint, file, "")
            made.append(each)
        else:
            made.append(_transcoder(arrays, fields, source, target, hint))
    return made


def _transcoder(arrays: Arrays, fields: Fields, source: Port, target: Port, hint: Activation | None) -> Dictionary:
    arrays.only(["W_enc", "W_dec", "b_enc", "b_dec", _THRESHOLD, "W_skip", "k"])
    f, d = arrays.shape("W_enc", 2)
    d_out = arrays.shape("W_dec", 2)[1]
    k = arrays.integer("k") if "k" in arrays else None
    return Dictionary(
        kind="transcoder",
        reads=(source,),
        writes=(target,),
        W_enc=(flipped(arrays.get("W_enc", f, d)),),
        b_enc=arrays.get("b_enc", f),
        W_dec=(arrays.get("W_dec", f, d_out),),
        b_dec=(arrays.get("b_dec", d_out),),
        activation=_rule(arrays, fields, _THRESHOLD, f, k, hint),
        W_skip=flipped(arrays.get("W_skip", d_out, d)) if "W_skip" in arrays else None,
        provenance={"format": name, "file": arrays.file.name},
    )


def _files(directory: Path, fields: Fields) -> list[Path]:
    """The file of each layer.

    Raises:
        DictionaryError: one is absent, remote, or outside the directory.
    """
    named = fields.values.get("transcoders")
    if named is None:
        count = len(list(directory.glob("layer_*.safetensors")))
        if not 0 < count <= _MAX_LAYERS:
            what = f"{count} files layer_*.safetensors"
            raise DictionaryError(what, where=str(directory), remedy="Get the files of all layers.")
        return [directory / f"layer_{i}.safetensors" for i in range(count)]
    if not isinstance(named, list) or not 0 < len(named) <= _MAX_LAYERS:
        raise fields.fault("a list of files was expected", "transcoders")
    if _old(fields):
        layers = [each.get("layer") for each in named]
        if sorted(layers, key=str) != sorted(range(len(named)), key=str):
            raise fields.fault("each layer from 0 must have one transcoder", "transcoders")
        named = [each.get("filepath") for each in sorted(named, key=lambda each: each["layer"])]
    return [_file(directory, fields, i, each) for i, each in enumerate(named)]


def _file(directory: Path, fields: Fields, layer: int, text: Any) -> Path:
    where = f"transcoders[{layer}]"
    if not isinstance(text, str) or not text or "\0" in text:
        raise fields.fault("the name of a file was expected", where)
    try:
        parsed = urlsplit(text)
    except ValueError:
        raise fields.fault(f"{text[:120]!r} is no address", where) from None
    remote = parsed.scheme == "hf"
    inside = Path(parsed.netloc + parsed.path) if remote else Path(text)
    if inside.is_absolute() or ".." in inside.parts or (parsed.scheme and not remote):
        remedy = "Put the file below the directory and name it from there."
        raise fields.fault(f"{text[:120]!r} is not a file below {directory}", where, remedy)
    # owner/repository/path, or the path alone.
    for candidate in [inside, Path(*inside.parts[2:])] if remote else [inside]:
        if (directory / candidate).is_file():
            return directory / candidate
    if remote:
        remedy = f"Download it to {directory / inside}."
        raise fields.fault(f"{text[:120]!r} lies on Hugging Face, from which nothing is fetched", where, remedy)
    raise fields.fault(f"there is no file {text[:120]!r}", where, "Get the files of all layers.")


# --- across layers ---


def _cross(directory: Path, fields: Fields, hint: Activation | None) -> list[Dictionary]:
    if "transcoders" in fields:
        what = "a cross-layer transcoder in files of another layout is not supported"
        raise fields.fault(what, "transcoders", "Save it with circuit-tracer's to_safetensors.")
    count = len(list(directory.glob("W_enc_*.safetensors")))
    if not 0 < count <= _MAX_LAYERS:
        what = f"{count} files W_enc_*.safetensors"
        raise DictionaryError(what, where=str(directory), remedy="Get the files of all layers.")
    return [_cross_layer(directory, fields, i, count, hint) for i in range(count)]


def _cross_layer(directory: Path, fields: Fields, i: int, count: int, hint: Activation | None) -> Dictionary:
    encoder = open_safetensors(directory / f"W_enc_{i}.safetensors")
    decoder = open_safetensors(directory / f"W_dec_{i}.safetensors")
    encoder.only([f"W_enc_{i}", f"b_enc_{i}", f"b_dec_{i}", f"threshold_{i}"])
    decoder.only([f"W_dec_{i}"])
    f, d = encoder.shape(f"W_enc_{i}", 2)
    written = decoder.get(f"W_dec_{i}", f, count - i, d)
    own = encoder.get(f"b_dec_{i}", d)
    return Dictionary(
        kind="cross_layer_transcoder",
        reads=(_port(fields, "feature_input_hook", i),),
        writes=tuple(_port(fields, "feature_output_hook", j) for j in range(i, count)),
        W_enc=(flipped(encoder.get(f"W_enc_{i}", f, d)),),
        b_enc=encoder.get(f"b_enc_{i}", f),
        W_dec=tuple(written[:, j].contiguous() for j in range(count - i)),
        # A layer's bias is added once, with what its own latents write.
        b_dec=(own, *(torch.zeros_like(own) for _ in range(i + 1, count))),
        activation=_rule(encoder, fields, f"threshold_{i}", f, None, hint),
        provenance={"format": name, "file": encoder.file.name},
    )


def _port(fields: Fields, which: str, layer: int) -> Port:
    hook = fields.text(which)
    if not hook:
        raise fields.fault("the hook is missing", which, "Say there which hook the transcoders were trained on.")
    return Port(places.of_hook(f"blocks.{layer}.{hook}", fields.text("model_name")))


def _rule(arrays: Arrays, fields: Fields, threshold: str, f: int, k: int | None, hint: Activation | None) -> Activation:
    """The activation of one layer: the configuration's, else JumpReLU where there are thresholds, else unknown.

    circuit-tracer's TopK keeps negative pre-activations among the k largest; ours drops them. They differ only on
    tokens with fewer than k pre-activations above zero.
    """
    known = ("relu", "topk", "jump_relu", "jumprelu")
    said = fields.choice("activation", known) if "activation" in fields else None
    jumps = threshold in arrays
    if jumps and said in ("relu", "topk"):
        raise fields.fault(f"activation is {said}, but {arrays.file.name} holds thresholds", "activation")
    if said in ("jump_relu", "jumprelu") or jumps:
        found: Activation | None = jump(arrays.get(threshold, f), arrays.file)
    elif said == "topk" or k is not None:
        if k is not None and "k" in fields and fields.size("k") != k:
            raise arrays.fault(f"k is {k}, in the configuration {fields.size('k')}", "k", "Use matching files.")
        found = _top(k if k is not None else fields.size("k"), f, fields)
    else:
        found = ReLU() if said == "relu" else None
    return agreed(found, hint, arrays.file, "ReLU(), which is what circuit-tracer 0.5 takes")


def _top(k: int, f: int, fields: Fields) -> TopK:
    if k < 1:
        raise fields.fault(f"k is {k}", "k")
    return top(k, f, fields)
