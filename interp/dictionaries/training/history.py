"""What a training said about itself, one JSON object a line in ``history.jsonl``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ...errors import OutputError, TrainingError

FILE = "history.jsonl"


class Row(BaseModel):
    """One step that was looked at.

    Attributes:
        step: its number, from 1.
        tokens: read so far, massive ones included.
        loss: Σ over places of the mean squared error, in units in which each has variance 1.
        fve: share of the batch's variance explained at each place written; None where there is no variance.
        l0: active latents per token.
        dead: share of latents that have not been active for ``Recipe.dead_after`` tokens.
        left: share of the error that dead latents leave to others (AuxK); None where none is dead.
        k: aimed at in this step.
        rate: Adam's.
        threshold: of inference, as far as it is known (BatchTopK); None before.
        massive: share of tokens left out.
        recovered: share of a model's loss recovered, where one is at hand; None in steps where it was not measured.
        seconds: since the training was begun or resumed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    tokens: int
    loss: float
    fve: tuple[float | None, ...]
    l0: float
    dead: float
    left: float | None
    k: int
    rate: float
    threshold: float | None
    massive: float
    recovered: float | None = None
    seconds: float


def read_history(directory: str | Path) -> list[Row]:
    """The rows of the training in ``directory``; what a killed training left unfinished at the end is left out.

    Raises:
        TrainingError: there is no history, or it is malformed.
    """
    path = Path(directory) / FILE
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        return [Row.model_validate_json(line) for line in lines]
    except OSError as fault:
        remedy = "Name the directory of a training."
        raise TrainingError(f"no history ({fault.strerror or fault})", where=str(path), remedy=remedy) from None
    except ValidationError as fault:
        first = fault.errors()[0]
        what = f"malformed {'.'.join(map(str, first['loc'])) or 'line'} ({first['msg']})"
        raise TrainingError(what, where=str(path), remedy="Delete it; the training goes on without.") from None


def rewrite(directory: Path, rows: Sequence[Row]) -> None:
    """Replace the history by ``rows``.

    Raises:
        OutputError: it cannot be written.
    """
    path = directory / FILE
    partial = path.with_name(f"{FILE}.tmp")
    try:
        partial.write_text("".join(_line(row) for row in rows), encoding="utf-8")
        partial.replace(path)
    except OSError as fault:
        raise _unwritable(path, fault) from fault


def append(directory: Path, row: Row) -> None:
    """Add one row.

    Raises:
        OutputError: it cannot be written.
    """
    path = directory / FILE
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(_line(row))
    except OSError as fault:
        raise _unwritable(path, fault) from fault


def _line(row: Row) -> str:
    data: dict[str, Any] = row.model_dump(mode="json")
    return json.dumps(data) + "\n"


def _unwritable(path: Path, fault: OSError) -> OutputError:
    what = f"cannot be written ({fault.strerror or fault})"
    return OutputError(what, where=str(path), remedy="Check space and permissions.")
