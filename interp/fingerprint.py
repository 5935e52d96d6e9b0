"""Content digests: what a model is, independent of where it lies and how its weights are split into files."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .checkpoint import TOKENIZER_FILES, Checkpoint
from .errors import TokenizerError
from .tensors import Stored, read_json

# What savers write for themselves; none of it changes what the model computes.
_VOLATILE = frozenset(
    {
        "transformers_version", "_name_or_path", "_model_name_or_path", "name_or_path", "_commit_hash",
        "tokenizer_file", "vocab_file", "special_tokens_map_file", "is_local", "local_files_only",
    }
)  # fmt: skip


def fingerprint(checkpoint: Checkpoint) -> str:
    """Sha256 (hex) over tensors, configuration and tokenizer of a checked directory.

    Tensors enter as name, dtype, shape and bytes in the order of their names; JSON enters with sorted keys and
    without what savers note for themselves, such as ``transformers_version``.
    """
    digest = hashlib.sha256()
    _add_tensors(digest, checkpoint.tensors.values())
    _add_json(digest, "config", checkpoint.config)
    for name in TOKENIZER_FILES:
        path = checkpoint.directory / name
        if path.is_file() and path.suffix == ".json":
            _add_json(digest, name, read_json(path, TokenizerError))
        elif path.is_file():
            _add(digest, name, path.read_bytes())
    return digest.hexdigest()


def fingerprint_file(path: Path) -> str:
    """Sha256 (hex) of a file's bytes, for formats that hold weights, configuration and tokenizer in one."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint_adapted(base: str, config: Mapping[str, Any], tensors: Iterable[Stored]) -> str:
    """Sha256 (hex) of an adapter on the base whose digest is ``base``."""
    digest = hashlib.sha256()
    _add(digest, "base", base.encode())
    _add_tensors(digest, tensors)
    _add_json(digest, "adapter_config", config)
    return digest.hexdigest()


def _add_tensors(digest: Any, tensors: Iterable[Stored]) -> None:
    for tensor in sorted(tensors, key=lambda t: t.name):
        _add(digest, tensor.name, f"{tensor.dtype} {list(tensor.shape)}".encode())
        for chunk in tensor.chunks():
            digest.update(chunk)


def _add_json(digest: Any, name: str, value: Mapping[str, Any]) -> None:
    kept = {key: item for key, item in value.items() if key not in _VOLATILE}
    _add(digest, name, json.dumps(kept, sort_keys=True, separators=(",", ":")).encode())


def _add(digest: Any, name: str, value: bytes) -> None:
    # Lengths keep two different inputs from running together into the same bytes.
    label = name.encode("utf-8", "surrogatepass")
    digest.update(f"{len(label)}:{len(value)}:".encode() + label + value)
