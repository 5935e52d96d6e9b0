"""A training on disk between two steps: everything the next step depends on, in one safetensors file.

The file is there whole or not at all. A training that went on from it ends in the same bytes as one that was never
interrupted, on the same machine with the same number of threads.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import OutputError, TrainingError
from ...tensors import read_header
from .streams import Units
from .weights import Weights

FILE = "checkpoint.safetensors"
_AGAIN = "Delete it, or name a new directory."
_UNITS = ("x_mean", "y_mean", "x_rms", "y_rms")


@dataclass
class State:
    """What changes while training.

    Attributes:
        step: steps done.
        weights: the trained arrays.
        adam: Adam over them.
        units: fixed at the start.
        quiet: int64 [F], tokens since each latent was active.
        threshold: float64 [2], sum and weight of the running mean of the smallest score kept.
    """

    step: int
    weights: Weights
    adam: torch.optim.Adam
    units: Units
    quiet: Tensor
    threshold: Tensor


def write(state: State, identity: dict[str, Any], directory: Path) -> None:
    """Replace the checkpoint in ``directory``.

    Raises:
        OutputError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {f"weights.{name}": value.detach() for name, value in state.weights.named().items()}
    for name, value in state.weights.named().items():
        moments = state.adam.state.get(value, {})
        tensors |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq") if key in moments}
    tensors |= {f"units.{name}": getattr(state.units, name).clone() for name in _UNITS}
    tensors |= {"quiet": state.quiet, "threshold": state.threshold, "step": torch.tensor(state.step)}
    path = directory / FILE
    partial = path.with_name(f"{FILE}.tmp")
    try:
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, partial, _metadata(identity))
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as fault:
        reason = getattr(fault, "strerror", None) or str(fault)
        what = f"cannot be written ({reason})"
        raise OutputError(what, where=str(path), remedy="Check space and permissions.") from fault


def read(state: State, identity: dict[str, Any], directory: Path) -> None:
    """Put ``state`` where the checkpoint in ``directory`` was written.

    Raises:
        TrainingError: it belongs to another training, or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = directory / FILE
    read_header(path, TrainingError)
    try:
        with safe_open(path, framework="pt") as handle:
            metadata, names = handle.metadata() or {}, set(handle.keys())
            found = {name: handle.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as fault:
        raise TrainingError(f"cannot be read ({fault})", where=str(path), remedy=_AGAIN) from fault
    if metadata != _metadata(identity):
        raise TrainingError(difference(metadata.get("training", "{}"), identity), where=str(path), remedy=_AGAIN)
    weights = state.weights.named()
    expected = {f"{kind}.{name}": value for name, value in weights.items() for kind in ("weights", *_MOMENTS)}
    expected |= {f"units.{name}": getattr(state.units, name) for name in _UNITS}
    expected |= {"quiet": state.quiet, "threshold": state.threshold, "step": torch.tensor(0)}
    for name, value in expected.items():
        if name not in found or found[name].shape != value.shape or found[name].dtype != value.dtype:
            raise TrainingError(f"no array {name} that fits", where=str(path), remedy=_AGAIN)
    with torch.no_grad():
        for name, value in weights.items():
            value.copy_(found[f"weights.{name}"])
            moments = {kind: found[f"{kind}.{name}"].to(value.device) for kind in _MOMENTS}
            state.adam.state[value] = {"step": torch.tensor(float(found["step"])), **moments}
    units = {name: found[f"units.{name}"].to(state.quiet.device) for name in _UNITS}
    state.units = Units(state.units.reads, state.units.writes, **units)
    state.quiet.copy_(found["quiet"])
    state.threshold.copy_(found["threshold"])
    state.step = int(found["step"])


_MOMENTS = ("exp_avg", "exp_avg_sq")


def difference(text: str, identity: dict[str, Any]) -> str:
    """In words, what makes the training that ``text`` (JSON) names another one."""
    try:
        found = json.loads(text)
        flat, wanted = ({**each.pop("recipe"), **each} for each in (dict(found), json.loads(json.dumps(identity))))
        name = next(name for name in wanted if flat.get(name) != wanted[name])
        return f"belongs to another training: {name} is {str(flat.get(name))[:40]}, not {str(wanted[name])[:40]}"
    except (ValueError, KeyError, AttributeError, TypeError, StopIteration):
        return "is no checkpoint of a training"


def _metadata(identity: dict[str, Any]) -> dict[str, str]:
    # One key only: safetensors does not fix the order of several.
    return {"training": json.dumps(identity, sort_keys=True)}
