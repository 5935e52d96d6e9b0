"""Safetensors files read by their headers: every claim a header makes is bounded before anything is allocated.

The format (huggingface/safetensors): eight bytes of little-endian header length, a JSON header
``{name: {dtype, shape, data_offsets}}`` padded with spaces, then the tensors without gaps or overlaps.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import HeredityError, ModelError

_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_MAX_HEADER = 100 << 20  # the format's own limit
_MAX_JSON = 64 << 20
_REPLACE = "Replace the file with an undamaged copy."


@dataclass(frozen=True)
class Stored:
    """One tensor as its header describes it; ``start`` and ``end`` are byte offsets in ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def chunks(self, size: int = 1 << 22) -> Iterator[memoryview]:
        """The tensor's bytes in pieces of at most ``size``; one buffer is reused."""
        buffer = memoryview(bytearray(min(size, self.end - self.start)))
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            left = self.end - self.start
            while left:
                got = stream.readinto(buffer[: min(left, size)])
                if not got:
                    raise ModelError("file became shorter while it was read", where=str(self.file), remedy=_REPLACE)
                yield buffer[:got]
                left -= got


def read_json(path: Path, error: type[HeredityError] = ModelError) -> dict[str, Any]:
    """The object in a JSON file of bounded size.

    Raises:
        error: it cannot be read, is not JSON, is not an object, or names a key twice.
    """
    try:
        if path.stat().st_size > _MAX_JSON:
            raise error(f"larger than {_MAX_JSON >> 20} MiB", where=str(path), remedy="Use the model's own file.")
        return _json_object(path.read_bytes(), str(path), error)
    except OSError as fault:
        raise error(
            f"cannot be read ({fault.strerror or fault})", where=str(path), remedy="Check the path and its permissions."
        ) from None


def read_header(path: Path, error: type[HeredityError] = ModelError) -> dict[str, Stored]:
    """Tensors of a safetensors file by name, from its header alone.

    Raises:
        error: the header or what it says about the file is impossible.
    """

    def refuse(what: str, field: str = "header") -> HeredityError:
        return error(what, where=f"{path}: {field}", remedy=_REPLACE)

    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length < 2 or length > min(_MAX_HEADER, size - 8):
                raise refuse(f"a header of {length} bytes does not fit a file of {size} bytes (truncated?)")
            header = _json_object(stream.read(length), f"{path}: header", error)
    except OSError as fault:
        raise error(
            f"cannot be read ({fault.strerror or fault})", where=str(path), remedy="Check the path and its permissions."
        ) from None
    header.pop("__metadata__", None)
    data = 8 + length
    tensors = {name: _entry(name, entry, path, data, refuse) for name, entry in header.items()}
    at = data
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.end)):
        if tensor.start != at:
            raise refuse("its bytes overlap another tensor's or leave a gap", tensor.name)
        at = tensor.end
    if at != size:
        kind = "truncated" if at > size else "bytes after the last tensor"
        raise refuse(f"tensors end at byte {at}, the file at byte {size} ({kind})")
    return tensors


def _entry(name: str, entry: Any, path: Path, data: int, refuse: Any) -> Stored:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse("an entry needs dtype, shape and data_offsets", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise refuse(f"unknown dtype {dtype!r}", name)
    if not _counts(shape) or len(shape) > 16:
        raise refuse(f"shape {str(shape)[:80]} is not a list of sizes", name)
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"data_offsets {str(offsets)[:80]} is not [start, end]", name)
    if math.prod(shape) * _BYTES[dtype] != offsets[1] - offsets[0]:
        raise refuse(f"{dtype} {shape} does not take {offsets[1] - offsets[0]} bytes", name)
    return Stored(name, dtype, tuple(shape), path, data + offsets[0], data + offsets[1])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in value)


def _json_object(raw: bytes, where: str, error: type[HeredityError]) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key appears twice")
        return result

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as fault:
        raise error(f"not valid JSON ({fault})", where=where, remedy=_REPLACE) from None
    if not isinstance(value, dict):
        raise error(f"a JSON object was expected, not {type(value).__name__}", where=where, remedy=_REPLACE)
    return value
