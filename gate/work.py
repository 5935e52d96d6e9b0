"""Resumable steps: each result is written once, atomically, and read back on the next run.

A run always works with what it read back, never with what it just computed, so an interrupted and an uninterrupted
audit see the same bytes.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heredity.interp.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

_KEY = re.compile("[0-9a-f]{32}")


class Work:
    """The work folder of one audit, keyed by everything its steps depend on."""

    def __init__(self, out: Path, key: str) -> None:
        root = out / "work"
        try:
            root.mkdir(parents=True, exist_ok=True)
            for other in root.iterdir():
                # Only what another audit left here; a directory of the user's own may be called "work" too.
                if other.name != key[:32] and _KEY.fullmatch(other.name) and other.is_dir():
                    shutil.rmtree(other)
            self._folder = root / key[:32]
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise unwritable(root, error) from None

    def step(self, name: str, compute: Callable[[], Any]) -> Any:
        """The JSON value of step ``name``: read where it is there and whole, computed and written where it is not."""
        path = self._folder / f"{name}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            text = json.dumps(compute())
            write_atomically(path, text)
            return json.loads(text)

    def arrays(self, name: str, compute: "Callable[[], dict[str, Tensor]]") -> "dict[str, Tensor]":
        """The arrays of step ``name``, kept in the same way."""
        from safetensors import SafetensorError
        from safetensors.torch import load, save

        path = self._folder / f"{name}.safetensors"
        try:
            return load(path.read_bytes())
        except (FileNotFoundError, SafetensorError):
            data = save({key: value.contiguous() for key, value in compute().items()})
            write_atomically(path, data)
            return load(data)

    def remove(self) -> None:
        """Forget all steps."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # somebody else's files in them
            self._folder.parent.rmdir()
            self._folder.parent.parent.rmdir()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write ``content`` so that a reader sees the old file or the whole new one, also after a crash.

    Raises:
        OutputError: the file cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> OutputError:
    """What to raise when ``path`` could not be written because of ``error``."""
    return OutputError(
        error.strerror or "cannot be written",
        where=str(path),
        remedy="Name a directory that can be written, with space.",
    )
