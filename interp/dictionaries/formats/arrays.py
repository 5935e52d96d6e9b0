"""Float arrays of a file, each read once its name and shape are known to be right.

What a header claims is held against the size of the file before anything is allocated, so that no configuration can
ask for more memory than there are bytes on disk.
"""

import ast
import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DictionaryError
from ...tensors import FLOATS, read_header

_UNDAMAGED = "Replace the file with an undamaged copy."
_MAX_MEMBERS = 1_000
_MAX_NPY_HEADER = 10_000  # numpy's own limit
_INTEGERS = frozenset({"I64", "I32", "I16", "I8", "U8"})


@dataclass(frozen=True)
class Arrays:
    """The arrays of one file, by name.

    Attributes:
        file: it.
        shapes: of every array.
    """

    file: Path
    shapes: Mapping[str, tuple[int, ...]]
    _floats: frozenset[str]
    _integers: frozenset[str]
    _read: Callable[[str], Tensor]

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def only(self, names: Iterable[str]) -> None:
        """Refuse arrays that the format does not know.

        Raises:
            DictionaryError: there is one.
        """
        known = sorted(names)
        extra = sorted(set(self.shapes) - set(known))
        if extra:
            raise self.fault(f"array {extra[0]!r} is not one of this format", extra[0], f"It knows {', '.join(known)}.")

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of an array that must be there, of so many dimensions, none empty.

        Raises:
            DictionaryError: absent, or another number of dimensions.
        """
        if name not in self.shapes:
            have = ", ".join(sorted(self.shapes)[:20]) or "nothing"
            raise self.fault(f"no array {name!r}; it holds {have}", name, "Get the whole dictionary again.")
        shape = self.shapes[name]
        if len(shape) != dimensions or 0 in shape:
            raise self.fault(f"{dimensions} dimensions were expected, not shape {list(shape)}", name, _UNDAMAGED)
        return shape

    def get(self, name: str, *shape: int) -> Tensor:
        """An array of exactly ``shape`` as float32, which is what features are computed in.

        Raises:
            DictionaryError: absent, of another shape, not of floats, or not finite.
        """
        value = self.raw(name, *shape).float()
        if not bool(torch.isfinite(value).all()):
            raise self.fault("numbers too large for float32", name, _UNDAMAGED)
        return value

    def raw(self, name: str, *shape: int) -> Tensor:
        """As :meth:`get`, in the dtype of the file.

        Raises:
            DictionaryError: as :meth:`get`.
        """
        if self.shape(name, len(shape)) != shape:
            what = f"shape {list(shape)} was expected, not {list(self.shapes[name])}"
            raise self.fault(what, name, "Get configuration and weights of the same dictionary.")
        if name not in self._floats:
            raise self.fault("floating-point numbers were expected", name, "Dequantise it.")
        value = self._read(name)
        if not bool(torch.isfinite(value).all()):
            raise self.fault("NaN or infinite values", name, _UNDAMAGED)
        return value

    def integer(self, name: str) -> int:
        """The one whole number in an array.

        Raises:
            DictionaryError: it holds another number of them, or something else.
        """
        shape = self.shapes.get(name, ())
        if name not in self._integers or shape not in ((), (1,)):
            raise self.fault("one whole number was expected", name, _UNDAMAGED)
        return int(self._read(name).reshape(()))

    def fault(self, what: str, name: str, remedy: str) -> DictionaryError:
        """The error about one array of this file."""
        return DictionaryError(what, where=f"{self.file}: {name}", remedy=remedy)


def open_safetensors(path: Path) -> Arrays:
    """The arrays of a safetensors file.

    Raises:
        DictionaryError: the file or its header cannot be read or makes impossible claims.
    """
    from safetensors import SafetensorError, safe_open

    header = read_header(path, DictionaryError)

    def read(name: str) -> Tensor:
        try:
            with safe_open(path, framework="pt") as handle:
                return handle.get_tensor(name)
        except (OSError, SafetensorError) as fault:
            raise DictionaryError(f"cannot be read ({fault})", where=f"{path}: {name}", remedy=_UNDAMAGED) from None

    return Arrays(
        path,
        {name: stored.shape for name, stored in header.items()},
        frozenset(name for name, stored in header.items() if stored.dtype in FLOATS),
        frozenset(name for name, stored in header.items() if stored.dtype in _INTEGERS),
        read,
    )


def open_npz(path: Path) -> Arrays:
    """The arrays of a numpy ``.npz`` archive; arrays of objects, which are pickles, are never read.

    Raises:
        DictionaryError: it is not such an archive, or a member claims another size than it has.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if len(archive.infolist()) > _MAX_MEMBERS:
                raise DictionaryError(f"more than {_MAX_MEMBERS} members", where=str(path), remedy=_UNDAMAGED)
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if len(members) != len(archive.infolist()):
                raise DictionaryError("a member appears twice", where=str(path), remedy=_UNDAMAGED)
            heads = {name: _npy_header(path, archive, info) for name, info in members.items()}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as fault:
        raise DictionaryError(f"not a readable .npz archive ({fault})", where=str(path), remedy=_UNDAMAGED) from None

    def read(name: str) -> Tensor:
        try:
            with np.load(path, allow_pickle=False) as archive:
                array = archive[name]
        except (OSError, ValueError, zipfile.BadZipFile, zlib.error, KeyError) as fault:
            raise DictionaryError(f"cannot be read ({fault})", where=f"{path}: {name}", remedy=_UNDAMAGED) from None
        return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)))

    return Arrays(
        path,
        {name: shape for name, (shape, _) in heads.items()},
        frozenset(name for name, (_, dtype) in heads.items() if dtype.kind == "f" and dtype.itemsize in (2, 4, 8)),
        frozenset(name for name, (_, dtype) in heads.items() if dtype.kind == "i"),
        read,
    )


def _npy_header(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of a member, once they are known to take the bytes it has.

    A compressed member could still unpack to a thousand times the size of the archive, so its size must be within
    what is compressible in numbers that carry information.
    """
    where = f"{path}: {info.filename}"
    if not info.filename.endswith(".npy"):
        raise DictionaryError("not an array of numpy", where=where, remedy=_UNDAMAGED)
    if info.file_size > 64 * max(info.compress_size, 1 << 20):
        what = f"claims to unpack {info.compress_size} bytes to {info.file_size}"
        raise DictionaryError(what, where=where, remedy=_UNDAMAGED)
    with archive.open(info) as stream:
        shape, dtype, length = _npy(stream.read(16 + _MAX_NPY_HEADER), where)
    numbers = 1
    for size in shape:
        numbers *= size
    if length + numbers * dtype.itemsize != info.file_size:
        what = f"{dtype} {list(shape)} does not take the {info.file_size - length} bytes there are"
        raise DictionaryError(what, where=where, remedy=_UNDAMAGED)
    return shape, dtype


def _npy(head: bytes, where: str) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, dtype and length of a .npy header (numpy's format 1 to 3)."""
    from numpy.lib import format as npy

    stream = io.BytesIO(head)
    major, minor = npy.read_magic(stream)
    if (major, minor) not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"version {major}.{minor} of .npy")
    wide = major > 1
    raw = stream.read(4 if wide else 2)
    length = int(struct.unpack("<I" if wide else "<H", raw)[0]) if len(raw) == (4 if wide else 2) else 1 << 20
    if length > _MAX_NPY_HEADER:
        raise ValueError(f"a header of {length} bytes")
    shape, dtype = _described(stream.read(length).decode("utf-8" if major == 3 else "latin1"))
    if dtype.hasobject:
        what = "an array of objects, that is a pickle, which can run code"
        raise DictionaryError(what, where=where, remedy="Save it as plain numbers.")
    return shape, dtype, len(raw) + 8 + length


def _described(text: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        described = ast.literal_eval(text.strip())
    except (SyntaxError, MemoryError, RecursionError) as fault:
        raise ValueError(f"header: {type(fault).__name__}") from None
    if not isinstance(described, dict) or set(described) != {"descr", "fortran_order", "shape"}:
        raise ValueError("header without descr, fortran_order and shape")
    shape, descr = described["shape"], described["descr"]
    if not isinstance(shape, tuple) or any(type(size) is not int or not 0 <= size < 1 << 48 for size in shape):
        raise ValueError(f"shape {str(shape)[:80]} is not a tuple of sizes")
    if not isinstance(descr, str):
        raise ValueError("a record dtype")
    try:
        return shape, np.dtype(descr)
    except TypeError as fault:
        raise ValueError(str(fault)) from None
