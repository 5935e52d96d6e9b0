"""Audits and circuits of behaviours read back from their files."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from heredity.interp.errors import OutputError, one_line

from .records import SCHEMA_VERSION, Audit

_Record = TypeVar("_Record", bound=BaseModel)


def is_audit(path: Path) -> bool:
    """Whether ``path`` is an audit's directory or its ``audit.json``."""
    return (path / "audit.json").is_file() or (path.is_file() and path.suffix == ".json")


def read_audit(path: Path) -> Audit:
    """The audit in a directory, or in an ``audit.json``.

    Raises:
        OutputError: there is none that can be read.
    """
    file = path / "audit.json" if path.is_dir() else path
    remedy = "Name the directory that `heredity audit --out` wrote, or its audit.json."
    return validated(Audit, read_content(file, remedy), file, remedy)


def read_content(file: Path, remedy: str) -> dict[str, Any]:
    """The JSON object of this schema in ``file``.

    Raises:
        OutputError: it holds none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        raise OutputError(f"not a readable audit ({type(fault).__name__})", where=str(file), remedy=remedy) from fault
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        raise OutputError(f"not an audit of schema {SCHEMA_VERSION}", where=str(file), remedy=remedy)
    return content


def validated(record: type[_Record], content: Any, file: Path, remedy: str) -> _Record:
    """``content`` of ``file`` as a ``record``.

    Raises:
        OutputError: it is none; the first field at fault is named.
    """
    try:
        return record.model_validate(content)
    except ValidationError as fault:
        first = fault.errors()[0]
        field = one_line(".".join(str(part) for part in first["loc"]), 80)
        raise OutputError(f"field {field}: {first['msg']}", where=str(file), remedy=remedy) from fault
