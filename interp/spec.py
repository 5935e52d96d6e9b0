"""The one grammar of model arguments: what kind of thing a text names, decided without opening a file's contents.

``DIR`` · ``FILE.gguf`` · ``org/name`` (the hub; the only kind that may use the network) · ``BASE+ADAPTER`` (a PEFT
directory on any of the others) · ``DIR`` holding ``parent/`` and ``successor/``.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .errors import ModelError, one_line

Role = Literal["parent", "successor"]
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")


@dataclass(frozen=True)
class ModelSpec:
    """A model argument taken apart.

    ``base`` is a path or hub id; for ``adapter`` it is itself a model argument, and for ``zoo`` the directory of the
    role asked for.
    """

    kind: Literal["directory", "hub", "adapter", "gguf", "zoo"]
    base: str
    adapter: str | None = None


def parse_spec(text: str, role: Role = "parent") -> ModelSpec:
    """What ``text`` names; an existing path wins over every other reading.

    Raises:
        ModelError: it is neither a path that exists, nor a hub id, nor two of them joined by ``+``.
    """
    path = Path(text).expanduser()
    if text.strip() and _exists(path):
        return _local(path, role)
    if "+" in text:
        return _adapter(text, role)
    looks_local = text.startswith((".", "/", "~")) or _exists(Path(text.split("/")[0]))
    if _HUB_ID.fullmatch(text) and ".." not in text and not looks_local and not text.endswith(".gguf"):
        return ModelSpec("hub", text)
    raise ModelError(
        "no such file or directory",
        where=one_line(text, 200) or "(empty model argument)",
        remedy="Give a Hugging Face directory, a .gguf file, BASE+ADAPTER, or a hub id such as org/name.",
    )


def _local(path: Path, role: Role) -> ModelSpec:
    if path.is_dir():
        if not (path / "config.json").exists() and all((path / side).is_dir() for side in ("parent", "successor")):
            return ModelSpec("zoo", str(path / role))
        return ModelSpec("directory", str(path))
    if path.suffix.lower() == ".gguf":
        return ModelSpec("gguf", str(path))
    raise ModelError(
        "is a file, not a model directory",
        where=str(path),
        remedy="Give the directory that holds config.json and the weights (only .gguf models are single files).",
    )


def _adapter(text: str, role: Role) -> ModelSpec:
    # A "+" may be part of a path, so the split whose right side exists wins; the last "+" otherwise, for its message.
    cuts = [i for i in range(len(text) - 1, 0, -1) if text[i] == "+"]
    cut = next((i for i in cuts if _exists(Path(text[i + 1 :]).expanduser())), cuts[0] if cuts else 0)
    base, adapter = text[:cut], text[cut + 1 :]
    directory = Path(adapter).expanduser()
    if not base or not adapter or not directory.is_dir():
        raise ModelError(
            f"no adapter directory {adapter!r}", where=text, remedy="Give BASE+ADAPTER with a PEFT directory after +."
        )
    if parse_spec(base, role).kind == "adapter":
        raise ModelError(
            "more than one adapter", where=text, remedy="Merge the first adapter into its base and name the result."
        )
    return ModelSpec("adapter", base, str(directory))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for the file system, or one with a NUL
        return False
