"""Our own format, which holds every dictionary the record can express.

::

    DIR/dictionary.json         what the arrays are; the sha256 of dictionary.safetensors
    DIR/dictionary.safetensors  W_enc.0 … W_dec.0 … b_enc b_dec.0 … (norm, W_skip, threshold)

and of the layers of one model:

::

    DIR/dictionary.json         how many layers; the sha256 of each layer's dictionary.json
    DIR/layers/00000/…          one dictionary each

The manifest goes first and comes last when a dictionary is replaced: a directory holds the old one, the new one, or
none.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    ValidationError,
)
from torch import Tensor

from heredity.kernels import Activation, BatchTopK, JumpReLU, ReLU, TopK

from ...errors import DictionaryError, OutputError
from ...tensors import read_json
from ..record import Dictionary, DictionarySet, Kind, Port, Scaling
from .arrays import open_safetensors

name = "heredity"
hints = ()
MANIFEST, ARRAYS, LAYERS = "dictionary.json", "dictionary.safetensors", "layers"
_AGAIN = "Save the dictionary again, or restore both files from one copy."
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


_R = TypeVar("_R", bound=_Record)


class _Place(_Record):
    site: str
    model: NonNegativeInt
    width: PositiveInt


class _ReLU(_Record):
    rule: Literal["relu"] = "relu"


class _JumpReLU(_Record):
    rule: Literal["jumprelu"] = "jumprelu"
    threshold: _Finite | None
    """One for all; None: there is an array of them."""
    bandwidth: _Finite


class _TopK(_Record):
    rule: Literal["topk"] = "topk"
    k: PositiveInt


class _BatchTopK(_Record):
    rule: Literal["batchtopk"] = "batchtopk"
    k: PositiveInt | None
    threshold: _Finite | None


class _Manifest(_Record):
    """``dictionary.json`` of one dictionary."""

    schema_version: Literal[1] = 1
    content: Literal["dictionary"] = "dictionary"
    kind: Kind
    n_latents: PositiveInt
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    reads: tuple[_Place, ...]
    writes: tuple[_Place, ...]
    activation: Annotated[_ReLU | _JumpReLU | _TopK | _BatchTopK, Field(discriminator="rule")]
    scaling: Scaling
    norm: bool
    skip: bool
    provenance: dict[str, JsonValue]
    arrays: _Digest


class _SetManifest(_Record):
    """``dictionary.json`` of the layers of one model."""

    schema_version: Literal[1] = 1
    content: Literal["dictionary_set"] = "dictionary_set"
    layers: Annotated[tuple[_Digest, ...], Field(min_length=1, max_length=4096)]
    provenance: dict[str, JsonValue]


def recognises(path: Path) -> bool:
    """Whether ``path`` is a directory with our manifest."""
    return (path / MANIFEST).is_file()


def read(path: Path) -> Dictionary | DictionarySet:
    """See :func:`.load_dictionary`."""
    manifest = path / MANIFEST
    if read_json(manifest, DictionaryError).get("content") != "dictionary_set":
        return _read_one(path)
    header = _parse(_SetManifest, manifest)
    layers = []
    for i, digest in enumerate(header.layers):
        layer = path / LAYERS / f"{i:05d}"
        if _sha256(layer / MANIFEST) != digest:
            raise DictionaryError("not the layer this set was saved with", where=str(layer), remedy=_AGAIN)
        layers.append(_read_one(layer))
    return DictionarySet(tuple(layers), header.provenance)


def write(dictionary: Dictionary | DictionarySet, directory: Path) -> None:
    """See :func:`.save_dictionary`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if isinstance(dictionary, Dictionary):
            _write_one(dictionary, directory)
            return
        (directory / MANIFEST).unlink(missing_ok=True)
        provenance = _plain(dictionary.provenance)
        digests = []
        for i, layer in enumerate(dictionary.layers):
            place = directory / LAYERS / f"{i:05d}"
            place.mkdir(parents=True, exist_ok=True)
            _write_one(layer, place)
            digests.append(_sha256(place / MANIFEST))
        header = _SetManifest(layers=tuple(digests), provenance=provenance)
        _finish([_written(directory / MANIFEST, lambda to: to.write_text(_text(header), encoding="utf-8"))])
    except OSError as fault:
        what = f"cannot be written ({fault.strerror or fault})"
        raise OutputError(what, where=str(directory), remedy="Check space and permissions.") from fault


def _read_one(path: Path) -> Dictionary:
    manifest = path / MANIFEST
    header = _parse(_Manifest, manifest)
    arrays = open_safetensors(path / ARRAYS)
    f = header.n_latents
    shapes: dict[str, tuple[int, ...]] = {"b_enc": (f,)}
    shapes |= {f"W_enc.{i}": (place.width, f) for i, place in enumerate(header.reads)}
    shapes |= {f"W_dec.{j}": (f, place.width) for j, place in enumerate(header.writes)}
    shapes |= {f"b_dec.{j}": (place.width,) for j, place in enumerate(header.writes)}
    if header.norm:
        shapes["norm"] = (f,)
    if header.skip and header.reads and header.writes:
        shapes["W_skip"] = (header.reads[0].width, header.writes[0].width)
    if isinstance(header.activation, _JumpReLU) and header.activation.threshold is None:
        shapes["threshold"] = (f,)
    arrays.only(shapes)
    if _sha256(path / ARRAYS) != header.arrays:
        raise DictionaryError("not the arrays this manifest was saved with", where=str(path / ARRAYS), remedy=_AGAIN)
    found = {name: arrays.raw(name, *shape) for name, shape in shapes.items()}
    wrong = [name for name, array in found.items() if array.dtype != _DTYPES[header.dtype]]
    if wrong:
        raise arrays.fault(f"{header.dtype} was expected, not {found[wrong[0]].dtype}", wrong[0], _AGAIN)
    try:
        return Dictionary(
            kind=header.kind,
            reads=tuple(Port(place.site, place.model) for place in header.reads),
            writes=tuple(Port(place.site, place.model) for place in header.writes),
            W_enc=tuple(found[f"W_enc.{i}"] for i in range(len(header.reads))),
            b_enc=found["b_enc"],
            W_dec=tuple(found[f"W_dec.{j}"] for j in range(len(header.writes))),
            b_dec=tuple(found[f"b_dec.{j}"] for j in range(len(header.writes))),
            activation=_activation(header.activation, found.get("threshold"), f, manifest),
            norm=found.get("norm"),
            W_skip=found.get("W_skip"),
            scaling=header.scaling,
            provenance=header.provenance,
            # Read when a latent is first looked at.
            notes=path if (path / "latents.json").is_file() else None,
        )
    except ValueError as fault:
        raise DictionaryError(str(fault), where=str(manifest), remedy=_AGAIN) from None


def _write_one(dictionary: Dictionary, directory: Path) -> None:
    from safetensors.torch import save_file

    arrays: dict[str, Tensor] = {"b_enc": dictionary.b_enc}
    arrays |= {f"W_enc.{i}": weight for i, weight in enumerate(dictionary.W_enc)}
    arrays |= {f"W_dec.{j}": weight for j, weight in enumerate(dictionary.W_dec)}
    arrays |= {f"b_dec.{j}": bias for j, bias in enumerate(dictionary.b_dec)}
    rule = dictionary.activation
    optional = {"norm": dictionary.norm, "W_skip": dictionary.W_skip}
    if isinstance(rule, JumpReLU) and isinstance(rule.threshold, Tensor):
        optional["threshold"] = rule.threshold
    arrays |= {name: array for name, array in optional.items() if array is not None}
    for name, array in arrays.items():
        if not bool(torch.isfinite(array).all()):
            raise DictionaryError("NaN or infinite values", where=f"{dictionary!r}: {name}", remedy="Train it again.")
    provenance = _plain(dictionary.provenance)
    weights = _written(directory / ARRAYS, lambda to: save_file(_separate(arrays), to))
    header = _Manifest(
        kind=dictionary.kind,
        n_latents=dictionary.n_latents,
        dtype=str(dictionary.b_enc.dtype).removeprefix("torch."),  # pyright: ignore[reportArgumentType] (checked)
        reads=_places(dictionary.reads, [weight.shape[0] for weight in dictionary.W_enc]),
        writes=_places(dictionary.writes, [weight.shape[1] for weight in dictionary.W_dec]),
        activation=_rule(rule),
        scaling=dictionary.scaling,
        norm=dictionary.norm is not None,
        skip=dictionary.W_skip is not None,
        provenance=provenance,
        arrays=_sha256(weights[0]),
    )
    manifest = _written(directory / MANIFEST, lambda to: to.write_text(_text(header), encoding="utf-8"))
    (directory / MANIFEST).unlink(missing_ok=True)
    _finish([weights, manifest])


def _separate(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, without gaps, no two in the same memory (which safetensors refuses)."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, array in arrays.items():
        plain = array.detach().cpu().contiguous()
        where = plain.untyped_storage().data_ptr()
        separate[name] = plain.clone() if where in seen else plain
        seen.add(where)
    return separate


def _written(path: Path, write: Callable[[Path], Any]) -> tuple[Path, Path]:
    """The new content of ``path``, on disk beside it, and ``path``."""
    from safetensors import SafetensorError

    partial = path.with_name(path.name + ".tmp")
    try:
        write(partial)
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
    except (OSError, SafetensorError) as fault:
        partial.unlink(missing_ok=True)
        raise OSError(str(fault)) from fault
    return partial, path


def _finish(moves: Sequence[tuple[Path, Path]]) -> None:
    for partial, path in moves:
        os.replace(partial, path)


def _places(ports: Sequence[Port], widths: Sequence[int]) -> tuple[_Place, ...]:
    return tuple(
        _Place(site=port.site, model=port.model, width=width) for port, width in zip(ports, widths, strict=True)
    )


def _rule(activation: Activation) -> _ReLU | _JumpReLU | _TopK | _BatchTopK:
    match activation:
        case ReLU():
            return _ReLU()
        case JumpReLU(threshold=threshold, bandwidth=bandwidth):
            return _JumpReLU(threshold=None if isinstance(threshold, Tensor) else threshold, bandwidth=bandwidth)
        case TopK(k=k):
            return _TopK(k=k)
        case BatchTopK(k=k, threshold=threshold):
            return _BatchTopK(k=k, threshold=threshold)
    raise TypeError(f"no such activation: {activation!r}")


def _activation(
    rule: _ReLU | _JumpReLU | _TopK | _BatchTopK, threshold: Tensor | None, n_latents: int, manifest: Path
) -> Activation:
    if isinstance(rule, _ReLU):
        return ReLU()
    if isinstance(rule, _JumpReLU):
        return JumpReLU(rule.threshold if threshold is None else threshold, rule.bandwidth)  # pyright: ignore[reportArgumentType] (one of them is there)
    if rule.k is not None and rule.k > n_latents:
        what = f"k is {rule.k}, of {n_latents} latents"
        raise DictionaryError(what, where=f"{manifest}: activation", remedy=_AGAIN)
    if isinstance(rule, _TopK):
        return TopK(rule.k)
    if (rule.k is None) == (rule.threshold is None):
        what = "exactly one of k and threshold is needed"
        raise DictionaryError(what, where=f"{manifest}: activation", remedy=_AGAIN)
    return BatchTopK(rule.k, rule.threshold)


def _parse(kind: type[_R], path: Path) -> _R:
    read_json(path, DictionaryError)  # of bounded size, no key twice
    try:
        return kind.model_validate_json(path.read_bytes())
    except (ValidationError, ValueError, RecursionError) as fault:
        where, what = str(path), str(fault)
        if isinstance(fault, ValidationError):
            first = fault.errors()[0]
            where, what = f"{path}: {'.'.join(map(str, first['loc'])) or 'the file'}", first["msg"]
        raise DictionaryError(what, where=where, remedy=_AGAIN) from None


def _plain(provenance: Any) -> dict[str, Any]:
    """``provenance`` as JSON values.

    Raises:
        DictionaryError: it holds something else.
    """
    try:
        return json.loads(json.dumps(dict(provenance), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as fault:
        remedy = "Put only JSON values into it."
        raise DictionaryError(f"not JSON values ({fault})", where="provenance", remedy=remedy) from None


def _text(header: _Record) -> str:
    return header.model_dump_json(indent=1) + "\n"


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as fault:
        what = f"cannot be read ({fault.strerror or fault})"
        raise DictionaryError(what, where=str(path), remedy=_AGAIN) from None
